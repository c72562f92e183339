"""Test tasks that cannot be scored.

Each has a message that says why, the others are scored, and training is not affected.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import launch, overrides, run_command

from retemper.pipeline.cli import main
from retemper.pipeline.runs import eval_folder, run_folder
from retemper.pipeline.runs.eval_folder import FORGETTING_TASKS, forgetting

QUESTION = {
    "question": "Which is cold?",
    "choices": {"text": ["ice", "fire", "steam"], "label": ["A", "B", "C"]},
    "answerKey": "A",
}
SENTENCE = {
    "sentence": "The cup did not fit the box, for the _ was small.",
    "option1": "cup",
    "option2": "box",
    "answer": "2",
}
ENDING = {
    "query": "He opened the door",
    "choices": ["and went in.", "and flew.", "and rang.", "and sang."],
    "gold": 0,
}
TASKS = [f"evals.tasks.{name}.shots=0" for name in FORGETTING_TASKS]
RUN = ["parallel=dp2", "train.tokens=2048"]


def write(path: Path, records: list[dict], damaged: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + damaged)


@pytest.fixture(scope="module")
def files(workspace) -> Path:
    """Write valid questions, a sentence without its gap, and no file of endings."""
    folder = workspace / "tasks"
    write(folder / "arc_challenge_test.jsonl", [QUESTION, QUESTION | {"answerKey": "B"}])
    write(folder / "arc_challenge_validation.jsonl", [QUESTION])
    write(folder / "winogrande_validation.jsonl", [SENTENCE, SENTENCE | {"sentence": "No gap."}])
    return folder


@pytest.fixture(scope="module")
def runs(workspace, files) -> Path:
    bad = [*TASKS, f"evals.tasks_dir={files}"]
    missing = workspace / "missing-tokenizer"
    cases = {
        "untasked": [],
        "tasked": [*bad, "track.wandb=offline"],
        "untokenized": [*bad, f"data.tokenizer={missing}"],
    }
    launch(
        2,
        [
            {
                "overrides": overrides(workspace, name, *RUN, *more),
                "fault": None if more else "no_harness",
            }
            for name, more in cases.items()
        ],
    )
    return workspace / "runs" / "test"


def errors(run: Path) -> dict[str, str]:
    """Return task -> the error that is recorded at the end."""
    (folder,) = [path for path in (run / "evals").iterdir() if int(path.name) > 0]
    return {
        path.stem: json.loads(path.read_text()).get("error")
        for path in folder.glob("*.json")
        if path.stem != "heldout"
    }


def test_a_run_without_tasks_needs_no_lm_eval(runs):
    assert max(record["step"] for record in run_folder.read_metrics(runs / "untasked")) == 4
    assert {path.name for path in runs.glob("untasked/evals/*/*")} == {
        "heldout.json",
        "heldout-code.samples.jsonl.zst",
        "heldout-math.samples.jsonl.zst",
    }


def test_heldout_scores_are_shown_with_their_difference_from_the_start(runs, capsys):
    assert main(["eval", "show", str(runs / "untasked")]) == 0
    shown, scores = capsys.readouterr().out, eval_folder.read_scores(runs / "untasked")
    for domain in ("code", "math"):
        now, low, high, difference, error = map(
            float,
            re.search(
                rf"^ +4  {domain} +bits_per_byte +\d+ +"
                r"([\d.]+)  ([\d.]+) to ([\d.]+) +([-+][\d.]+) ± ([\d.]+) \(",
                shown,
                re.MULTILINE,
            ).groups(),
        )
        start, end = (scores[step][domain] for step in (0, 4))
        assert low < now == round(end["bits_per_byte"], 4) < high
        assert difference == pytest.approx(end["bits_per_byte"] - start["bits_per_byte"], abs=1e-4)
        assert 0 < error < end["stderr"]  # of the same samples


def test_tasks_that_failed_are_shown(runs, capsys):
    assert main(["eval", "show", str(runs / "untokenized")]) == 0
    assert (
        len(
            re.findall(
                r"^ +[04]  \w+ +was not scored: .* there is no \S+tokenizer.json",
                capsys.readouterr().out,
                re.MULTILINE,
            )
        )
        == 6
    )


def test_the_report_has_the_scores_of_tasks(runs, tmp_path):
    study = tmp_path / "test"
    shutil.copytree(runs / "tasked", study / "tasked")
    assert main(["report", str(study)]) == 0
    page = (study / "report.html").read_text()
    score = eval_folder.read_tasks(study / "tasked", 4)["arc_challenge"]["score"]
    assert re.search(
        r"<td>tasked</td><td>4</td><td>arc_challenge</td><td>acc_token_loss</td>"
        rf"<td>2</td><td>{score:.4f}</td>",
        page,
    )
    assert re.search(
        r"<td>tasked</td><td>4</td><td>hellaswag</td><td>"
        r"was not scored: [^<]+ has no file hellaswag_validation",
        page,
    )


def test_each_failed_task_gives_its_reason_and_the_others_are_scored(runs, files):
    found = errors(runs / "tasked")
    assert found.keys() == set(FORGETTING_TASKS) and found["arc_challenge"] is None
    assert f"{files} has no file hellaswag_validation*.jsonl" in found["hellaswag"]
    assert (
        f"{files / 'winogrande_validation.jsonl'}, line 2: not a record of the form"
        in found["winogrande"]
    )


def test_failed_tasks_do_not_change_training(runs):
    def losses(run):
        return [
            (record["step"], record["loss"], record["grad_norm"])
            for record in run_folder.read_metrics(runs / run)
        ]

    assert losses("untasked") == losses("tasked") == losses("untokenized")


def test_without_a_tokenizer_nothing_is_scored(runs):
    found = errors(runs / "untokenized")
    assert found.keys() == set(FORGETTING_TASKS) and all(
        "there is no" in error for error in found.values()
    )


def test_only_failed_tasks_are_scored_afterwards(workspace, runs, files):
    """The folder has gone on from `tasked`: what was mended is scored, and their mean told."""
    write(files / "winogrande_validation.jsonl", [SENTENCE, SENTENCE | {"answer": "1"}])
    write(files / "hellaswag_validation_2.jsonl", [ENDING, ENDING | {"gold": 1}])
    before = (runs / "tasked" / "evals" / "00000004" / "arc_challenge.json").read_text()
    begun = eval_folder.read_tasks(runs / "tasked", 0)["arc_challenge"]
    eval_folder.task_path(runs / "tasked", 0, "arc_challenge").unlink()
    tracked = set((runs / "tasked" / "wandb").glob("offline-run-*/run-*.wandb"))
    done = run_command(["eval", "run", str(runs / "tasked"), *TASKS, f"evals.tasks_dir={files}"])
    assert done.returncode == 0, done.stderr
    assert set(errors(runs / "tasked").values()) == {None}
    assert (runs / "tasked" / "evals" / "00000004" / "arc_challenge.json").read_text() == before
    # And of the model that it began with.
    at_begin = eval_folder.read_tasks(runs / "tasked", 0)
    assert at_begin.keys() == set(FORGETTING_TASKS) and at_begin["arc_challenge"] | {
        "seconds": 0
    } == begun | {"seconds": 0}
    scores = eval_folder.read_tasks(runs / "tasked", 4)
    assert (
        f"forgetting score {forgetting(scores):.4f} ± 0." in done.stdout
        and "arc_challenge" not in done.stdout.splitlines()[0]
    )
    assert set((runs / "tasked" / "wandb").glob("offline-run-*/run-*.wandb")) > tracked
