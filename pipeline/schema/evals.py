"""The config keys of the evaluations at each milestone."""

from typing import Annotated, Any, Literal

from pydantic import Field

from retemper.pipeline.schema.section import Name, PositiveInt, Section

# Tasks that can be read from evals.tasks_dir.
TASKS_WITH_FILES = (
    "hellaswag",
    "arc_challenge",
    "winogrande",
    "gsm8k",
    "humaneval",
    "mbpp",
)


class TaskConfig(Section):
    """The settings of one lm-eval task; where a value is null, the task's default applies."""

    where: Literal["inline", "worker"] = "inline"
    """inline: evaluated by the run itself at its milestones; worker: evaluated by separate
    worker processes from committed checkpoints."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Number of solved examples before each problem."""
    limit: PositiveInt | None = None
    """Number of problems; the selection is the same for every run. null uses all problems."""
    repeats: PositiveInt = 1
    """Number of answers generated per problem."""
    temperature: float | None = Field(None, ge=0)
    """Sampling temperature; 0 is greedy decoding."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Nucleus sampling: sample from the smallest set of tokens with this total probability."""
    max_new_tokens: PositiveInt | None = None
    """Maximum number of tokens of one answer."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings on which scores depend."""
        return self.model_dump(mode="json", exclude={"where"})

    @property
    def generation(self) -> dict[str, Any]:
        """The generation settings that override the task's defaults, by lm-eval's names."""
        settings = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_gen_toks": self.max_new_tokens,
        }
        settings |= {"do_sample": None if self.temperature is None else self.temperature > 0}
        return {name: value for name, value in settings.items() if value is not None}


class EvalsConfig(Section):
    """The evaluations at each milestone."""

    heldout: dict[Name, str] = Field(default={})
    """Domain name -> folder of token shards, on which bits per byte are measured."""
    learned: list[Name] | None = None
    """Domains on which learning is measured; all others measure forgetting. By default the
    domains of data.name and data.mixture, matched by folder or name."""
    max_samples: PositiveInt = 512
    """Maximum number of held-out samples read per domain."""
    micro_batch_size: PositiveInt = 16
    """Samples per forward pass of one rank during evaluation."""
    tasks: dict[Name, TaskConfig] = Field(default={})
    """Tasks to evaluate, by their names in lm-eval."""
    tasks_dir: str | None = None
    """Folder with the tasks' files, read instead of the hub's datasets."""

    unsafe_code: bool = False
    """Where no complete sandbox is available, run generated programs with the layers that are, or
    with none: they may have all permissions of this user."""

    @property
    def inline_tasks(self) -> list[str]:
        """The tasks that the run itself evaluates."""
        return [name for name, task in self.tasks.items() if task.where == "inline"]

    @property
    def worker_tasks(self) -> list[str]:
        """The tasks that workers evaluate."""
        return [name for name, task in self.tasks.items() if task.where == "worker"]
