"""Evaluations beside a run: any number of workers share its committed checkpoints, and each result counts once.

Two parts, which may run on different machines. generate: a checkpoint is exported, adapters merged, and its answers are written, by
vLLM where it is installed, else by transformers. score: generated programs are run in the sandbox. Both are jobs of a step, under leases.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retemper.pipeline.checkpoint import commit
from retemper.pipeline.checkpoint.base import base_of
from retemper.pipeline.data.streams import decontaminated
from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.code_tasks import CODE_TASKS, problems_file, read_problems
from retemper.pipeline.evals.score_code import score_generations
from retemper.pipeline.evals.uncertainty import Estimate
from retemper.pipeline.files.atomic import write_once
from retemper.pipeline.runs import eval_folder
from retemper.pipeline.runs.leases import lease
from retemper.pipeline.runs.track import mirror_scores
from retemper.pipeline.schema.run import Config

PARTS = ("generate", "score")
_KS = (1, 10, 100)  # of pass@k, where there are as many samples


@dataclass(frozen=True)
class Worker:
    """One of a run's workers."""

    config: Config
    parts: tuple[str, ...]
    lease_seconds: float
    failed: dict[tuple[int, str], str] = field(default_factory=dict)  # step and task -> why

    def work(self, poll_seconds: float | None) -> None:
        """Evaluate what is there, and, unless poll_seconds is None, what is still to come until the run's last step has all its scores.

        Raises UserError at the beginning where a task cannot be evaluated at all, and at the end where something was not evaluated.
        """
        self._check()
        said = None
        while True:
            self._note_vanished()
            done = [self._attempt(step, part) for step in self._steps() for part in self.parts]
            if not any(done):
                self._mirror()
                if poll_seconds is None or self._is_over():
                    break
                if (waiting := self._waiting()) != said:
                    print(said := waiting, flush=True)
                time.sleep(poll_seconds)
        if self.failed:
            listed = "\n".join(
                f"  - step {step}, {task}: {why}" for (step, task), why in self.failed.items()
            )
            raise UserError(f"{self.config.run_dir} is not evaluated whole:\n{listed}")

    def _check(self) -> None:
        """Refuse files and tokenizers that are not what they must be, and settings that change, before a model is exported."""
        eval_folder.check_settings(self.config, self.config.evals.of_workers)
        for task in self.config.evals.of_workers:
            if task in CODE_TASKS:
                read_problems(self.config, task)
        if "generate" in self.parts:
            from retemper.pipeline.evals.run_tokenizer import load_tokenizer
            from retemper.pipeline.evals.tasks import load_task

            load_tokenizer(self.config)
            for task in self.config.evals.of_workers:
                if task not in CODE_TASKS:
                    load_task(task, self.config.evals)

    def _steps(self) -> list[int]:
        """Milestones with a checkpoint, or with programs of one; before the first step the model that the run began from.

        A branch's is its trunk's, whose scores stand in the trunk's folder: whoever comes first scores it, and nobody again.
        """
        there = {
            *commit.committed_steps(self.config.run_dir),
            *eval_folder.scored_steps(self.config.run_dir),
        }
        start = eval_folder.start_of(self.config)
        begun = [0] if start and start.init_from else []
        return begun + [step for step in self.config.milestone_steps if step in there]

    def _mirror(self) -> None:
        start = eval_folder.start_of(self.config) if self.config.branch_of else None
        for config in filter(None, (self.config, start)):
            mirror_scores(config)

    def _note_vanished(self) -> None:
        """Checkpoints are saved in their order: a milestone without one, before one that is there, has none any more."""
        committed = commit.committed_steps(self.config.run_dir)
        for step in self.config.milestone_steps:
            if step not in committed and step < max(committed, default=0):
                with self._noting(step, self._missing(step, "generate")):
                    raise UserError(
                        f"{commit.folder_of(self.config.run_dir, step)} was removed before it was evaluated"
                    )

    def _is_over(self) -> bool:
        complete = self.config.steps in commit.committed_steps(self.config.run_dir)
        parts = PARTS if self.parts == ("score",) else self.parts  # programs come from others
        return complete and not any(
            self._missing(step, part) for step in self._steps() for part in parts
        )

    def _waiting(self) -> str:
        if to_come := [
            step for step in self.config.milestone_steps if step > max(self._steps(), default=0)
        ]:
            return f"waiting for the checkpoint of step {to_come[0]}"
        return "waiting for what other workers have begun"

    def _attempt(self, step: int, part: str) -> bool:
        """Do one job, where there is something to do and nobody else does it. Returns whether it did."""
        if not self._missing(step, part):
            return False
        with lease(_folder(self.config, step), part, self.lease_seconds) as taken:
            tasks = self._missing(step, part) if taken else []
            if tasks:
                {"generate": self._generate, "score": self._score}[part](step, tasks)
        return bool(tasks)

    def _missing(self, step: int, part: str) -> list[str]:
        """Tasks of which this part of the work is to be done at a step."""
        scored = eval_folder.tasks_of(self.config, step)
        tasks = [
            task
            for task in self.config.evals.of_workers
            if task not in scored and (step, task) not in self.failed
        ]
        generated = [
            task
            for task in tasks
            if task in CODE_TASKS and generations_path(self.config, step, task).exists()
        ]
        return generated if part == "score" else [task for task in tasks if task not in generated]

    @contextlib.contextmanager
    def _noting(self, step: int, tasks: list[str]) -> Iterator[None]:
        """Note what goes wrong with these tasks of a step; the others are evaluated all the same."""
        try:
            yield
        except Exception as error:  # of files, of the hub, of lm-eval, of vLLM
            said = (
                str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            )
            for task in tasks:
                self.failed[step, task] = said
                print(f"step {step:>6}  {task} was not scored: {said}", file=sys.stderr, flush=True)

    def _generate(self, step: int, tasks: list[str]) -> None:
        from retemper.pipeline.evals.generate import complete_problems, language_model
        from retemper.pipeline.evals.harness import score_task

        with tempfile.TemporaryDirectory(prefix="retemper-") as name, self._noting(step, tasks):
            print(f"step {step:>6}  exporting", flush=True)
            export(self.config, step, folder := Path(name, "model"))
            lm = language_model(self.config, folder)
            for task in tasks:
                with self._noting(step, [task]):
                    print(f"step {step:>6}  {task}: generating", flush=True)
                    if task in CODE_TASKS:
                        write_once(
                            generations_path(self.config, step, task),
                            complete_problems(self.config, task, lm),
                        )
                    else:
                        self._commit(step, task, *score_task(task, self.config, lm))

    def _score(self, step: int, tasks: list[str]) -> None:
        for task in tasks:
            with self._noting(step, [task]):
                print(f"step {step:>6}  {task}: running programs", flush=True)
                self._commit(step, task, score_programs(self.config, step, task), [])

    def _commit(self, step: int, task: str, scores: dict, problems: list[dict]) -> None:
        # Not written where this lease had expired, and its successor was faster.
        if eval_folder.write_result(
            eval_folder.homes(self.config, step)[0], step, task, scores, problems
        ):
            print(
                f"step {step:>6}  {task}: {scores['metric']} {scores['score']:.4f} ± {scores['stderr']:.4f}",
                flush=True,
            )


