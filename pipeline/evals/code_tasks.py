"""HumanEval and MBPP: from a problem and a completion to the program that bigcode's evaluation harness would run.

https://github.com/bigcode-project/bigcode-evaluation-harness, bigcode_eval/tasks/humaneval.py and mbpp.py.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.sandbox.execute import Limits, Program
from retemper.pipeline.files.atomic import replace_file
from retemper.pipeline.files.records import read_records
from retemper.pipeline.schema.run import Config


@dataclass(frozen=True)
class CodeTask:
    """A benchmark of programs. A problem is a record of its file, `keys` what the record must hold and of which type."""

    hub: str  # dataset, whose split test it is
    keys: dict[str, type]
    stop_words: tuple[str, ...]
    limits: Limits
    prompt: Callable[[dict], str]  # what the model continues
    tests: Callable[[dict], str]

    def truncate(self, completion: str) -> str:
        """The completion before its first stop word."""
        ends = [place for place in map(completion.find, self.stop_words) if place >= 0]
        return completion[: min(ends, default=len(completion))]

    def program(self, problem: dict, completion: str) -> Program:
        """What is run for a completion, which need not have been truncated yet."""
        return Program(self.prompt(problem) + self.truncate(completion), self.tests(problem))


def _humaneval_tests(problem: dict) -> str:
    return f"\n{problem['test']}\ncheck({problem['entry_point']})"


def _mbpp_prompt(problem: dict) -> str:
    return f'"""\n{problem["text"]}\n{problem["test_list"][0]}\n"""\n'


def _mbpp_tests(problem: dict) -> str:
    """With the set-up code, which bigcode's harness leaves out; it uses what the candidate defines (problem 367)."""
    return "\n".join([problem["test_setup_code"], *problem["test_list"]])


CODE_TASKS = {
    "humaneval": CodeTask(
        hub="openai/openai_humaneval",
        keys={"task_id": str, "prompt": str, "entry_point": str, "test": str},
        stop_words=("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>"),
        limits=Limits(cpu_seconds=3),
        prompt=lambda problem: problem["prompt"].strip(),
        tests=_humaneval_tests,
    ),
    "mbpp": CodeTask(
        hub="google-research-datasets/mbpp",
        keys={"task_id": int, "text": str, "test_setup_code": str, "test_list": list},
        stop_words=("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```"),
        # The benchmark's own solution of problem 123 takes more than the usual 3 s.
        limits=Limits(cpu_seconds=15, wall_seconds=90),
        prompt=_mbpp_prompt,
        tests=_mbpp_tests,
    ),
}


def problems_file(config: Config, task: str) -> Path:
    """The problems of a task of programs: of evals.tasks_dir, or of the hub, kept beside the run's scores. Raises UserError."""
    if config.evals.tasks_dir is not None:
        found = sorted(Path(config.evals.tasks_dir).glob(f"{task}*.jsonl"))
        if not found:
            raise UserError(
                f"evals.tasks.{task}: evals.tasks_dir={config.evals.tasks_dir} has no file {task}*.jsonl; put it there"
            )
        return found[0]
    path = config.run_dir / "evals" / f"{task}.jsonl"
    if not path.exists():
        from datasets import load_dataset

        try:
            rows = load_dataset(CODE_TASKS[task].hub, split="test")
        except (OSError, ValueError) as error:
            raise UserError(
                f"evals.tasks.{task}: {CODE_TASKS[task].hub} cannot be fetched ({str(error).splitlines()[0]}); without the hub, set "
                "evals.tasks_dir to a folder with its file"
            ) from None
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_problems(config: Config, task: str) -> list[dict]:
    """The problems of a task of programs, each with the task's keys. Raises UserError."""
    return list(read_records(problems_file(config, task), CODE_TASKS[task].keys))
