"""The verbs for corpora: tokenize and data."""

import argparse
import sys
from pathlib import Path
from typing import Any

from retemper.pipeline.commands.options import RUN, add_group, add_verb, positive

_LOCATIONS = "current locations of the run's files: data.path, data.tokenizer, data.replay.path"


def add_to(verbs: Any) -> None:
    """Add the verbs of this file to the parser."""
    add_verb(
        verbs,
        "tokenize",
        _tokenize,
        "Turn documents into token shards: cleaned, deduplicated, packed. "
        "After a stop, the same command resumes.",
        [
            "retemper tokenize data=local data.source.path=docs/ data.tokenizer=llama/ "
            "data.path=shards/docs data.seq_length=4096",
            "retemper tokenize data=openwebmath data.path=s3://bucket/openwebmath data.tokens=8B",
            "retemper tokenize data=starcoder_python data.path=/shared/starcoder "
            "data.executor=slurm data.slurm.partition=cpu",
        ],
    )
    shows = "retemper data show runs/demo/full --step 12 --samples 2"
    verifies = "retemper data verify runs/mine/lora"
    data = add_group(
        verbs, "data", "Show or verify the samples that a run trains on.", [shows, verifies]
    ).add_subparsers(required=True, metavar="VERB")
    show = add_verb(
        data,
        "show",
        _show,
        "Print the text of a step's samples, with its sources and the loss mask.",
        [shows],
        positionals=RUN,
        keys=_LOCATIONS,
    )
    show.add_argument("--step", type=int, required=True, help="step, counted from 1")
    show.add_argument(
        "--samples", type=positive(int), default=4, metavar="N", help="samples (default: 4)"
    )
    add_verb(
        data,
        "verify",
        _verify,
        "Prove from the ledger (data.ledger=true) that no sample was skipped or repeated.",
        [verifies],
        positionals=RUN,
        keys=_LOCATIONS,
    )


def _tokenize(arguments: argparse.Namespace) -> int:
    from retemper.pipeline.config.compose import load_data_config
    from retemper.tokenize.job import tokenize

    data = load_data_config(arguments.keys)
    manifest = tokenize(data)
    if manifest is None:
        print(
            "Submitted to Slurm (see `squeue --me`). "
            "Run the same command again to check the result or to resume."
        )
    else:
        print("\n".join(_described(data.path, manifest)))
    return 0


def _described(path: str, manifest: dict) -> list[str]:
    """Return the lines that say what a finished corpus contains."""
    from retemper.pipeline.corpus.manifest import describe_near_duplicates

    lines = [
        f"{path}/{split}: {counts['samples']:,} samples, {counts['tokens']:,} tokens "
        f"from {counts['documents']:,} documents "
        f"({counts['padding_fraction']:.2%} padding, "
        f"{counts['cut_documents_fraction']:.1%} of the documents cut)"
        for split, counts in manifest["splits"].items()
    ]
    dropped = ", ".join(
        f"{count:,} {reason.replace('_', ' ')}" for reason, count in manifest["dropped"].items()
    )
    lines.append(f"{manifest['documents_read']:,} documents read; dropped: {dropped or 'none'}")
    if marks := manifest.get("repository_marks"):
        lines.append(
            f"{marks['documents']:,} documents began with marks of StarCoder's data "
            f"(data.clean.repository_marks={marks['action']})"
        )
    lines += filter(None, [describe_near_duplicates(manifest)])
    reason = manifest["encoder"].get("reason")
    lines.append(f"encoded by {manifest['encoder']['name']}{f': {reason}' if reason else ''}")
    return lines + [
        f"damaged: {file['file']} ({file['error']}; {file['records_read']:,} records read)"
        for file in manifest["broken_files"]
    ]


def _show(arguments: argparse.Namespace) -> int:
    from retemper.pipeline.data.show import show_step

    config, began_at = _run_with_data(arguments)
    colours = sys.stdout.isatty()
    for line in show_step(config, began_at, arguments.step, arguments.samples, colours=colours):
        print(line)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from retemper.pipeline.data.ledger import verify

    print(verify(*_run_with_data(arguments)))
    return 0


def _run_with_data(arguments: argparse.Namespace):
    """Return the config of a run, whose corpora are checked, and where its data began."""
    from retemper.pipeline.checkpoint.state import newest_state
    from retemper.pipeline.config.existing_run import DATA_LOCATIONS, load_run
    from retemper.pipeline.data.streams import check_corpora

    config = load_run(Path(arguments.run), arguments.keys, DATA_LOCATIONS)
    check_corpora(config)
    return config, newest_state(config.run_dir).data_began_at
