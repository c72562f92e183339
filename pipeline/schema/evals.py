"""The keys of what is measured at each milestone."""

from typing import Annotated, Any, Literal

from pydantic import Field

from retemper.pipeline.schema.section import Name, PositiveInt, Section

TASKS_WITH_FILES = (
    "hellaswag",
    "arc_challenge",
    "winogrande",
    "gsm8k",
    "humaneval",
    "mbpp",
)  # that can be read from evals.tasks_dir


class TaskConfig(Section):
    """How a task of lm-eval is run; what is null is as the task itself has it."""

    where: Literal["inline", "worker"] = Field(
        "inline",
        description="inline: by the run itself, at its milestones; worker: by others, from committed checkpoints",
    )
    shots: Annotated[int, Field(ge=0)] | None = Field(
        None, description="solved examples before each problem"
    )
    limit: PositiveInt | None = Field(
        None, description="problems, a choice that is the same for every run; null: all of them"
    )
    repeats: PositiveInt = Field(1, description="answers to each problem")
    temperature: float | None = Field(
        None, ge=0, description="of generated text; 0 takes the likeliest token"
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="tokens are drawn from the least set that holds this share"
    )
    max_new_tokens: PositiveInt | None = Field(None, description="of one answer")

    @property
    def settings(self) -> dict[str, Any]:
        """What scores depend on."""
        return self.model_dump(mode="json", exclude={"where"})

    @property
    def generation(self) -> dict[str, Any]:
        """The settings of generation that are not the task's own, as lm-eval names them."""
        settings = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_gen_toks": self.max_new_tokens,
        }
        settings |= {"do_sample": None if self.temperature is None else self.temperature > 0}
        return {name: value for name, value in settings.items() if value is not None}


class EvalsConfig(Section):
    """What is measured at each milestone."""

    heldout: dict[Name, str] = Field(
        default={}, description="domain name -> token-shard folder, for bits per byte"
    )
    learned: list[Name] | None = Field(
        None,
        description="the domains on which learning is measured, the others measure forgetting; "
        "by default those of data.name and data.mixture, known by folder or name",
    )
    max_samples: PositiveInt = Field(512, description="held-out samples read per domain")
    micro_batch_size: PositiveInt = 16
    tasks: dict[Name, TaskConfig] = Field(default={}, description="tasks by lm-eval's names")
    tasks_dir: str | None = Field(
        None, description="folder of the tasks' files, read instead of the hub's datasets"
    )

    unsafe_code: bool = Field(
        False,
        description="run generated programs where no sandbox can be had, with all that this user may do",
    )

    @property
    def inline(self) -> list[str]:
        """The tasks that the run itself scores."""
        return [name for name, task in self.tasks.items() if task.where == "inline"]

    @property
    def of_workers(self) -> list[str]:
        """The tasks that workers score."""
        return [name for name, task in self.tasks.items() if task.where == "worker"]
