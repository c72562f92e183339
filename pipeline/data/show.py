"""The samples of a step as text, with the source of each document and the loss mask."""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import TypedDict

import numpy as np

from retemper.pipeline.corpus.format import split_number
from retemper.pipeline.corpus.manifest import SOURCES, read_verified
from retemper.pipeline.corpus.tokenizer import Tokenizer
from retemper.pipeline.data.loss_mask import lengths_and_loss_mask
from retemper.pipeline.data.mds import Samples
from retemper.pipeline.data.open_streams import Streams
from retemper.pipeline.data.shards import BadShard, TokenShards
from retemper.pipeline.errors import UserError
from retemper.pipeline.files import store
from retemper.pipeline.files.json_file import parse_json, with_other_keys
from retemper.pipeline.schema.run import Config

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # would let documents control the terminal


def show_step(
    config: Config, began_at: int, step: int, samples: int, *, colours: bool
) -> Iterator[str]:
    """Yield the first samples of a step as lines for the terminal.

    Tokens without loss are dim, or enclosed in ⟦ ⟧ without colours.

    Args:
        config: the run's config.
        began_at: samples consumed before the data of `config` was introduced.
        step: number of the step, counted from 1.
        samples: number of samples to show.
        colours: whether the terminal supports colours.

    Raises:
        UserError: for a step that does not exist, or that read other data; for a bad shard, unless
            the run skips its samples.
    """
    if step > config.steps:
        raise UserError(f"--step {step}: the run has {config.steps} steps")
    consumed = (step - 1) * config.train.global_batch_size - began_at
    if step < 1 or consumed < 0:
        raise UserError(
            f"--step {step}: this data is only read from "
            f"step {began_at // config.train.global_batch_size + 1} on"
        )
    from retemper.pipeline.corpus.tokenizer import Tokenizer

    streams = Streams(config)
    tokenizer = Tokenizer(config.data.tokenizer)
    sources = {name: _sources(shards) for name, shards in streams.shards.items()}
    ids = streams.order.batch(consumed, config.train.global_batch_size)[:samples]
    locations = {
        row: (name, number)
        for name, located in streams.locate(ids).items()
        for row, number in zip(*located, strict=True)
    }
    for row, id in enumerate(ids):
        name, number = locations[row]
        shards = streams.shards[name]
        [shard] = shards.shards_of(np.array([number]))
        heading = f"── step {step} · sample {id} · {name} {number}, shard {shard} · "
        try:
            sample = shards.samples(np.array([number]))
        except BadShard as error:
            if config.data.bad_shards == "stop":
                raise
            yield f"{heading}skipped: {error}"
            continue
        _, loss_mask = lengths_and_loss_mask(sample, mask_documents=config.data.mask_documents)
        loss_mask_T = loss_mask[:-1].astype(bool)
        padding = len(loss_mask_T) - int(sample.values("lengths").sum())
        yield (
            f"{heading}{int(loss_mask_T.sum())} of {len(loss_mask_T)} tokens with loss"
            + (f", {padding} padding" if padding else "")
        )
        for document, tokens_T, counts_T in _pieces(sample, loss_mask_T):
            source = sources[name](document)
            yield f"▸ document {document:#018x}, {source}, {len(tokens_T)} tokens"
            yield "".join(_marked(tokenizer, tokens_T, counts_T, colours=colours))


@with_other_keys
class _Source(TypedDict):
    path: str


def _sources(shards: TokenShards) -> Callable[[np.uint64], str]:
    """Return a function from a document's number to file:position, by the corpus's sources."""
    # Corpora of earlier versions have no hash of their sources.
    content = (
        read_verified(shards.path, shards.manifest, SOURCES)
        if SOURCES in shards.manifest["files"]
        else store.read(f"{shards.path}/{SOURCES}")
    )
    try:
        files = [parse_json(line, _Source)["path"] for line in content.splitlines()]
    except ValueError as error:
        raise _damaged_sources(shards, str(error)) from None

    def source(document: np.uint64) -> str:
        file, position = split_number(int(document))
        if file >= len(files):
            raise _damaged_sources(shards, f"it has {len(files)} lines, too few")
        return f"{files[file]}:{position}"

    return source


def _damaged_sources(shards: TokenShards, reason: str) -> UserError:
    return UserError(
        f"{shards.path}/{SOURCES} is damaged ({reason}): restore it from a copy, "
        "or tokenize again to another data.path"
    )


def _pieces(
    sample: Samples, loss_mask_T: np.ndarray
) -> Iterator[tuple[np.uint64, np.ndarray, np.ndarray]]:
    lengths = sample.values("lengths")
    ends = np.cumsum(lengths, dtype=np.int64)
    for document, start, end in zip(sample.values("documents"), ends - lengths, ends, strict=True):
        yield document, sample.tokens[start:end], loss_mask_T[start:end]


def _marked(
    tokenizer: Tokenizer, tokens_T: np.ndarray, counts_T: np.ndarray, *, colours: bool
) -> Iterator[str]:
    before, after = ("\x1b[2m", "\x1b[0m") if colours else ("⟦", "⟧")
    for counts, run in itertools.groupby(
        zip(tokens_T.tolist(), counts_T.tolist(), strict=True), key=lambda pair: pair[1]
    ):
        text = tokenizer.backend.decode([token for token, _ in run], skip_special_tokens=False)
        text = _CONTROLS.sub(lambda control: repr(control[0])[1:-1], text)
        yield text if counts else f"{before}{text}{after}"
