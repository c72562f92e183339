"""Evaluations beside a run: any number of workers share its committed checkpoints, and each result counts once.

Two parts, which may run on different machines. generate: a checkpoint is exported, adapters merged, and its answers are written, by
vLLM where it is installed, else by transformers. score: generated programs are run in the sandbox. Both are jobs of a step, under leases.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from retemper.pipeline import run_folder
from retemper.pipeline.checkpoint import commit
from retemper.pipeline.data.corpus import decontaminated
from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.code_tasks import CODE_TASKS, problems_file
from retemper.pipeline.evals.generations import compress_records
from retemper.pipeline.evals.leases import lease, write_once
from retemper.pipeline.evals.score_code import score_generations
from retemper.pipeline.evals.uncertainty import Estimate
from retemper.pipeline.schema import Config
from retemper.pipeline.track import Tracker

PARTS = ("generate", "score")
_KS = (1, 10, 100)  # of pass@k, where there are as many samples


@dataclass(frozen=True)
class Worker:
    """One of a run's workers."""

    config: Config
    parts: tuple[str, ...]
    lease_seconds: float
    failed: dict[tuple[int, str], str] = field(default_factory=dict)  # step and part -> why

    def work(self, poll_seconds: float | None) -> None:
        """Evaluate what is there, and, unless poll_seconds is None, what is still to come until the run's last step has all its scores.

        Raises UserError at the end where something could not be evaluated.
        """
        while True:
            done = [self._attempt(step, part) for step in self._steps() for part in self.parts]
            if poll_seconds is None or self._is_over():
                break
            if not any(done):
                time.sleep(poll_seconds)
        if self.failed:
            listed = "\n".join(f"  - step {step}, {part}: {why}" for (step, part), why in self.failed.items())
            raise UserError(f"{self.config.run_dir} is not evaluated whole:\n{listed}")

    def _steps(self) -> list[int]:
        """Milestones with a checkpoint, and before the first step the model that the run began from."""
        committed = set(commit.committed_steps(self.config.run_dir))
        return [0] * bool(self.config.init_from) + [step for step in self.config.milestone_steps if step in committed]

    def _is_over(self) -> bool:
        jobs = [(step, part) for step in self._steps() for part in self.parts]
        complete = self.config.steps in commit.committed_steps(self.config.run_dir)
        if self.parts == ("score",):  # of the programs that others generate
            complete = complete and not any(self._missing(step, "generate") for step in self._steps())
        return complete and all(job in self.failed or not self._missing(*job) for job in jobs)

    def _attempt(self, step: int, part: str) -> bool:
        """Do one job, where there is something to do and nobody else does it. Returns whether it did."""
        if (step, part) in self.failed or not self._missing(step, part):
            return False
        with lease(_folder(self.config, step), part, self.lease_seconds) as taken:
            tasks = self._missing(step, part) if taken else []
            if not tasks:
                return False
            try:
                {"generate": self._generate, "score": self._score}[part](step, tasks)
            except (UserError, OSError) as error:
                self.failed[step, part] = str(error)
                print(f"step {step:>6}  {part}: {error}", file=sys.stderr, flush=True)
        return True

    def _missing(self, step: int, part: str) -> list[str]:
        """Tasks of which this part of the work is not done at a step."""
        scored, waiting = [], []
        for task in self.config.evals.of_workers:
            if task in CODE_TASKS and generations_path(self.config, step, task).exists():
                waiting.append(task)
            if run_folder.task_path(self.config.run_dir, step, task).exists():
                scored.append(task)
        if part == "score":
            return [task for task in waiting if task not in scored]
        return [task for task in self.config.evals.of_workers if task not in (*waiting, *scored)]

    def _generate(self, step: int, tasks: list[str]) -> None:
        from retemper.pipeline.evals.generate import complete_problems, language_model
        from retemper.pipeline.evals.harness import score_task

        for task in CODE_TASKS.keys() & set(tasks):
            problems_file(self.config, task)  # a file that is missing is said before a model is exported
        with tempfile.TemporaryDirectory(prefix="retemper-") as name:
            export(self.config, step, folder := Path(name, "model"))
            lm = language_model(self.config, folder)
            for task in tasks:
                print(f"step {step:>6}  {task}: generating", flush=True)
                if task in CODE_TASKS:
                    write_once(generations_path(self.config, step, task), complete_problems(self.config, task, lm))
                else:
                    self._commit(step, task, *score_task(task, self.config, lm))

    def _score(self, step: int, tasks: list[str]) -> None:
        for task in tasks:
            asked, generations = self.config.evals.tasks[task], generations_path(self.config, step, task)
            print(f"step {step:>6}  {task}: running programs", flush=True)
            ks = [k for k in _KS if k <= asked.repeats]
            scored = score_generations(task, problems_file(self.config, task), generations, ks, self.config.evals.unsafe_code)
            estimates = {f"pass@{k}": Estimate(**scored.pop(f"pass@{k}")) for k in ks}
            scores = estimates["pass@1"].headline("pass@1") | {
                "metrics": {name: {"value": estimate.value, "stderr": estimate.stderr} for name, estimate in estimates.items()},
                "programs": scored,
                "settings": asked.model_dump(mode="json") | {"seed": self.config.seed},
            }
            self._commit(step, task, scores, [])

    def _commit(self, step: int, task: str, scores: dict, problems: list[dict]) -> None:
        """Write a task's result, once, with what was said to each problem beside it, and mirror it."""
        path = run_folder.task_path(self.config.run_dir, step, task)
        if problems:
            write_once(path.with_suffix(".samples.jsonl.zst"), compress_records(problems))
        said = {"step": step, "decontaminated": decontaminated(self.config, task), "task": task} | scores
        if not write_once(path, json.dumps(said, indent=2).encode()):
            return  # this lease had expired, and its successor was faster
        print(f"step {step:>6}  {task}: {scores['metric']} {scores['score']:.4f} ± {scores['stderr']:.4f}", flush=True)
        tracker = Tracker(self.config)
        tracker.scores(step, {f"evals/{task}/{metric}": value["value"] for metric, value in scores["metrics"].items()})
        tracker.close()


def export(config: Config, step: int, folder: Path) -> None:
    """Write a run's checkpoint, or with step 0 the model that it began from, for transformers. Raises UserError."""
    options = {"run": str(config.run_dir) if step else config.init_from, "folder": str(folder), "step": step or None}
    options |= {"adapter": False, "base": None, "tokenizer": config.data.tokenizer}
    command = [sys.executable, "-m", "retemper.pipeline.huggingface", "export", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)  # a process of its own: what it held is free afterwards
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise UserError(next((line.removeprefix("error: ") for line in said if line.startswith("error: ")), "\n".join(said[-5:])))


def generations_path(config: Config, step: int, task: str) -> Path:
    """Where the programs of a step stand; their verdicts come beside it."""
    return _folder(config, step) / f"{task}.generations.jsonl.zst"


def _folder(config: Config, step: int) -> Path:
    return run_folder.task_path(config.run_dir, step, "").parent
