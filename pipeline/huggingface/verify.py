"""Verify an import or export on real text.

The logits of unmodified transformers and peft are compared with those of the megatron model.
"""

import heapq
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from retemper.pipeline.compat.light_imports import import_transformers
from retemper.pipeline.errors import UserError
from retemper.pipeline.huggingface.names import EMBEDDING
from retemper.pipeline.huggingface.source_config import readable_config
from retemper.pipeline.huggingface.source_folder import Weights
from retemper.pipeline.huggingface.streamed import StreamedModel

PROOF = "verified.json"
_TEXT = Path(heapq.__file__)  # English and Python, available in every installation
_FIRST_POSITIONS = 512
_MOST_POSITIONS = 4096
_SECONDS = 60  # in which more positions than the first are compared
_LOGITS_IN_MEMORY = 8  # copies of the logits, at most, while they are computed and compared
_TOLERANCE = 1e-4  # relative to the largest logit, with fp32 on both sides
# Relative RMS, where weights were rounded to fewer bits than the run computed with.
_ROUNDED_TOLERANCE = 0.05


def verify(
    streamed: StreamedModel,
    folder: Path,
    adapter: Path | None,
    proof: Path,
    *,
    source: Path,
    rounded: bool,
) -> None:
    """Compare the logits, and write the figures into a file. Called by a single rank.

    Args:
        streamed: the checkpoint.
        folder: of the model for transformers, or of the adapters' base.
        adapter: folder of the adapters for peft; None for a whole model.
        proof: folder for the file with the figures.
        source: folder of the model or run that is converted. It is named in the error, because
            what was written is removed then.
        rounded: whether the exported weights have fewer bits than those in the checkpoint.

    Raises:
        UserError: the logits differ.
    """
    import_transformers()
    model = streamed.setup.model
    tokens_BT = _tokens(folder, min(model.max_sequence_length, _MOST_POSITIONS))
    reference = _reference(folder, adapter)

    def compare(positions: int) -> dict[str, Any]:
        part_BT = tokens_BT[:, :positions]
        with torch.no_grad():
            theirs = reference(part_BT, use_cache=False).logits.float()
        return _compare(streamed.logits(part_BT).float(), theirs, rounded)

    started = time.monotonic()
    figures = compare(_FIRST_POSITIONS)
    positions = _affordable(time.monotonic() - started, model.vocab_size)
    if figures["equal"] and min(positions, tokens_BT.shape[1]) > figures["positions"]:
        figures = compare(positions)
    (proof / PROOF).write_text(json.dumps(figures, indent=2))
    if not figures["equal"]:
        raise UserError(
            f"{source} is another model after the conversion, so nothing was written: "
            f"logits differ by up to {figures['max_abs_difference']:.2g} "
            f"at a largest logit of {figures['largest_logit']:.3g}, and the next token is the same "
            f"at {figures['same_argmax']:.1%} of {figures['positions']} positions. "
            f"Please report this with {source / 'config.json'}"
        )


def _affordable(seconds: float, vocab_size: int) -> int:
    """Return the number of positions for which time and memory suffice.

    Args:
        seconds: that the first positions took.
        vocab_size: of the model.
    """
    import psutil

    free = psutil.virtual_memory().available
    return min(
        int(_FIRST_POSITIONS * _SECONDS / seconds),
        free // (_LOGITS_IN_MEMORY * vocab_size * torch.float32.itemsize),
    )


def summary(proof: Path) -> str:
    """Return one line with the figures that `verify` wrote into a folder."""
    figures = json.loads((proof / PROOF).read_text())
    return (
        f"verified against transformers {figures['transformers']}: "
        f"logits of {figures['positions']} positions differ by at most "
        f"{figures['max_abs_difference']:.1e}, the largest is {figures['largest_logit']:.1f}; "
        f"the same next token at {figures['same_argmax']:.1%}"
    )


