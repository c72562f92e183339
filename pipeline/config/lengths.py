"""Lengths in epochs or as fractions of a run, converted to tokens when a config is composed."""

import re
from fractions import Fraction
from functools import partial
from typing import Any, TypeGuard

from retemper.pipeline.config.validate import check_data
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.data import DataConfig
from retemper.pipeline.schema.section import parse_tokens

_EPOCHS = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*ep\s*")


def in_tokens(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a composed config whose lengths are in tokens.

    train.epochs becomes train.tokens, schedule.warmup_fraction becomes schedule.warmup_tokens, and
    "2ep" among checkpoint.milestones or train.branches the tokens of two epochs. An epoch is one of
    the run's own corpus; with a mixture, until all of its samples were read. The original keys stay
    beside the new ones.

    Values of the wrong type are left to the schema.

    Raises:
        UserError: Both forms of a length are set, or the corpus is not there to count its samples.
    """
    train = dict(raw["train"])
    schedule = dict(raw["schedule"])
    checkpoint = dict(raw["checkpoint"])
    tokens_of = partial(_tokens_of, raw)
    if _is_number(epochs := train.get("epochs")):
        if train.get("tokens") is not None:
            raise UserError(
                f"train.tokens={train['tokens']} and train.epochs={epochs} are both set: "
                "set one of them to null"
            )
        train["tokens"] = tokens_of(epochs)
    if _is_number(fraction := schedule.get("warmup_fraction")):
        if schedule.get("warmup_tokens"):
            raise UserError(
                f"schedule.warmup_tokens={schedule['warmup_tokens']} and "
                f"schedule.warmup_fraction={fraction} are both set: "
                "set schedule.warmup_tokens=0 or schedule.warmup_fraction=null"
            )
        schedule["warmup_tokens"] = _fraction_of(fraction, train.get("tokens"))
    for section, key in ((train, "branches"), (checkpoint, "milestones")):
        if isinstance(values := section.get(key), list):
            section[key] = [
                tokens_of(match[1]) if (match := _EPOCHS.fullmatch(str(value))) else value
                for value in values
            ]
    return raw | {"train": train, "schedule": schedule, "checkpoint": checkpoint}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _fraction_of(fraction: float, tokens: Any) -> int:
    try:
        return int(Fraction(str(fraction)) * parse_tokens(tokens))
    except ValueError:
        return 0  # the schema reports train.tokens


def _tokens_of(raw: dict[str, Any], epochs: float | str) -> int:
    """Return the tokens of a number of epochs, in whole steps; decimal fractions are exact."""
    data = check_data(raw["data"])
    samples = Fraction(str(epochs)) * _samples_per_epoch(data)
    batch_size = raw["train"].get("global_batch_size")
    if not isinstance(batch_size, int) or batch_size < 1:
        return data.seq_length  # the schema reports the batch size
    if samples < batch_size:
        raise UserError(
            f"{epochs} epochs of {data.path} are {int(samples)} samples, less than one step of "
            f"train.global_batch_size={batch_size}: set more epochs or a smaller batch"
        )
    return int(samples / batch_size) * batch_size * data.seq_length


def _samples_per_epoch(data: DataConfig) -> Fraction:
    """Return the samples of all streams that a run reads in one epoch of its own corpus."""
    from retemper.pipeline.corpus.format import TRAIN
    from retemper.pipeline.corpus.manifest import find_manifest

    manifest = find_manifest(data.path)
    if manifest is None:
        raise UserError(
            f"{data.path} holds no token corpus whose samples give the length of an epoch: "
            "make it with `retemper tokenize`, or set train.tokens and milestones in tokens"
        )
    own = data.samples_per_window[data.name]
    return Fraction(manifest["splits"][TRAIN]["samples"] * data.mixture_window, own)