def score_programs(config: Config, step: int, task: str) -> dict:
    """Run the programs that were generated at a step; what evals/<step>/<task>.json holds. Raises UserError."""
    asked = config.evals.tasks[task]
    ks = [k for k in _KS if k <= asked.repeats]
    scored = score_generations(
        task,
        problems_file(config, task),
        generations_path(config, step, task),
        ks,
        config.evals.unsafe_code,
    )
    estimates = {f"pass@{k}": Estimate(**scored.pop(f"pass@{k}")) for k in ks}
    return estimates["pass@1"].headline("pass@1") | {
        "decontaminated": decontaminated(config, task),
        "metrics": {
            name: {"value": estimate.value, "stderr": estimate.stderr}
            for name, estimate in estimates.items()
        },
        "programs": scored,
        "settings": asked.settings | {"seed": config.seed},
    }


def export_options(config: Config, step: int, folder: Path) -> dict[str, Any]:
    """The options that `retemper export` takes for a step of a run, where step 0 is its base.

    Raises UserError where the base is gone or was changed.
    """
    run = config.run_dir
    if not step:
        base = base_of(eval_folder.start_of(config))
        run = base.path
        step = base.step
    options = {"run": str(run), "folder": str(folder), "step": step}
    return options | {"adapter": False, "base": None, "tokenizer": config.data.tokenizer}


def export(config: Config, step: int, folder: Path) -> None:
    """Write a run's checkpoint, or with step 0 the model that it began from, for transformers. Raises UserError."""
    options = json.dumps(export_options(config, step, folder))
    command = [sys.executable, "-m", "retemper.pipeline.huggingface", "export", options]
    done = subprocess.run(
        command, capture_output=True, text=True
    )  # a process of its own: what it held is free afterwards
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise UserError(
            next(
                (line.removeprefix("error: ") for line in said if line.startswith("error: ")),
                "\n".join(said[-5:]),
            )
        )


def generations_path(config: Config, step: int, task: str) -> Path:
    """Where the programs of a step stand; their verdicts come beside it."""
    return eval_folder.generations_path(eval_folder.homes(config, step)[0], step, task)


def _folder(config: Config, step: int) -> Path:
    return eval_folder.task_path(eval_folder.homes(config, step)[0], step, "").parent
