"""What evals/<step>/ holds of a step, written once whoever scored it, and which of its figures W&B has."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from retemper.pipeline.config.stored import read_config
from retemper.pipeline.errors import UserError
from retemper.pipeline.files.atomic import replace_bytes, replace_file, write_once
from retemper.pipeline.files.records import compress_records
from retemper.pipeline.schema.evals import TaskConfig
from retemper.pipeline.schema.run import Config

# Whose mean is the forgetting score of "LoRA Learns Less and Forgets Less" (arXiv 2405.09673).
FORGOTTEN = ("hellaswag", "arc_challenge", "winogrande")
_MIRRORED = "mirrored.txt"  # in a step's folder: the names of its figures that W&B has, one a line


def scores_path(run_dir: Path, step: int) -> Path:
    """Where the held-out scores of one step stand."""
    return run_dir / "evals" / f"{step:08d}" / "heldout.json"


def read_scores(run_dir: Path) -> dict[int, dict]:
    """step -> domain -> scores, ascending."""
    return {
        int(path.parent.name): json.loads(path.read_text())
        for path in sorted((run_dir / "evals").glob("*/heldout.json"))
    }


def write_heldout(
    run_dir: Path, step: int, scores: dict[str, dict], samples: dict[str, list[dict]]
) -> None:
    """Add domains' scores to those of a step, and beside them a record for each sample."""
    for domain, records in samples.items():
        replace_bytes(samples_path(run_dir, step, heldout_name(domain)), compress_records(records))
    replace_file(
        scores_path(run_dir, step),
        json.dumps(read_scores(run_dir).get(step, {}) | scores, indent=2),
    )


def heldout_name(domain: str) -> str:
    """Of a domain's scores among those of tasks."""
    return f"heldout-{domain}"


def start_of(config: Config) -> Config | None:
    """The run whose step 0 is what this run began with: itself, or the trunk that it branches off.

    A trunk's config has this run's evaluations and layout. None where the trunk's folder is gone.
    """
    start = config
    passed = set()
    while start.branch_of:
        passed.add(start.run_dir)
        folder = _trunk_folder(start)
        if folder is None or folder in passed:
            return None
        trunk = read_config(folder)
        place = {"runs_dir": str(folder.parent.parent), "study": folder.parent.name}
        place["name"] = folder.name
        began = {key: trunk.get(key) for key in ("init_from", "branch_of", "seed")}
        if began["init_from"] and start.init_from:
            began["init_from"] = start.init_from  # where the trunk's base is now
        start = start.model_copy(update=place | began)
    return start


def _trunk_folder(branch: Config) -> Path | None:
    """The folder in branch_of; beside the branch's own where a study was moved."""
    named = Path(os.path.abspath(branch.branch_of))
    beside = Path(os.path.abspath(branch.run_dir.parent / named.name))
    folders = [beside, named] if beside.exists() and _is_same(named, beside) else [named, beside]
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and one.samefile(other)


def homes(config: Config, step: int) -> list[Path]:
    """The run folders that may hold scores of a step; new ones are written into the first.

    A branch's step 0 is its trunk's: it is scored once, for the trunk and all of its branches.
    """
    start = None if step or not config.branch_of else start_of(config)
    return [start.run_dir, config.run_dir] if start else [config.run_dir]


def heldout_of(config: Config) -> dict[int, dict]:
    """step -> domain -> scores, ascending, a branch's start among them."""
    scores = read_scores(config.run_dir)
    started = {}
    for home in reversed(homes(config, 0)):
        started |= read_scores(home).get(0, {})
    return (
        {0: started} | {step: found for step, found in scores.items() if step}
        if started
        else scores
    )


def tasks_of(config: Config, step: int) -> dict[str, dict]:
    """task -> its scores at one step, of a branch's start too; what failed is left out."""
    found = {}
    for home in reversed(homes(config, step)):
        found |= read_tasks(home, step)
    return found


def steps_of(config: Config) -> list[int]:
    """Steps of which anything was scored, ascending, a branch's start among them."""
    begun = [0] if any(0 in scored_steps(home) for home in homes(config, 0)) else []
    return sorted({*begun, *scored_steps(config.run_dir)})


def task_path(run_dir: Path, step: int, task: str) -> Path:
    """Where the scores of one task at one step stand; beside it, as .samples.jsonl.zst, what was said to each problem."""
    return run_dir / "evals" / f"{step:08d}" / f"{task}.json"


