"""What the verbs have in common: their help, their positionals and the types of their options."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

KEYS = (
    "config keys as key=value, and presets as group=name with the groups run, model, data, "
    "method, parallel, optimizer, schedule and evals"
)

# The positional of a verb for an existing run.
RUN = {"run": "folder of the run, i.e. runs_dir/study/name"}


def add_verb(
    verbs: Any,
    name: str,
    function: Callable[[argparse.Namespace], int],
    summary: str,
    examples: list[str],
    *,
    positionals: dict[str, str] | None = None,
    keys: str | None = KEYS,
) -> argparse.ArgumentParser:
    """Add a verb to the parser.

    Args:
        verbs: The subparsers of argparse to add it to.
        name: Its name.
        function: Executes it and returns the exit code.
        summary: What it does.
        examples: Commands, shown by --help.
        positionals: The meaning of each positional argument, by name.
        keys: The meaning of its key=value arguments, or None for a verb without.

    Returns:
        The parser of the verb, for options of its own.
    """
    verb = add_group(verbs, name, summary, examples)
    verb.set_defaults(function=function)
    for positional, meaning in (positionals or {}).items():
        verb.add_argument(positional, metavar=positional.upper(), help=meaning)
    verb.add_argument(
        "--debug", action="store_true", help="print the full trace of an unexpected error"
    )
    if keys:
        verb.add_argument("keys", nargs="*", metavar="key=value", help=keys)
    return verb


def add_group(verbs: Any, name: str, summary: str, examples: list[str]) -> argparse.ArgumentParser:
    """Add a verb that only has verbs of its own, as `eval`."""
    return verbs.add_parser(
        name,
        help=summary,
        description=summary,
        epilog="\n".join(["examples:", *(f"  {example}" for example in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def announce_loading(what: str) -> None:
    """Print on stderr what is about to be imported, where that takes seconds."""
    print(f"loading {what} …", file=sys.stderr, flush=True)


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Return an argparse type that accepts numbers above zero."""

    def positive_number(text: str) -> float:
        if (number := kind(text)) <= 0:
            raise ValueError
        return number

    return positive_number


def add_gpus_per_node(verb: argparse.ArgumentParser) -> None:
    """Add the option --gpus-per-node."""
    verb.add_argument(
        "--gpus-per-node",
        type=positive(int),
        metavar="N",
        default=8,
        help="GPUs per node (default: 8)",
    )
