"""Test workers beside a run: their scores are the run's, once, whichever process dies."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SEQ_LENGTH, launch, overrides

from retemper.pipeline.checkpoint.commit import committed_steps
from retemper.pipeline.cli import main
from retemper.pipeline.config.compose import load_config
from retemper.pipeline.evals.worker import generations_path
from retemper.pipeline.files.atomic import replace_bytes
from retemper.pipeline.files.records import compress_records, read_records
from retemper.pipeline.runs import eval_folder, run_folder

TASKS = {
    "humaneval": "{where:worker,limit:3,repeats:2,temperature:0.8,top_p:0.95}",
    "gsm8k": "{where:worker,limit:3,shots:0,max_new_tokens:8}",
}


def asked_tasks(shared_data) -> list[str]:
    return [
        f"evals.tasks_dir={shared_data / 'evals'}",
        *(f"evals.tasks.{task}={how}" for task, how in TASKS.items()),
    ]


@pytest.fixture(scope="module")
def trained(workspace, shared_data):
    """Make a run of as many milestones as steps, by LoRA, and return what its workers are asked."""
    runs = workspace / "runs" / "test"

    def train(name: str, steps: int) -> list[str]:
        tokens = [step * 8 * SEQ_LENGTH for step in range(1, steps + 1)]
        asked = ["evals.heldout={}", "schedule.warmup_tokens=0"]
        base = overrides(workspace, f"{name}-base", f"train.tokens={tokens[0]}", *asked)
        asked += [f"train.tokens={tokens[-1]}", f"checkpoint.milestones={json.dumps(tokens)}"]
        lora = overrides(workspace, name, *asked, "method=lora", f"init_from={runs / name}-base")
        launch(1, [{"overrides": base}, {"overrides": lora}])
        return [str(runs / name), *asked_tasks(shared_data), "evals.micro_batch_size=6"]

    return train


class Process:
    """A `retemper eval worker` in a separate process group."""

    def __init__(self, asked: list[str], log: Path, *options: str):
        self.log = log
        command = [
            str(Path(sys.executable).parent / "retemper"),
            "eval",
            "worker",
            *asked,
            "--lease",
            "4",
            "--poll",
            "1",
            *options,
        ]
        with open(log, "a") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True
            )

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + 300
        while words not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def results(logs: list[Path]) -> list[str]:
    """Return the step and task of each score that a worker committed, from its output."""
    said = "".join(log.read_text() for log in logs)
    return re.findall(r"^step +(\d+  \w+): (?:pass@1|exact_match\S*) [\d.]+ ±", said, re.MULTILINE)


def check_scores(asked: list[str], steps: int) -> None:
    run = Path(asked[0])
    assert committed_steps(run) == list(range(1, steps + 1))
    for step in range(steps + 1):
        scored = eval_folder.read_tasks(run, step)
        assert scored.keys() == TASKS.keys()
        assert [scored[task]["samples"] for task in ("humaneval", "gsm8k")] == [3, 3]
        assert (
            scored["humaneval"]["interval"][0] == scored["humaneval"]["score"] == 0
        )  # of a model that has seen ten batches
        folder = eval_folder.task_path(run, step, "x").parent
        generated = list(
            read_records(folder / "humaneval.generations.jsonl.zst", {"completion": str})
        )
        assert len(generated) == 6 and len({record["completion"] for record in generated}) > 3
        assert all(scores["decontaminated"] == {"math": False} for scores in scored.values())
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_another_worker_finishes_the_jobs_of_a_killed_one(trained, tmp_path, capsys):
    steps = 1
    asked, logs = trained("worked", steps), [tmp_path / f"worker{number}" for number in range(2)]
    killed, other = (Process(asked, log) for log in logs)
    killed.wait_for("generating")
    killed.kill()
    assert other.process.wait(300) == 0, other.log.read_text()
    # The first may have been killed between a result and its report of it.
    assert len(said := results(logs)) == len(set(said)) >= (steps + 1) * len(TASKS) - 1
    check_scores(asked, steps)
    assert main(["eval", "show", asked[0]]) == 0
    shown = capsys.readouterr().out
    assert (
        len(re.findall(r"^ +[01]  (?:humaneval +pass@1|gsm8k +exact_match)", shown, re.MULTILINE))
        == 4
    )
    assert re.search(r"^ +1  humaneval .* \+0\.0000 on each of 3 ", shown, re.MULTILINE)

    assert main(["eval", "worker", *asked, "--once"]) == 0 and "step" not in capsys.readouterr().out
    assert main(["eval", "worker", *asked, "evals.tasks.humaneval.limit=4", "--once"]) == 1
    assert (
        f"{eval_folder.task_path(Path(asked[0]), 0, 'humaneval')}: limit 3, now 4"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_twenty_kills_neither_lose_nor_repeat_a_result(trained, tmp_path):
    steps, draw = 20, random.Random(1)
    asked, logs = trained("killed", steps), [tmp_path / "one", tmp_path / "other"]
    workers, kills = [Process(asked, log) for log in logs], 0
    while kills < 20:
        time.sleep(draw.uniform(3, 20))
        victim = draw.randrange(2)
        if workers[victim].process.poll() is None:
            workers[victim].kill()
            kills += 1
        assert any(worker.process.poll() is None for worker in workers) or kills == 20, (
            "the run was scored before twenty kills"
        )
        workers[victim] = Process(asked, logs[victim])
    for worker in workers:
        assert worker.process.wait(900) == 0, worker.log.read_text()
    assert len(said := results(logs)) == len(set(said)) <= (steps + 1) * len(TASKS)
    check_scores(asked, steps)


def test_a_worker_refuses_unsuitable_runs(workspace, capsys):
    assert main(["eval", "worker", str(workspace)]) == 1
    assert "it has no config.json" in capsys.readouterr().err
    config = load_config(overrides(workspace, "unscored"))
    run_folder.start_or_resume(config, 0)
    assert main(["eval", "worker", str(config.run_dir)]) == 1
    assert "has no tasks for workers" in capsys.readouterr().err
    assert main(["eval", "worker", str(config.run_dir), "seed=3"]) == 1
    assert (
        "seed=3: cannot be overridden for an existing run; allowed: evals, data.path,"
        in capsys.readouterr().err
    )


def test_a_worker_refuses_bad_files_before_any_work(workspace, shared_data, tmp_path, capsys):
    (other := tmp_path / "another-tokenizer").mkdir()
    for file in (workspace / "data" / "tokenizer").iterdir():
        (other / file.name).write_text(file.read_text() + " ")
    config = load_config(overrides(workspace, "retokenized", f"data.tokenizer={other}"))
    run_folder.start_or_resume(config, 0)
    assert main(["eval", "worker", str(config.run_dir), *asked_tasks(shared_data)]) == 1
    assert "is another tokenizer than that of the corpus" in capsys.readouterr().err

    config = load_config(overrides(workspace, "unfiled"))
    run_folder.start_or_resume(config, 0)
    for name, content, said in (
        ("humaneval.jsonl", "{}\n", f"{tmp_path / 'humaneval.jsonl'}, line 1: task_id must be str"),
        ("gsm8k_test.jsonl", "{}\n", f"evals.tasks_dir={tmp_path} has no file gsm8k_train.jsonl"),
        (
            "gsm8k_train.jsonl",
            "{}\n",
            f"{tmp_path / 'gsm8k_train.jsonl'}, line 1: not a record of the form",
        ),
    ):
        asked = [
            f"evals.tasks_dir={tmp_path}",
            f"evals.tasks.{name.split('.')[0].split('_')[0]}={{where:worker}}",
        ]
        assert (
            main(["eval", "worker", str(config.run_dir), *asked]) == 1
            and "has no file" in capsys.readouterr().err
        )
        (tmp_path / name).write_text(content)
        assert (
            main(["eval", "worker", str(config.run_dir), *asked]) == 1
            and said in capsys.readouterr().err
        )


def test_missing_checkpoints_are_named_and_the_others_scored(workspace, shared_data, capsys):
    two = [8 * SEQ_LENGTH, 16 * SEQ_LENGTH]
    config = load_config(
        overrides(
            workspace,
            "vanished",
            f"train.tokens={two[1]}",
            f"checkpoint.milestones={two}",
            "schedule.warmup_tokens=0",
        )
    )
    run_folder.start_or_resume(config, 0)
    vanished, emptied = (config.run_dir / "checkpoints" / f"step-{step:08d}" for step in (1, 2))
    emptied.mkdir(parents=True)
    (emptied / "common.pt").touch()
    problem = json.loads((shared_data / "evals" / "humaneval.jsonl").read_text().splitlines()[0])
    programs = [
        {
            "task_id": problem["task_id"],
            "sample": n,
            "completion": ("\n" + problem["canonical_solution"]) * n,
        }
        for n in range(2)
    ]
    replace_bytes(generations_path(config, 1, "humaneval"), compress_records(programs))
    assert main(["eval", "worker", str(config.run_dir), *asked_tasks(shared_data)]) == 1
    said = capsys.readouterr().err
    assert f"step 1, gsm8k: {vanished} was removed before it was evaluated" in said
    for task in TASKS:
        assert f"step 2, {task}: {emptied} is no checkpoint" in said
    assert (
        "step 1, humaneval" not in said
        and eval_folder.read_tasks(config.run_dir, 1)["humaneval"]["score"] == 0.5
    )
    assert not eval_folder.read_tasks(config.run_dir, 2)