def read_tasks(run_dir: Path, step: int) -> dict[str, dict]:
    """task -> its scores at one step; what failed is left out."""
    return {task: scores for task, scores in _read(run_dir, step) if "error" not in scores}


def read_errors(run_dir: Path, step: int) -> dict[str, str]:
    """task -> why it was not scored at one step."""
    return {task: scores["error"] for task, scores in _read(run_dir, step) if "error" in scores}


def _read(run_dir: Path, step: int) -> Iterator[tuple[str, dict]]:
    for path in sorted(scores_path(run_dir, step).parent.glob("*.json")):
        if path.name != "heldout.json":
            yield path.stem, json.loads(path.read_text())


def check_settings(config: Config, names: list[str]) -> None:
    """Refuse to go on with other settings of these tasks than those of scores that are there, a branch's start among them.

    Raises UserError that names them.
    """
    tasks = {name: config.evals.tasks[name] for name in names}
    problems = []
    for step in steps_of(config):
        for home in homes(config, step):
            scored = read_tasks(home, step)
            for task in sorted(scored.keys() & tasks.keys()):
                if changes := _changes(scored[task]["settings"], tasks[task]):
                    problems.append(f"  - {task_path(home, step, task)}: {', '.join(changes)}")
    if problems:
        raise UserError(
            "\n".join(["These were scored with other settings than are asked for:", *problems])
            + "\nAsk as they were scored, or move them away to score anew"
        )


def _changes(was: dict, asked: TaskConfig) -> list[str]:
    settings = asked.settings
    if settings["shots"] is None:
        del settings["shots"]  # the task's own
    return [
        f"{key} {was.get(key)}, now {value}"
        for key, value in settings.items()
        if was.get(key) != value
    ]


def write_result(run_dir: Path, step: int, task: str, scores: dict, problems: list[dict]) -> bool:
    """Write what a task was scored, or {"error": …}, and beside it a record for each problem.

    Returns whether that is the result now: one that is there already stays, an error is replaced.
    """
    path = task_path(run_dir, step, task)
    if task in read_tasks(run_dir, step):
        return False
    if problems:
        replace_bytes(samples_path(run_dir, step, task), compress_records(problems))
    path.unlink(missing_ok=True)  # an error
    return write_once(path, json.dumps({"step": step, "task": task} | scores, indent=2).encode())


def samples_path(run_dir: Path, step: int, task: str) -> Path:
    """Where it stands what was said to each problem of a task, or what each sample of a held-out domain was worth."""
    return task_path(run_dir, step, task).with_suffix(".samples.jsonl.zst")


def generations_path(run_dir: Path, step: int, task: str) -> Path:
    """Where the programs of a step stand; their verdicts come beside it."""
    return task_path(run_dir, step, task).with_suffix(".generations.jsonl.zst")


def forgetting(tasks: dict[str, dict]) -> float | None:
    """The mean of the scores of FORGOTTEN, where all of them are there."""
    return (
        sum(tasks[name]["score"] for name in FORGOTTEN) / len(FORGOTTEN)
        if tasks.keys() >= set(FORGOTTEN)
        else None
    )


def scored_steps(run_dir: Path) -> list[int]:
    """Steps of which anything was scored, ascending."""
    return sorted(int(path.name) for path in (run_dir / "evals").glob("[0-9]*"))


def unmirrored(run_dir: Path) -> dict[int, dict[str, float]]:
    """step -> figures by their names in W&B, of those that it does not have yet."""
    found = {}
    for step in scored_steps(run_dir):
        path = _mirrored_path(run_dir, step)
        mirrored = path.read_text().splitlines() if path.is_file() else []
        if figures := {
            name: value for name, value in _figures(run_dir, step).items() if name not in mirrored
        }:
            found[step] = figures
    return found


def mark_mirrored(run_dir: Path, step: int, names: Iterable[str]) -> None:
    """Note that W&B has these figures of a step."""
    with open(_mirrored_path(run_dir, step), "a") as file:
        file.write("".join(f"{name}\n" for name in names))


def _mirrored_path(run_dir: Path, step: int) -> Path:
    return scores_path(run_dir, step).with_name(_MIRRORED)


def _figures(run_dir: Path, step: int) -> dict[str, float]:
    path = scores_path(run_dir, step)
    tasks = read_tasks(run_dir, step)
    heldout = json.loads(path.read_text()) if path.is_file() else {}
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
