"""The scores in evals/<step>/, each written once by whichever process computed it.

Also records which of these figures W&B has.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

from pydantic import Field

from retemper.pipeline.config.stored import read_config
from retemper.pipeline.errors import UserError
from retemper.pipeline.files.atomic import replace_bytes, replace_file, write_once
from retemper.pipeline.files.json_file import read_json, with_other_keys
from retemper.pipeline.files.records import compress_records
from retemper.pipeline.schema.evals import TaskConfig
from retemper.pipeline.schema.run import Config

# The mean over these tasks is the forgetting score of "LoRA Learns Less and Forgets Less"
# (arXiv 2405.09673).
FORGETTING_TASKS = ("hellaswag", "arc_challenge", "winogrande")
_MIRRORED = "mirrored.txt"  # in a step's folder: names of its figures that W&B has, one per line

_SCORE_AGAIN = "restore it from a copy, or remove it and `retemper eval run` computes it again"

_Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


@with_other_keys
class _Heldout(TypedDict):
    """What is read of the scores of a held-out domain."""

    bits_per_byte: float
    stderr: float
    interval: _Interval
    samples: int


@with_other_keys
class _Metric(TypedDict):
    value: float


@with_other_keys
class Task(TypedDict):
    """What is read of the scores of a task."""

    score: float
    stderr: float | None
    interval: _Interval
    samples: int
    metric: str
    metrics: dict[str, _Metric]
    settings: dict[str, Any]
    decontaminated: dict[str, bool | None]


@with_other_keys
class _Failure(TypedDict):
    error: str


def scores_path(run_dir: Path, step: int) -> Path:
    """Return the path of the held-out scores of one step."""
    return run_dir / "evals" / f"{step:08d}" / "heldout.json"


def read_scores(run_dir: Path) -> dict[int, dict]:
    """Return the held-out scores of a run as {step: {domain: scores}}, ascending by step."""
    paths = {step: scores_path(run_dir, step) for step in scored_steps(run_dir)}
    return {step: _heldout(path) for step, path in paths.items() if path.is_file()}


def _heldout(path: Path) -> dict[str, dict]:
    return read_json(path, dict[str, _Heldout], _SCORE_AGAIN)


def write_heldout(
    run_dir: Path, step: int, scores: dict[str, dict], samples: dict[str, list[dict]]
) -> None:
    """Add the scores of held-out domains to those of a step, and write one record per sample.

    Args:
        run_dir: folder of the run.
        step: that was scored.
        scores: {domain: scores}.
        samples: {domain: one record per sample}.
    """
    for domain, records in samples.items():
        replace_bytes(samples_path(run_dir, step, heldout_name(domain)), compress_records(records))
    replace_file(
        scores_path(run_dir, step),
        json.dumps(read_scores(run_dir).get(step, {}) | scores, indent=2),
    )


def heldout_name(domain: str) -> str:
    """Return the name that a held-out domain has among the names of tasks."""
    return f"heldout-{domain}"


def start_of(config: Config) -> Config | None:
    """Return the config of the run whose step 0 is the initial model of this run.

    It is this run itself, or the trunk that it branches off. The returned config of a trunk has
    this run's evaluations and layout. The result is None where the trunk's folder is missing.
    """
    start = config
    visited = set()
    while start.branch_of:
        visited.add(start.run_dir)
        folder = _trunk_folder(start.branch_of, start.run_dir.parent)
        if folder is None or folder in visited:
            return None
        trunk = read_config(folder)
        assert trunk is not None, "_trunk_folder returns folders with a config"
        location = {"runs_dir": str(folder.parent.parent), "study": folder.parent.name}
        location["name"] = folder.name
        origin = {key: trunk.get(key) for key in ("init_from", "branch_of", "seed")}
        if origin["init_from"] and start.init_from:
            origin["init_from"] = start.init_from  # where the trunk's base is now
        start = start.model_copy(update=location | origin)
    return start


def _trunk_folder(branch_of: str, study: Path) -> Path | None:
    """Return the folder that branch_of names, or where a study was moved the branch's sibling.

    The result is None where neither is the folder of a run.
    """
    named = Path(os.path.abspath(branch_of))
    sibling = Path(os.path.abspath(study / named.name))
    same = sibling.exists() and _is_same(named, sibling)
    folders = [sibling, named] if same else [named, sibling]
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and one.samefile(other)


def homes(config: Config, step: int) -> list[Path]:
    """Return the run folders that may contain scores of a step; new scores go into the first.

    Step 0 of a branch is that of its trunk: it is scored once, for the trunk and all its branches.
    """
    start = None if step or not config.branch_of else start_of(config)
    return [start.run_dir, config.run_dir] if start else [config.run_dir]


def heldout_of(config: Config) -> dict[int, dict]:
    """Return held-out scores as {step: {domain: scores}}, in ascending order of steps.

    Step 0 of a branch is included.
    """
    scores = read_scores(config.run_dir)
    start_scores: dict[str, dict] = {}
    for home in reversed(homes(config, 0)):
        start_scores |= read_scores(home).get(0, {})
    return (
        {0: start_scores} | {step: domains for step, domains in scores.items() if step}
        if start_scores
        else scores
    )


def tasks_of(config: Config, step: int) -> dict[str, dict]:
    """Return {task: scores} of one step, also for step 0 of a branch, without failed tasks."""
    scores: dict[str, dict] = {}
    for home in reversed(homes(config, step)):
        scores |= read_tasks(home, step)
    return scores


def steps_of(config: Config) -> list[int]:
    """Return all steps with any scores in ascending order; step 0 of a branch is included."""
    start = [0] if any(0 in scored_steps(home) for home in homes(config, 0)) else []
    return sorted({*start, *scored_steps(config.run_dir)})


def task_path(run_dir: Path, step: int, task: str) -> Path:
    """Return the path of the scores of one task at one step."""
    return run_dir / "evals" / f"{step:08d}" / f"{task}.json"


def read_tasks(run_dir: Path, step: int) -> dict[str, dict]:
    """Return {task: scores} of one step, without failed tasks."""
    return {task: scores for task, scores in _read(run_dir, step) if "error" not in scores}


def read_errors(run_dir: Path, step: int) -> dict[str, str]:
    """Return {task: error message} of the tasks that failed at one step."""
    return {task: scores["error"] for task, scores in _read(run_dir, step) if "error" in scores}


def _read(run_dir: Path, step: int) -> Iterator[tuple[str, dict]]:
    for path in sorted(scores_path(run_dir, step).parent.glob("*.json")):
        if path.name != "heldout.json":
            yield path.stem, read_json(path, Task | _Failure, _SCORE_AGAIN)


def check_settings(config: Config, names: list[str]) -> None:
    """Check that existing scores were made with the settings of a config.

    The scores are those of some tasks, also at step 0 of a branch, and the held-out scores.

    Raises:
        UserError: settings differ; the message lists the scores and the settings.
    """
    tasks = {name: config.evals.tasks[name] for name in names}
    problems = _other_samples(config)
    for step in steps_of(config):
        for home in homes(config, step):
            scored = read_tasks(home, step)
            for task in sorted(scored.keys() & tasks.keys()):
                if changes := _changes(scored[task]["settings"], tasks[task]):
                    problems.append(f"  - {task_path(home, step, task)}: {', '.join(changes)}")
    if problems:
        raise UserError(
            "\n".join(["These scores were made with other settings than requested:", *problems])
            + "\nRequest the same settings, or move the files away to evaluate again"
        )


def _other_samples(config: Config) -> list[str]:
    """Return a line for each held-out score over another number of samples than is requested."""
    lines = []
    for step, domains in read_scores(config.run_dir).items():
        for domain in sorted(domains.keys() & config.evals.heldout.keys()):
            old = domains[domain]
            available = old.get("samples_available", old["samples"])  # not in older scores
            requested = min(available, config.evals.max_samples)
            if requested != old["samples"]:
                path = scores_path(config.run_dir, step)
                lines.append(
                    f"  - {path}: {old['samples']} samples of {domain}, now {requested} "
                    f"(evals.max_samples={config.evals.max_samples})"
                )
    return lines


def _changes(old: dict, task: TaskConfig) -> list[str]:
    settings = task.settings
    if settings["shots"] is None:
        del settings["shots"]  # the default of the task
    return [
        f"{key} {old.get(key)}, now {value}"
        for key, value in settings.items()
        if old.get(key) != value
    ]


def write_result(run_dir: Path, step: int, task: str, scores: dict, problems: list[dict]) -> bool:
    """Write the scores of a task, and a file with one record per problem beside them.

    Existing scores are kept; an existing error is replaced.

    Args:
        run_dir: folder of the run.
        step: that was scored.
        task: name of the task.
        scores: of the task, or {"error": message}.
        problems: one record per problem; may be empty.

    Returns:
        Whether these scores were written.
    """
    path = task_path(run_dir, step, task)
    if task in read_tasks(run_dir, step):
        return False
    if problems:
        replace_bytes(samples_path(run_dir, step, task), compress_records(problems))
    path.unlink(missing_ok=True)  # an error
    return write_once(path, json.dumps({"step": step, "task": task} | scores, indent=2).encode())


def samples_path(run_dir: Path, step: int, task: str) -> Path:
    """Return the path of the records per problem of a task, or per sample of a held-out domain."""
    return task_path(run_dir, step, task).with_suffix(".samples.jsonl.zst")


def generations_path(run_dir: Path, step: int, task: str) -> Path:
    """Return the path of the programs that were generated at a step.

    Their verdicts are written beside it.
    """
    return task_path(run_dir, step, task).with_suffix(".generations.jsonl.zst")


def forgetting(tasks: dict[str, dict]) -> float | None:
    """Return the mean score of the FORGETTING_TASKS, or None where one of them is missing."""
    return (
        sum(tasks[name]["score"] for name in FORGETTING_TASKS) / len(FORGETTING_TASKS)
        if tasks.keys() >= set(FORGETTING_TASKS)
        else None
    )


def scored_steps(run_dir: Path) -> list[int]:
    """Return all steps with any scores in a run's own folder, in ascending order."""
    return sorted(
        int(path.name)
        for path in (run_dir / "evals").glob("*")
        if path.is_dir() and re.fullmatch(r"\d{8,}", path.name)
    )


