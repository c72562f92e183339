"""Commands whose spelling has changed: each is refused with the new one."""

from retemper.pipeline.errors import UserError

_EVAL_VERBS = ("run", "worker", "show")
_OPTIONS = {"launch": ("target",), "data": ("step", "samples")}


def refuse_old_spelling(words: list[str]) -> None:
    """Check that a command line has no spelling of an earlier version.

    Raises:
        UserError: It has; the message is the new spelling.
    """
    verb, *rest = words or [""]
    if verb == "evals":
        raise UserError(f"`retemper evals` is now: {_command('eval', *rest)}")
    if verb == "eval" and rest and not rest[0].startswith("-") and rest[0] not in _EVAL_VERBS:
        raise UserError(f"`retemper eval RUN` is now: {_command('eval', 'run', *rest)}")
    options = [f"{name}=" for name in _OPTIONS.get(verb, ())]
    old = [word for word in rest if word.startswith(tuple(options))] if options else []
    if old:
        new = [f"--{word.replace('=', ' ', 1)}" if word in old else word for word in rest]
        raise UserError(f"{old[0]} is now an option: {_command(verb, *new)}")
    if verb == "data" and len(rest) > 1 and "=" in rest[1]:
        raise UserError(
            f"`retemper data {rest[0]}` takes the folder of a run that has begun: "
            f"{_command(verb, rest[0], 'runs_dir/study/name', *rest[2:])}"
        )


def _command(*words: str) -> str:
    return " ".join(["retemper", *words])
