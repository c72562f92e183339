"""Test a study of one base, two trunks and four branches.

Every branch starts from the start of its trunk, which is scored once.
"""

import re

import pytest
from conftest import launch, overrides

from retemper.pipeline.checkpoint.commit import committed_steps
from retemper.pipeline.cli import main
from retemper.pipeline.config.existing_run import load_run
from retemper.pipeline.evals import worker
from retemper.pipeline.report.results import comparison, read_study, table
from retemper.pipeline.runs import eval_folder

STEP = 8 * 64
BRANCHES = {3: "ended in the warm-up", 10: "cooled down"}  # steps -> kind; the warm-up takes four
SHORT = [f"schedule.warmup_tokens={4 * STEP}", "evals.max_samples=24"]
METHODS = {"full": [], "lora": ["method=lora", "method.lora.rank=4", "optimizer.lr=1e-3"]}
NAMES = {steps: f"{steps * STEP}" for steps in BRANCHES}


@pytest.fixture(scope="module")
def study(workspace):
    """Return the folder of the study.

    The short branch of each trunk was also scored on another domain, as `retemper eval` does.
    """
    folder = workspace / "runs" / "study"
    base = overrides(
        workspace, "base", "study=study", f"train.tokens={2 * STEP}", "schedule.warmup_tokens=0"
    )
    branches = f"train.branches=[{','.join(str(steps * STEP) for steps in BRANCHES)}]"

    def asked(name, method, *changes):
        where = ["study=study", f"init_from={folder / 'base'}", *SHORT]
        return overrides(workspace, name, *where, *METHODS[method], *changes, corpus="code")

    long = f"train.tokens={8 * STEP}"
    trunks = {method: asked(method, method, branches, long) for method in METHODS}
    launch(1, [{"overrides": base}, *({"overrides": trunk} for trunk in trunks.values())])
    again = []
    for method in METHODS:
        extra = f"evals.heldout.again={workspace / 'data' / 'math'}"
        short = [f"train.tokens={3 * STEP}", f"branch_of={folder / method}"]
        again.append(
            {"overrides": asked(f"{method}-{NAMES[3]}", method, *short, extra), "all": True}
        )
    launch(1, again, "scored")
    return folder


def test_every_annealed_point_has_learned_and_forgotten(study):
    runs = {run.config.name: run for run in read_study(study)}
    assert runs.keys() == {
        "base",
        *METHODS,
        *(f"{method}-{NAMES[n]}" for method in METHODS for n in BRANCHES),
    }
    rows = {(row[0], row[2]): row for row in table(list(runs.values()))[1:]}
    for method in METHODS:
        for steps, kind in BRANCHES.items():
            name = f"{method}-{NAMES[steps]}"
            start = {domain: curve[0] for domain, curve in runs[method].curves.items()}
            assert {domain: curve[0] for domain, curve in runs[name].curves.items()} == start
            *_, point, again, _code, _math, learned, forgotten, _rate = rows[
                name, f"{steps * STEP:,}"
            ]
            assert point.startswith(kind)
            assert learned and forgotten
            # The long branches were not scored on the domain that was added later: no cell is blank
            # because of it.
            assert bool(again) == (steps == 3)
    assert runs["full"].curves["code"][0] == pytest.approx(runs["lora"].curves["code"][0], rel=1e-6)


def test_the_base_is_scored_once_for_a_trunk_and_its_branches(study):
    for method in METHODS:
        for steps in BRANCHES:
            branch = study / f"{method}-{NAMES[steps]}"
            assert committed_steps(branch) == eval_folder.scored_steps(branch) == [steps]
        began = eval_folder.read_scores(study / method)[0]
        assert began.keys() == {"code", "math", "again"}  # scored by the command on the branch
        # `again` is math: the weights that a branch's command scored as step 0 are the trunk's
        # initial weights.
        assert began["again"]["bits_per_byte"] == pytest.approx(
            began["math"]["bits_per_byte"], rel=1e-6
        )
    short = study / f"full-{NAMES[3]}"
    assert eval_folder.read_scores(short)[3].keys() == {"code", "math", "again"}


def test_findings_compare_annealed_points(study):
    said = comparison(read_study(study))
    assert all(sentence.count("95% interval") >= 2 and "One seed" in sentence for sentence in said)
    assert [sentence.partition(": ")[0] for sentence in said] == [
        f"lora-{NAMES[10]} (LoRA) beside full-{NAMES[10]} (full), after 5,120 tokens",
        f"lora-{NAMES[3]} (LoRA) beside full-{NAMES[3]} (full), after 1,536 tokens "
        "(ended in the warm-up)",
    ]


SCORES = {
    "metric": "acc",
    "score": 0.5,
    "stderr": 0.1,
    "interval": [0.3, 0.7],
    "samples": 9,
    "metrics": {},
    "decontaminated": {},
}


def test_workers_score_the_base_once(study, monkeypatch, capsys):
    done = []

    def generate(self, step, tasks):
        for task in tasks:
            done.append((self.config.name, step, task))
            self._commit(
                step,
                task,
                SCORES | {"settings": self.config.evals.tasks[task].settings},
                [{"doc_id": n, "filter": "none", "acc": 0.5 + step / 100} for n in range(9)],
            )

    monkeypatch.setattr(worker.Worker, "_generate", generate)
    asked = "evals.tasks.hellaswag={where:worker,limit:9,shots:0}"
    names = [f"lora-{NAMES[10]}", "lora", f"lora-{NAMES[3]}"]
    for name in names:
        one = worker.Worker(load_run(study / name, [asked]), worker.PARTS, 30)
        monkeypatch.setattr(worker.Worker, "_check", lambda self: None)
        one.work(None)
    assert [name for name, step, _ in done if step == 0] == [names[0]]
    assert list(eval_folder.read_tasks(study / "lora", 0)) == ["hellaswag"]
    assert not any(eval_folder.read_tasks(study / name, 0) for name in (names[0], names[2]))
    capsys.readouterr()
    assert main(["eval", "show", str(study / names[0])]) == 0
    assert re.search(
        r"^ +10  hellaswag .* \+0\.1000 on each of 9", capsys.readouterr().out, re.MULTILINE
    )


def test_settings_that_differ_from_the_trunks_are_refused(study):
    config = load_run(study / f"lora-{NAMES[3]}", ["evals.tasks.winogrande={where:worker,limit:7}"])
    scores = SCORES | {"settings": {"limit": 9}}
    eval_folder.write_result(study / "lora", 0, "winogrande", scores, [])
    with pytest.raises(Exception, match=f"{study / 'lora'}.*winogrande.json: .*limit 9, now 7"):
        eval_folder.check_settings(config, ["winogrande"])


@pytest.mark.parametrize("requested", [7, 1000])
def test_another_number_of_heldout_samples_is_refused(study, requested):
    config = load_run(study / "lora", [f"evals.max_samples={requested}"])
    available = eval_folder.read_scores(study / "lora")[0]["code"]["samples_available"]
    message = rf"24 samples of code, now {min(requested, available)} \(evals.max_samples="
    assert available > 24
    with pytest.raises(Exception, match=message):
        eval_folder.check_settings(config, [])
    eval_folder.check_settings(load_run(study / "lora", []), [])