def scores_missing_in_wandb(run_dir: Path) -> dict[int, dict[str, float]]:
    """Return {step: {name in W&B: value}} of the figures that W&B does not have yet."""
    missing = {}
    for step in scored_steps(run_dir):
        path = _mirrored_path(run_dir, step)
        mirrored = path.read_text().split("\n") if path.is_file() else []
        if figures := {
            name: value for name, value in _figures(run_dir, step).items() if name not in mirrored
        }:
            missing[step] = figures
    return missing


def mark_mirrored(run_dir: Path, step: int, names: Iterable[str]) -> None:
    """Record that W&B has these figures of a step."""
    with open(_mirrored_path(run_dir, step), "a") as file:
        file.write("".join(f"{name}\n" for name in names))


def _mirrored_path(run_dir: Path, step: int) -> Path:
    return scores_path(run_dir, step).with_name(_MIRRORED)


def _figures(run_dir: Path, step: int) -> dict[str, float]:
    path = scores_path(run_dir, step)
    tasks = read_tasks(run_dir, step)
    heldout = _heldout(path) if path.is_file() else {}
    figures = {
        f"heldout/{domain}/bits_per_byte": values["bits_per_byte"]
        for domain, values in heldout.items()
    }
    for name, scores in tasks.items():
        figures |= {
            f"evals/{name}/{metric}": values["value"]
            for metric, values in scores["metrics"].items()
        }
    mean = forgetting(tasks)
    return figures if mean is None else figures | {"evals/forgetting": mean}
