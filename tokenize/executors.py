"""Execution of a job's stages: on this machine, as Slurm arrays, or on a Ray cluster.

Each way uses an executor of datatrove.
"""

import copy
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.data import CorpusConfig
from retemper.tokenize import job_folder
from retemper.tokenize.leftovers import name_after
from retemper.tokenize.progress import (
    PROCESSES,
    Counters,
    progress_bar,
    shared_counters,
    use_counters,
)


@dataclass(frozen=True)
class Stage:
    """Steps that each of `tasks` tasks runs; the next stage begins when all tasks are done."""

    name: str
    steps: list[PipelineStep]
    tasks: int


def run_stages(stages: list[Stage], data: CorpusConfig, work: Path, *, progress: bool) -> bool:
    """Run the stages, or submit them to Slurm.

    Args:
        stages: The stages, in order.
        data: The corpus config; data.executor selects where the stages run.
        work: The job's folder.
        progress: Whether to show progress bars; only local runs have them.

    Returns:
        Whether the stages are done; False if they were submitted.

    Raises:
        UserError: A task failed, or Slurm refused the job.
    """
    # The logs of an earlier attempt are removed: their records of finished tasks are outdated.
    shutil.rmtree(work / "logs", ignore_errors=True)
    run: Callable[[list[Stage], CorpusConfig, Path, bool], bool] = {
        "local": _run_local,
        "ray": _run_ray,
        "slurm": _submit_slurm,
    }[data.executor]
    return run(stages, data, work, progress)


class _LocalExecutor(LocalPipelineExecutor):
    """datatrove's local executor on a pool that notices when a worker is killed.

    datatrove's own multiprocessing.Pool waits forever for a killed worker.
    """

    def __init__(self, stage: Stage, workers: int, logging_dir: str, progress: bool):
        super().__init__(
            stage.steps,
            tasks=stage.tasks,
            workers=workers,
            logging_dir=logging_dir,
            skip_completed=False,
        )
        self.name = stage.name
        self.progress = progress

    def run(self) -> None:
        counters = shared_counters()
        with progress_bar(self.name, self.tasks, counters, show=self.progress) as advance:
            if self.workers == 1:
                use_counters(counters)
                for rank in range(self.tasks):
                    # A copy, because every task needs steps with fresh counts.
                    copy.deepcopy(self)._run_for_rank(rank)
                    advance()
                use_counters(None)
            else:
                self._run_pool(counters, advance)

    def _run_pool(self, counters: Counters, advance: Callable[[], None]) -> None:
        pool = ProcessPoolExecutor(
            self.workers, PROCESSES, initializer=_start_worker, initargs=(counters,)
        )
        try:
            waiting = {
                pool.submit(self._run_for_rank, rank, rank + 1) for rank in range(self.tasks)
            }
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for task in finished:
                    task.result()
                    advance()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps because memory ran out: run the same command "
                "again to resume from what is finished; fewer data.tasks need less memory"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(counters: Counters) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process already
    use_counters(counters)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "the main process has no parent to end with"
    parent.join()
    os._exit(1)  # a surviving worker would interfere with the job when it is started again


def _workers(data: CorpusConfig, stage: Stage) -> int:
    return min(data.tasks or len(os.sched_getaffinity(0)), stage.tasks)


def _run_local(stages: list[Stage], data: CorpusConfig, work: Path, progress: bool) -> bool:
    # The workers' imports take longer than all the work on a single part.
    one_process = stages[0].tasks == 1
    if not one_process:
        name_after(work)
    for stage in stages:
        workers = 1 if one_process else _workers(data, stage)
        _LocalExecutor(stage, workers, str(work / "logs" / stage.name), progress).run()
    return True


def _run_ray(stages: list[Stage], data: CorpusConfig, work: Path, progress: bool) -> bool:
    try:
        import ray
    except ImportError:
        raise UserError("data.executor=ray needs Ray: pip install 'retemper[ray]'") from None
    from datatrove.executor.ray import RayPipelineExecutor

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    for stage in stages:
        workers = data.tasks or int(ray.cluster_resources()["CPU"])
        logs = work / "logs" / stage.name
        executor = RayPipelineExecutor(
            stage.steps,
            tasks=stage.tasks,
            workers=min(workers, stage.tasks),
            logging_dir=str(logs),
            skip_completed=False,
        )
        executor.run()
        # datatrove only logs failed tasks.
        if failed := executor.get_incomplete_ranks(skip_completed=True):
            raise UserError(
                job_folder.pop_error(work)
                or f"{len(failed)} of {stage.tasks} tasks of stage {stage.name} failed: see {logs}"
            )
    return True


def _submit_slurm(stages: list[Stage], data: CorpusConfig, work: Path, progress: bool) -> bool:
    from datatrove.executor import SlurmPipelineExecutor

    slurm = data.slurm
    assert slurm is not None, "data.executor=slurm requires data.slurm"
    executors: list[SlurmPipelineExecutor] = []
    for stage in stages:
        executor = SlurmPipelineExecutor(
            stage.steps,
            tasks=stage.tasks,
            workers=data.tasks or -1,
            partition=slurm.partition,
            time=slurm.time,
            mem_per_cpu_gb=slurm.mem_per_cpu_gb,
            qos="",
            job_name=f"{data.name}-{stage.name}",
            env_command=f'export PATH="{Path(sys.executable).parent}:$PATH"',
            # Otherwise a stage would wait forever after the previous stage failed.
            sbatch_args={"kill-on-invalid-dep": "yes"} | slurm.sbatch_args,
            logging_dir=str(work.resolve() / "logs" / stage.name),
            skip_completed=False,
            depends=executors[-1] if executors else None,
        )
        executors.append(executor)
    try:
        executors[-1].run()
    except subprocess.CalledProcessError:
        raise UserError(
            "sbatch refused the job for the reason above: correct data.slurm, "
            "then run the same command again"
        ) from None
    return False


def refuse_queued(data: CorpusConfig, work: Path) -> None:
    """Refuse to start a job that Slurm has queued or is running, or whose last attempt failed.

    The failure of an attempt is reported once: the next call continues.

    Raises:
        UserError: The job is queued or running, its last attempt failed, or squeue failed.
    """
    try:
        queued = subprocess.run(
            ["squeue", "--me", "-h", "-o", "%i %j %T"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except FileNotFoundError:
        raise UserError(
            "data.executor=slurm, but this machine has no squeue: "
            "run the command where jobs are submitted"
        ) from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"squeue failed ({error.stderr.strip()}): is the cluster up?") from None
    if mine := [line for line in queued if line.split()[1].startswith(f"{data.name}-")]:
        raise UserError(
            "\n".join(["this job is already queued or running; wait for it, or cancel it:", *mine])
        )
    if reason := job_folder.pop_error(work):
        raise UserError(
            f"the job stopped: {reason}\n"
            "When that is fixed, run the same command again to resume from what is finished"
        )
