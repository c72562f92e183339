"""The demo: the whole pipeline at a small scale.

It goes from documents, tokenizer and shards through a base model with full and LoRA continuations
to a report.
"""

import time
from pathlib import Path

from retemper.launch.local import run_here
from retemper.pipeline.checkpoint.commit import committed_steps, folder_of, sealed_meta
from retemper.pipeline.config.compose import load_config
from retemper.pipeline.entry.preflight import preflight
from retemper.pipeline.report.page import report
from retemper.pipeline.runs import eval_folder, run_folder
from retemper.pipeline.schema.run import Config

# The tokenizer is trained on every eighth file of each corpus.
_SAMPLED_PART = 8


def run_demo(overrides: list[str]) -> int:
    """Run or continue the demo; every finished stage is kept.

    Returns:
        The exit code.
    """
    started = time.perf_counter()
    commands = {name: [f"run=demo_{name}", *overrides] for name in ("base", "full", "lora")}
    runs = {name: load_config(command) for name, command in commands.items()}
    for config in runs.values():
        run_folder.check_resumable(config)
    _prepare_data([runs["base"], runs["full"]])
    for name, config in runs.items():
        if _finished(config):
            print(f"{name}: finished before ({config.run_dir})")
            continue
        _stage(
            f"{name}: {config.steps} steps on {config.data.name}, "
            f"{config.parallel.world_size} ranks"
        )
        preflight(config)
        if code := run_here("retemper.pipeline.train", commands[name], config.parallel.world_size):
            return code
    summary = report(runs["base"].run_dir.parent)
    print(f"\n{summary}  ({time.perf_counter() - started:.0f} s)")
    return 0


def _prepare_data(runs: list[Config]) -> None:
    from retemper.tokenize.job import tokenize

    if not Path(runs[0].data.tokenizer, "tokenizer.json").is_file():
        _stage(f"tokenizer: byte-level BPE of {runs[0].model.vocab_size} tokens")
        _train_tokenizer(runs)
    for config in runs:
        if not Path(config.data.path, "manifest.json").is_file():
            _stage(f"shards: {config.data.name} documents from {config.data.source.path}")
        tokenize(config.data)


def _train_tokenizer(runs: list[Config]) -> None:
    from retemper.pipeline.corpus.format import TRAIN
    from retemper.pipeline.corpus.tokenizer import train_tokenizer
    from retemper.tokenize.identify import split_of
    from retemper.tokenize.sources import read_documents

    texts = (
        document.text
        for config in runs
        for document in read_documents(config.data.source, every=_SAMPLED_PART)
        if split_of(document.text, config.data.heldout_fraction) == TRAIN
    )
    train_tokenizer(texts, runs[0].model.vocab_size, Path(runs[0].data.tokenizer))


def _finished(config: Config) -> bool:
    """Return whether the run is complete and up to date.

    Its last checkpoint must be committed, scored, and made from the present data and base.
    """
    if config.steps not in committed_steps(
        config.run_dir
    ) or config.steps not in eval_folder.read_scores(config.run_dir):
        return False
    meta = sealed_meta(folder_of(config.run_dir, config.steps))
    return meta["fingerprints"] == preflight(config)


def _stage(text: str) -> None:
    print(f"── {text}", flush=True)
