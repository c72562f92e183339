"""Evaluation workers: any number of them share a run's checkpoints; each result is written once.

The work has two parts, which may run on different machines. generate: export a checkpoint with
merged adapters and generate with it, by vLLM if installed, else transformers. score: run the
generated programs in the sandbox. Each part of each step is a job that a worker takes by a lease.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from retemper.pipeline.checkpoint import commit
from retemper.pipeline.checkpoint.base import base_of
from retemper.pipeline.compat.light_imports import import_transformers
from retemper.pipeline.data.streams import decontaminated
from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.code_tasks import CODE_TASKS, problems_file, read_problems
from retemper.pipeline.evals.score_code import score_generations
from retemper.pipeline.evals.uncertainty import Estimate
from retemper.pipeline.files.atomic import write_once
from retemper.pipeline.runs import eval_folder
from retemper.pipeline.runs.leases import lease
from retemper.pipeline.runs.track import mirror_scores
from retemper.pipeline.schema.exchange import ExportRequest
from retemper.pipeline.schema.run import Config

PARTS = ("generate", "score")
_KS = (1, 10, 100)  # the k of pass@k, as far as there are enough samples


@dataclass(frozen=True)
class Worker:
    """An evaluation worker of a run."""

    config: Config
    parts: tuple[str, ...]  # the PARTS that this worker does
    lease_seconds: float  # a lease expires if it is not renewed for this time
    failed: dict[tuple[int, str], str] = field(default_factory=dict)  # step and task -> reason

    def work(self, poll_seconds: float | None) -> None:
        """Evaluate the run's milestones.

        Args:
            poll_seconds: Seconds between checks for new checkpoints, until the run's last step has
                all its scores. None: evaluate the existing checkpoints, then return.

        Raises:
            UserError: At the beginning, a task's files, tokenizer or settings are wrong; at the
                end, some tasks could not be evaluated.
        """
        import_transformers()
        self._check()
        last_message = None
        while True:
            self._record_removed_checkpoints()
            done = [self._attempt(step, part) for step in self._steps() for part in self.parts]
            if not any(done):
                self._mirror()
                if poll_seconds is None or self._is_over():
                    break
                if (message := self._waiting_message()) != last_message:
                    print(last_message := message, flush=True)
                time.sleep(poll_seconds)
        if self.failed:
            problems = "\n".join(
                f"  - step {step}, {task}: {reason}" for (step, task), reason in self.failed.items()
            )
            raise UserError(f"{self.config.run_dir}: some evaluations failed:\n{problems}")

    def _check(self) -> None:
        """Check the tasks' files, the tokenizer and the settings before any model is exported.

        Raises UserError where one is wrong, or where settings differ from those of earlier scores.
        """
        eval_folder.check_settings(self.config, self.config.evals.worker_tasks)
        for task in self.config.evals.worker_tasks:
            if task in CODE_TASKS:
                read_problems(self.config, task)
        if "generate" in self.parts:
            from retemper.pipeline.evals.run_tokenizer import load_tokenizer
            from retemper.pipeline.evals.tasks import load_task

            load_tokenizer(self.config)
            for task in self.config.evals.worker_tasks:
                if task not in CODE_TASKS:
                    load_task(task, self.config.evals)

    def _steps(self) -> list[int]:
        """Return the milestones with a checkpoint or with programs generated from one.

        Step 0, the initial model, is among them where the run has a base. That of a branch is its
        trunk's: it is scored only once, and the scores are in the trunk's folder.
        """
        existing = {
            *commit.committed_steps(self.config.run_dir),
            *eval_folder.scored_steps(self.config.run_dir),
        }
        start = eval_folder.start_of(self.config)
        initial = [0] if start and start.init_from else []
        return initial + [step for step in self.config.milestone_steps if step in existing]

    def _mirror(self) -> None:
        start = eval_folder.start_of(self.config) if self.config.branch_of else None
        for config in filter(None, (self.config, start)):
            mirror_scores(config)

    def _record_removed_checkpoints(self) -> None:
        """Record as failed the milestones whose checkpoint was removed before its evaluation.

        Checkpoints are saved in order, so a milestone that lacks one although a later checkpoint
        exists will not get one.
        """
        committed = commit.committed_steps(self.config.run_dir)
        for step in self.config.milestone_steps:
            if step not in committed and step < max(committed, default=0):
                folder = commit.folder_of(self.config.run_dir, step)
                with self._record_failures(step, self._missing(step, "generate")):
                    raise UserError(f"{folder} was removed before it was evaluated")

    def _is_over(self) -> bool:
        complete = self.config.steps in commit.committed_steps(self.config.run_dir)
        # A worker that only scores depends on programs that others generate.
        parts = PARTS if self.parts == ("score",) else self.parts
        return complete and not any(
            self._missing(step, part) for step in self._steps() for part in parts
        )

    def _waiting_message(self) -> str:
        if upcoming := [
            step for step in self.config.milestone_steps if step > max(self._steps(), default=0)
        ]:
            return f"waiting for the checkpoint of step {upcoming[0]}"
        return "waiting for jobs that other workers have started"

    def _attempt(self, step: int, part: str) -> bool:
        """Do one job unless it is done or another worker has it. Returns whether work was done."""
        if not self._missing(step, part):
            return False
        with lease(_folder(self.config, step), part, self.lease_seconds) as acquired:
            tasks = self._missing(step, part) if acquired else []
            if tasks:
                {"generate": self._generate, "score": self._score}[part](step, tasks)
        return bool(tasks)

    def _missing(self, step: int, part: str) -> list[str]:
        """Return the tasks for which this part of the work is still to be done at a step."""
        scored = eval_folder.tasks_of(self.config, step)
        tasks = [
            task
            for task in self.config.evals.worker_tasks
            if task not in scored and (step, task) not in self.failed
        ]
        generated = [
            task
            for task in tasks
            if task in CODE_TASKS and generations_path(self.config, step, task).exists()
        ]
        return generated if part == "score" else [task for task in tasks if task not in generated]

    @contextlib.contextmanager
    def _record_failures(self, step: int, tasks: list[str]) -> Iterator[None]:
        """Record an error as the failure of these tasks at a step, so that the others continue."""
        try:
            yield
        except Exception as error:  # from files, the hub, lm-eval or vLLM
            reason = (
                str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            )
            for task in tasks:
                self.failed[step, task] = reason
                print(
                    f"step {step:>6}  {task} was not scored: {reason}", file=sys.stderr, flush=True
                )

    def _generate(self, step: int, tasks: list[str]) -> None:
        from retemper.pipeline.evals.generate import complete_problems, language_model
        from retemper.pipeline.evals.harness import score_task

        with (
            tempfile.TemporaryDirectory(prefix="retemper-") as name,
            self._record_failures(step, tasks),
        ):
            print(f"step {step:>6}  exporting", flush=True)
            export(self.config, step, folder := Path(name, "model"))
            lm = language_model(self.config, folder)
            for task in tasks:
                with self._record_failures(step, [task]):
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
            with self._record_failures(step, [task]):
                print(f"step {step:>6}  {task}: running programs", flush=True)
                self._commit(step, task, score_programs(self.config, step, task), [])

    def _commit(self, step: int, task: str, scores: dict, problems: list[dict]) -> None:
        # Not written if this worker's lease expired and another worker wrote the result first.
        if eval_folder.write_result(
            eval_folder.homes(self.config, step)[0], step, task, scores, problems
        ):
            print(
                f"step {step:>6}  {task}: {scores['metric']} {scores['score']:.4f} "
                f"± {scores['stderr']:.4f}",
                flush=True,
            )


def score_programs(config: Config, step: int, task: str) -> dict:
    """Run and score the programs that were generated at a step.

    Args:
        config: The run's config.
        step: The step of the checkpoint.
        task: A key of CODE_TASKS.

    Returns:
        The content of evals/<step>/<task>.json.

    Raises:
        UserError: The problems or programs are missing or malformed, or this machine cannot
            isolate them.
    """
    task_config = config.evals.tasks[task]
    ks = [k for k in _KS if k <= task_config.repeats]
    results = score_generations(
        task,
        problems_file(config, task),
        generations_path(config, step, task),
        ks,
        config.evals.unsafe_code,
    )
    estimates = {f"pass@{k}": Estimate(**results.pop(f"pass@{k}")) for k in ks}
    return estimates["pass@1"].headline("pass@1") | {
        "decontaminated": decontaminated(config, task),
        "metrics": {
            name: {"value": estimate.value, "stderr": estimate.stderr}
            for name, estimate in estimates.items()
        },
        "programs": results,
        "settings": task_config.settings | {"seed": config.seed},
    }


def export_request(config: Config, step: int, folder: Path) -> ExportRequest:
    """Return the request to export a step.

    Args:
        config: The run's config.
        step: The step of the checkpoint; 0 for the base of the run.
        folder: Where the model is to be written.

    Raises:
        UserError: The base is missing or was changed.
    """
    run = config.run_dir
    if not step:
        start = eval_folder.start_of(config)
        base = base_of(start) if start else None
        assert base is not None, "step 0 is evaluated only where the run has a base"
        run = base.path
        step = base.step
    tokenizer = config.data.tokenizer
    return ExportRequest(run=str(run), folder=str(folder), step=step, tokenizer=tokenizer)


def export(config: Config, step: int, folder: Path) -> None:
    """Write a run's checkpoint in transformers' format, with adapters merged.

    Args:
        config: The run's config.
        step: The step of the checkpoint; 0 for the base of the run.
        folder: The folder to write.

    Raises:
        UserError: The export failed; the message is the export's.
    """
    request = export_request(config, step, folder)
    with tempfile.NamedTemporaryFile("r") as error_file:
        request = request.model_copy(update={"error_file": error_file.name})
        # In a separate process, so that all of its memory is freed afterwards.
        command = [sys.executable, "-m", "retemper.pipeline.huggingface", *request.arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last_lines = done.stderr.strip().splitlines()[-5:]
            raise UserError(error_file.read() or "\n".join(last_lines))


def generations_path(config: Config, step: int, task: str) -> Path:
    """Return the path of the programs generated at a step; their verdicts are stored next to it.

    Args:
        config: The run's config.
        step: The step of the checkpoint.
        task: A key of CODE_TASKS.
    """
    return eval_folder.generations_path(eval_folder.homes(config, step)[0], step, task)


def _folder(config: Config, step: int) -> Path:
    return eval_folder.task_path(eval_folder.homes(config, step)[0], step, "").parent
