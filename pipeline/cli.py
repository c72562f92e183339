"""The command `retemper`.

Heavy imports happen inside the verb that needs them, so that --help answers at once.
"""

import argparse
import os
import shlex
import sys
from typing import NoReturn

from retemper.pipeline.commands import corpora, evaluation, models, training
from retemper.pipeline.commands.old_spellings import refuse_old_spelling
from retemper.pipeline.distributed.unexpected import DEBUG, report_unexpected
from retemper.pipeline.errors import UserError, masked
from retemper.pipeline.files.credentials import refuse_credentials


def main(argv: list[str] | None = None) -> int:
    """Run one command of `retemper`.

    Args:
        argv: Arguments without the program's name; by default those of the process.

    Returns:
        The exit code: 0, 1 for bad input or a failed run, 130 after Ctrl-C.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        arguments = parse(words)
        if arguments.debug:
            os.environ[DEBUG] = "1"
        return arguments.function(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; to continue: {shlex.join(['retemper', *words])}", file=sys.stderr)
        return 130
    except OSError as error:
        file = f": {error.filename}" if error.filename else ""
        message = masked(f"{error.strerror or error}{file}")
        print(f"error: {message}; completed work is kept", file=sys.stderr)
        return 1


def parse(words: list[str]) -> argparse.Namespace:
    """Parse a command line.

    Raises:
        UserError: It has a credential, a spelling of an earlier version, or an option for a
            config key.
        SystemExit: argparse refused it, or printed help or version.
    """
    refuse_credentials(words)
    refuse_old_spelling(words)
    parser = _parser()
    arguments, rest = parser.parse_known_args(words)
    # argparse accepts positionals in one run only: key=value after an option comes back as unknown.
    keys = [word for word in rest if not word.startswith("-")]
    if keys != rest and hasattr(arguments, "keys"):
        _refuse_options(words, rest)
    if keys != rest or (rest and not hasattr(arguments, "keys")):
        hint = " (`retemper config --docs` lists the config keys, written as key=value)"
        parser.error(
            f"unrecognized arguments: {' '.join(rest)}{hint if hasattr(arguments, 'keys') else ''}"
        )
    if rest:
        arguments.keys += rest
    return arguments


def _refuse_options(words: list[str], unknown: list[str]) -> None:
    """Refuse an option that is a config key, as --lr 3.

    Raises:
        UserError: The message has the key and value to write.
    """
    from retemper.pipeline.config.key_docs import key_of_option

    option = next(word for word in unknown if word.startswith("-"))
    name, separator, value = option.partition("=")
    if key := key_of_option(name):
        following = words[words.index(option) + 1 :]
        value = value if separator else next(iter(following), "…")
        raise UserError(f"{name} is a config key, which is written without dashes: {key}={value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retemper",
        description=(
            "Continue the pretraining of a language model, by LoRA or in full, "
            "and measure what it learned and forgot."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="print the version")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for group in (training, corpora, models, evaluation):
        group.add_to(verbs)
    return parser


class _Version(argparse.Action):
    """Print the version; the package's metadata is read only then."""

    def __init__(self, option_strings: list[str], dest: str, help: str):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import version

        print(f"retemper {version('retemper')}")
        parser.exit()


def run() -> NoReturn:
    """Execute the command line of this process, and exit."""
    try:
        code = main()
    except Exception as error:
        print(f"error: {report_unexpected(error)}", file=sys.stderr)
        code = 1
    if "megatron" in sys.modules:
        from retemper.pipeline.distributed.exit import exit_without_teardown

        exit_without_teardown(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
