"""HumanEval and MBPP: the programs that bigcode's evaluation harness would run.

https://github.com/bigcode-project/bigcode-evaluation-harness, bigcode_eval/tasks/humaneval.py and
mbpp.py.
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
    """A code-generation benchmark. A problem is one record of the benchmark's file."""

    hub: str  # the dataset on the hub; its "test" split is used
    keys: dict[str, type]  # the required keys of a problem, with the type of each value
    stop_words: tuple[str, ...]
    limits: Limits
    prompt: Callable[[dict], str]  # problem -> the text that the model continues
    tests: Callable[[dict], str]  # problem -> the source of its tests

    def truncate(self, completion: str) -> str:
        """Cut the completion before its first stop word."""
        ends = [index for index in map(completion.find, self.stop_words) if index >= 0]
        return completion[: min(ends, default=len(completion))]

    def program(self, problem: dict, completion: str) -> Program:
        """Build the program to run for a completion, which may or may not be truncated already."""
        return Program(self.prompt(problem) + self.truncate(completion), self.tests(problem))


def _humaneval_tests(problem: dict) -> str:
    return f"\n{problem['test']}\ncheck({problem['entry_point']})"


def _mbpp_prompt(problem: dict) -> str:
    return f'"""\n{problem["text"]}\n{problem["test_list"][0]}\n"""\n'


def _mbpp_tests(problem: dict) -> str:
    """Return the tests, preceded by the problem's set-up code.

    bigcode's harness omits that code, which may use what the candidate defines (problem 367).
    """
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
        # The reference solution of problem 123 takes more than the usual 3 s.
        limits=Limits(cpu_seconds=15, wall_seconds=90),
        prompt=_mbpp_prompt,
        tests=_mbpp_tests,
    ),
}


def problems_file(config: Config, task: str) -> Path:
    """Return the path of a code task's problems.

    They are in evals.tasks_dir where that is set; else they are downloaded from the hub once and
    stored beside the run's scores. Raises UserError where the file is missing or the download
    fails.
    """
    if config.evals.tasks_dir is not None:
        files = sorted(Path(config.evals.tasks_dir).glob(f"{task}*.jsonl"))
        if not files:
            raise UserError(
                f"evals.tasks.{task}: evals.tasks_dir={config.evals.tasks_dir} has no file "
                f"{task}*.jsonl; put it there"
            )
        return files[0]
    path = config.run_dir / "evals" / f"{task}.jsonl"
    if not path.exists():
        from datasets import load_dataset

        try:
            rows = load_dataset(CODE_TASKS[task].hub, split="test")
        except (OSError, ValueError) as error:
            raise UserError(
                f"evals.tasks.{task}: {CODE_TASKS[task].hub} cannot be downloaded "
                f"({str(error).splitlines()[0]}); if the hub is not reachable, set "
                "evals.tasks_dir to a folder with the task's file"
            ) from None
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_problems(config: Config, task: str) -> list[dict]:
    """Read a code task's problems. Raises UserError where one lacks a key or has a wrong type."""
    return list(read_records(problems_file(config, task), CODE_TASKS[task].keys))
