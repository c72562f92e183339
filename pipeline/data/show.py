"""The samples of a step as text: where each document comes from, and which tokens count in the loss."""

import itertools
import json
import re
from collections.abc import Iterator

import numpy as np

from retemper.pipeline.corpus.format import split_number
from retemper.pipeline.data.batch import learned_tokens
from retemper.pipeline.data.mds import Samples
from retemper.pipeline.data.reader import Streams
from retemper.pipeline.errors import UserError
from retemper.pipeline.files import store
from retemper.pipeline.schema.run import Config

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a document must not steer the terminal


def show_step(
    config: Config, began_at: int, step: int, samples: int, *, colours: bool
) -> Iterator[str]:
    """Lines for the terminal: the first `samples` samples of the step numbered `step`, counted from 1.

    What has no loss is dim, or without colours in ⟦ ⟧. began_at: samples consumed before the data of `config` came in.
    """
    if step > config.steps:
        raise UserError(f"step={step}: the run has {config.steps} steps")
    consumed = (step - 1) * config.train.global_batch_size - began_at
    if step < 1 or consumed < 0:
        raise UserError(
            f"step={step}: this data is read from step {began_at // config.train.global_batch_size + 1} on"
        )
    from retemper.pipeline.corpus.tokenizer import Tokenizer

    streams = Streams(config)
    tokenizer = Tokenizer(config.data.tokenizer)
    sources = {name: _sources(shards.path) for name, shards in streams.shards.items()}
    ids = streams.order.batch(consumed, config.train.global_batch_size)[:samples]
    places = {
        row: (name, number)
        for name, found in streams.located(ids).items()
        for row, number in zip(*found, strict=True)
    }
    for row, id in enumerate(ids):
        name, number = places[row]
        shards = streams.shards[name]
        sample = shards.samples(np.array([number]))
        [shard] = shards.shards_of(np.array([number]))
        counted_T = learned_tokens(sample, mask_documents=config.data.mask_documents)[1][
            :-1
        ].astype(bool)
        padding = len(counted_T) - int(sample.values("lengths").sum())
        yield (
            f"── step {step} · sample {id} · {name} {number}, shard {shard} · {int(counted_T.sum())} of {len(counted_T)} tokens with loss"
            + (f", {padding} padding" if padding else "")
        )
        for document, tokens_T, counts_T in _pieces(sample, counted_T):
            yield f"▸ document {document:#018x}, {sources[name](document)}, {len(tokens_T)} tokens"
            yield "".join(_marked(tokenizer, tokens_T, counts_T, colours=colours))


def _sources(path: str):
    """document -> file:position, from the corpus's list of sources."""
    files = [json.loads(line)["path"] for line in store.read(f"{path}/sources.jsonl").splitlines()]

    def source(document: np.uint64) -> str:
        file, position = split_number(int(document))
        return f"{files[file]}:{position}"

    return source


def _pieces(
    sample: Samples, counted_T: np.ndarray
) -> Iterator[tuple[np.uint64, np.ndarray, np.ndarray]]:
    lengths = sample.values("lengths")
    ends = np.cumsum(lengths, dtype=np.int64)
    for document, start, end in zip(sample.values("documents"), ends - lengths, ends, strict=True):
        yield document, sample.tokens[start:end], counted_T[start:end]


def _marked(
    tokenizer, tokens_T: np.ndarray, counts_T: np.ndarray, *, colours: bool
) -> Iterator[str]:
    before, after = ("\x1b[2m", "\x1b[0m") if colours else ("⟦", "⟧")
    for counts, run in itertools.groupby(
        zip(tokens_T.tolist(), counts_T.tolist(), strict=True), key=lambda pair: pair[1]
    ):
        text = tokenizer.backend.decode([token for token, _ in run], skip_special_tokens=False)
        text = _CONTROLS.sub(lambda control: repr(control[0])[1:-1], text)
        yield text if counts else f"{before}{text}{after}"
