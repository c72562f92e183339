"""The tasks: lm-eval's own definitions, over its hub datasets or over local files in their place."""

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
_SHOTS_SEED = 1234  # of which solved examples stand before a problem; lm-eval's own


@dataclass(frozen=True)
class _Local:
    """Files that stand for a hub dataset, one record a line."""

    folder: str  # of the task's definition in lm-eval
    files: dict[str, str]  # split -> name, which may be a pattern
    form: str  # what a record looks like
    is_sound: Callable[[dict], bool]
    changes: dict[str, Any] = field(default_factory=dict)  # to the definition


LOCAL_TASKS = {
    "hellaswag": _Local(
        "hellaswag",
        {"validation": "hellaswag_validation*.jsonl"},
        '{"query": text, "choices": [texts], "gold": the place of the right one}, as lm-eval makes them of its dataset',
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
    """The task as evals.tasks and evals.tasks_dir ask for it. Raises UserError."""
    lm_eval_speed.patch()
    asked = evals.tasks[name]
    changes: dict[str, Any] = {"task": name, "repeats": asked.repeats}
    if asked.shots is not None:
        changes["num_fewshot"] = asked.shots
    if evals.tasks_dir is not None:
        changes |= _from_files(name, Path(evals.tasks_dir))
    manager = _manager(name)
    if name not in manager.all_tasks:
        raise UserError(
            f"evals.tasks.{name}: lm-eval {lm_eval.__version__} has no task of that name"
        )
    try:
        # A task alone would be read as a definition of its own; within a group its keys are changes to lm-eval's.
        (task,) = manager.load({"group": "retemper", "task": [changes]})["tasks"].values()
    except (OSError, ValueError) as error:
        raise UserError(
            f"evals.tasks.{name}: lm-eval cannot load it ({str(error).splitlines()[0]}); without the hub, set evals.tasks_dir to a folder "
            "with its files"
        ) from None
    if task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    if task.OUTPUT_TYPE == "generate_until":
        task.set_config("generation_kwargs", asked.generation, update=True)
    task.set_fewshot_seed(_SHOTS_SEED)
    return task


def chosen_problems(problems: int, limit: int | None) -> list[int] | None:
    """A fixed random choice: the first problems would be those of one kind. None stands for all."""
    if limit is None or limit >= problems:
        return None
    return sorted(np.random.default_rng(0).permutation(problems)[:limit].tolist())


def _manager(name: str) -> TaskManager:
    if name not in LOCAL_TASKS:
        return TaskManager()  # reads some 15,000 files, for half a minute
    return TaskManager(
        include_path=str(_DEFINITIONS / LOCAL_TASKS[name].folder), include_defaults=False
    )


def _from_files(name: str, folder: Path) -> dict[str, Any]:
    """The changes to a definition by which it reads local files."""
    local = LOCAL_TASKS[name]
    splits = {
        split: _records(_file(name, folder, pattern), local)
        for split, pattern in local.files.items()
    }
    made = datasets.DatasetDict(
        {split: datasets.Dataset.from_list(records) for split, records in splits.items()}
    )
    return local.changes | {"custom_dataset": lambda **_metadata: made}


def _file(name: str, folder: Path, pattern: str) -> Path:
    if found := sorted(folder.glob(pattern)):
        return found[0]
    raise UserError(
        f"evals.tasks.{name}: evals.tasks_dir={folder} has no file {pattern}; put it there, or leave evals.tasks_dir out to fetch the dataset"
    )


def _records(path: Path, local: _Local) -> list[dict]:
    records = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
            sound = local.is_sound(record)
        except (ValueError, LookupError, TypeError):
            sound = False
        if not sound:
            raise UserError(
                f"{path}, line {number}: no record of the form {local.form}; mend it, or download the file again"
            )
        records.append(record)
    if not records:
        raise UserError(f"{path} is empty; download it again")
    return records