def _compare(ours: torch.Tensor, theirs: torch.Tensor, rounded: bool) -> dict[str, Any]:
    import transformers

    difference = (ours - theirs).abs()
    largest = theirs.abs().max().item()
    relative_rms = ((ours - theirs).square().mean() / theirs.square().mean()).sqrt().item()
    equal = (
        relative_rms <= _ROUNDED_TOLERANCE
        if rounded
        else difference.max().item() <= _TOLERANCE * max(1.0, largest)
    )
    return {
        "equal": equal,
        "text": _TEXT.name,
        "positions": ours.shape[1],
        "max_abs_difference": difference.max().item(),
        "relative_rms_difference": relative_rms,
        "largest_logit": largest,
        "same_argmax": (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item(),
        "weights_rounded": rounded,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def _tokens(folder: Path, positions: int) -> torch.Tensor:
    import tokenizers

    ids = (
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        .encode(_TEXT.read_text(), add_special_tokens=False)
        .ids
    )
    return torch.tensor(ids[:positions])[None]


def _reference(folder: Path, adapter: Path | None):
    """Return the model of unmodified transformers, or of peft, on the CPU.

    Layers that do not fit into half of the free memory are read from disk when they run.
    """
    import psutil
    import transformers

    transformers.utils.logging.set_verbosity_error()
    max_memory = {"cpu": psutil.virtual_memory().available // 2}
    settings = {
        "dtype": torch.float32,
        "device_map": "auto",
        "max_memory": max_memory,
        "offload_folder": tempfile.mkdtemp(),
    }
    try:
        config = _reference_config(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False, **settings
        ).eval()
    # transformers raises errors of many types: AttributeError, KeyError, OSError, …
    except Exception as error:
        raise UserError(
            f"transformers {transformers.__version__} cannot load {folder}: {error!r}"
        ) from None
    if not adapter:
        return model
    import peft

    if "disk" in model.hf_device_map.values():
        return _adapted_from_disk(folder, adapter)
    return peft.PeftModel.from_pretrained(model, adapter)


def _reference_config(folder: Path):
    """Return transformers' config of a folder, which may be in the spelling of transformers 5.

    What names a kernel or a type is left out: the reference computes in fp32 on the CPU.
    """
    import transformers

    values = {
        key: value
        for key, value in readable_config(folder).items()
        if not key.startswith("_") and key not in ("attn_implementation", "dtype", "torch_dtype")
    }
    return transformers.AutoConfig.for_model(**values)


def _adapted_from_disk(folder: Path, adapter: Path):
    """Return peft's model with its adapters; each weight of the base is read when it is needed.

    peft cannot add adapters to a model that transformers itself reads from disk, and would write
    the base's files again.
    """
    import accelerate
    import peft
    import transformers

    weights = Weights(folder, trusted=True)
    with accelerate.init_empty_weights():
        base = transformers.AutoModelForCausalLM.from_config(
            _reference_config(folder), dtype=torch.float32
        )
    for path, module in list(base.named_modules()):
        names = {
            name: EMBEDDING
            if weights.model.tie_embeddings and path == "lm_head"
            else f"{path}.{name}"
            for name, _ in module.named_parameters(recurse=False)
        }
        if names:
            _read_when_needed(module, names, weights)
    return peft.PeftModel.from_pretrained(base, adapter).eval()


def _read_when_needed(module: torch.nn.Module, names: dict[str, str], weights: Weights) -> None:
    """Load a module's weights before it runs, and replace them by empty placeholders afterwards.

    The placeholders have the shape of the weights, but take no memory.
    names: parameter -> its name among the weights.
    """
    placeholders = {
        name: torch.zeros(()).expand(parameter.shape)
        for name, parameter in module.named_parameters(recurse=False)
    }

    def assign(tensors: dict[str, torch.Tensor]) -> None:
        module._parameters.update(
            {
                name: torch.nn.Parameter(tensor, requires_grad=False)
                for name, tensor in tensors.items()
            }
        )

    def read(*_) -> None:
        assign(
            {name: weights.read(stored, (slice(None),)).float() for name, stored in names.items()}
        )

    assign(placeholders)
    module.register_forward_pre_hook(read)
    module.register_forward_hook(lambda *_: assign(placeholders))
