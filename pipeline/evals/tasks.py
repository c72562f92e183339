"""Load tasks: lm-eval's own definitions, with their datasets from the hub or from local files."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from retemper.pipeline.compat import lm_eval_speed
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.evals import EvalsConfig

_DEFINITIONS = Path(lm_eval.__file__).parent / "tasks"
_SHOTS_SEED = 1234  # selects the few-shot examples; lm-eval's default


@dataclass(frozen=True)
class _Local:
    """Local files that replace a hub dataset, one record per line."""

    folder: str  # the folder of the task's definition in lm-eval
    files: dict[str, str]  # split -> file name or pattern
    form: str  # the format of a record, for error messages
    is_sound: Callable[[dict], bool]
    changes: dict[str, Any] = field(default_factory=dict)  # changed keys of the definition


LOCAL_TASKS = {
    "hellaswag": _Local(
        "hellaswag",
        {"validation": "hellaswag_validation*.jsonl"},
        '{"query": text, "choices": [texts], "gold": the index of the correct choice}, '
        "as lm-eval converts its dataset",
        lambda record: (
            isinstance(record["query"], str) and isinstance(record["choices"][record["gold"]], str)
        ),
        {"training_split": None, "process_docs": None, "doc_to_target": "gold"},
    ),
    "arc_challenge": _Local(
        "arc",
        {"validation": "arc_challenge_validation.jsonl", "test": "arc_challenge_test.jsonl"},
        '{"question": text, "choices": {"text": [texts], "label": [labels]}, "answerKey": a label}',
        lambda record: (
            isinstance(record["question"], str)
            and record["answerKey"] in record["choices"]["label"]
            and len(record["choices"]["label"]) == len(record["choices"]["text"])
        ),
        {"training_split": None},
    ),
    "winogrande": _Local(
        "winogrande",
        {"validation": "winogrande_validation.jsonl"},
        '{"sentence": text with a _, "option1": text, "option2": text, "answer": "1" or "2"}',
        lambda record: (
            "_" in record["sentence"]
            and record["answer"] in ("1", "2")
            and bool(record["option1"] and record["option2"])
        ),
        {"training_split": None},
    ),
    "gsm8k": _Local(
        "gsm8k",
        {"train": "gsm8k_train.jsonl", "test": "gsm8k_test.jsonl"},
        '{"question": text, "answer": text that ends with #### and a number}',
        lambda record: isinstance(record["question"], str) and "#### " in record["answer"],
    ),
}


def load_task(name: str, evals: EvalsConfig) -> Task:
    """Load a task as evals.tasks and evals.tasks_dir configure it.

    Raises UserError where lm-eval has no such task or cannot load it, or where its local files are
    missing or malformed.
    """
    lm_eval_speed.patch()
    task_config = evals.tasks[name]
    changes: dict[str, Any] = {"task": name, "repeats": task_config.repeats}
    if task_config.shots is not None:
        changes["num_fewshot"] = task_config.shots
    if evals.tasks_dir is not None:
        changes |= _from_files(name, Path(evals.tasks_dir))
    manager = _manager(name)
    if name not in manager.all_tasks:
        raise UserError(
            f"evals.tasks.{name}: lm-eval {lm_eval.__version__} has no task with that name"
        )
    try:
        # Given alone, the task would be a new definition; in a group its keys override lm-eval's.
        (task,) = manager.load({"group": "retemper", "task": [changes]})["tasks"].values()
    except (OSError, ValueError) as error:
        raise UserError(
            f"evals.tasks.{name}: lm-eval cannot load it ({str(error).splitlines()[0]}); "
            "if the hub is not reachable, set evals.tasks_dir to a folder with the task's files"
        ) from None
    if task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    if task.OUTPUT_TYPE == "generate_until":
        task.set_config("generation_kwargs", task_config.generation, update=True)
    task.set_fewshot_seed(_SHOTS_SEED)
    return task


def chosen_problems(problems: int, limit: int | None) -> list[int] | None:
    """Return the sorted indices of a fixed random subset of `limit` problems; None means all.

    The first problems would not do: they may all be of one kind.
    """
    if limit is None or limit >= problems:
        return None
    return sorted(np.random.default_rng(0).permutation(problems)[:limit].tolist())


def _manager(name: str) -> TaskManager:
    if name not in LOCAL_TASKS:
        return TaskManager()  # reads about 15,000 files, which takes half a minute
    return TaskManager(
        include_path=str(_DEFINITIONS / LOCAL_TASKS[name].folder), include_defaults=False
    )


def _from_files(name: str, folder: Path) -> dict[str, Any]:
    """Return the changes to a task's definition that make it read local files."""
    local = LOCAL_TASKS[name]
    splits = {
        split: _records(_file(name, folder, pattern), local)
        for split, pattern in local.files.items()
    }
    dataset = datasets.DatasetDict(
        {split: datasets.Dataset.from_list(records) for split, records in splits.items()}
    )
    return local.changes | {"custom_dataset": lambda **_metadata: dataset}


def _file(name: str, folder: Path, pattern: str) -> Path:
    if files := sorted(folder.glob(pattern)):
        return files[0]
    raise UserError(
        f"evals.tasks.{name}: evals.tasks_dir={folder} has no file {pattern}; put it there, "
        "or do not set evals.tasks_dir, to download the dataset"
    )


def _records(path: Path, local: _Local) -> list[dict]:
    records = []
    # str.splitlines would also split at U+2028 and others, which JSON has within strings.
    text = path.read_bytes().decode("utf-8-sig", "replace")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            sound = local.is_sound(record)
        except (ValueError, LookupError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise UserError(
                f"{path}, line {number}: not a record of the form {local.form}; correct it, "
                "or download the file again"
            )
        records.append(record)
    if not records:
        raise UserError(f"{path} is empty; download it again")
    return records
