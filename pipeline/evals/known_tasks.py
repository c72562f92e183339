"""Check the names of tasks and their folder before a run starts, without importing lm-eval."""

import functools
import re
from importlib.util import find_spec
from pathlib import Path

from retemper.pipeline.errors import UserError, nearest
from retemper.pipeline.schema.evals import TASKS_WITH_FILES, EvalsConfig

_NAME = re.compile(rb"^[ \t-]*[\"']?task[\"']?[ \t]*:[ \t]*[\"']?([^\s\"'#]+)", re.MULTILINE)


def check_tasks(evals: EvalsConfig) -> None:
    """Check that lm-eval has every task, and that the folder of tasks' files exists.

    Raises:
        UserError: a name is unknown, or the folder is missing and the run itself needs it.
    """
    if evals.inline_tasks and evals.tasks_dir and not Path(evals.tasks_dir).is_dir():
        raise UserError(
            f"evals.tasks_dir={evals.tasks_dir} is no folder: correct it, or leave it out to "
            "download the tasks' datasets"
        )
    unknown = [name for name in evals.tasks if name not in TASKS_WITH_FILES]
    for name in unknown if unknown and find_spec("lm_eval") else ():
        if name not in _names_in_lm_eval():
            names = [*TASKS_WITH_FILES, *sorted(_names_in_lm_eval())]
            raise UserError(
                f"evals.tasks.{name}: lm-eval has no task with that name{nearest(name, names)}"
            )


@functools.cache
def _names_in_lm_eval() -> set[str]:
    """Return the names in lm-eval's definitions; to parse them all would take half a minute."""
    spec = find_spec("lm_eval")
    assert spec and spec.submodule_search_locations, "check_tasks has found it"
    (folder,) = spec.submodule_search_locations
    texts = (path.read_bytes() for path in Path(folder, "tasks").rglob("*.yaml"))
    return {name.decode() for text in texts for name in _NAME.findall(text)}
