"""The proof beside an import or an export: logits of stock transformers and peft against the megatron model's, on real text."""

import heapq
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from retemper.pipeline.errors import UserError
from retemper.pipeline.huggingface.names import EMBEDDING
from retemper.pipeline.huggingface.source_folder import Weights
from retemper.pipeline.huggingface.streamed import StreamedModel

PROOF = "verified.json"
_TEXT = Path(heapq.__file__)  # English and Python, there wherever Python is
_POSITIONS = 512
_TOLERANCE = 1e-4  # of the largest logit, fp32 on both sides
_ROUNDED_TOLERANCE = (
    0.05  # RMS over RMS, where weights were rounded to fewer bits than the run computed with
)


def verify(
    streamed: StreamedModel, folder: Path, adapter: Path | None, proof: Path, *, rounded: bool
) -> None:
    """Compare, and write the figures into `proof`. One rank calls it.

    rounded: the folder holds fewer bits of the weights than the checkpoint. Raises UserError where the logits differ.
    """
    tokens_BT = _tokens(folder, streamed.setup.model.max_sequence_length)
    ours = streamed.logits(tokens_BT).float()
    with torch.no_grad():
        theirs = _reference(folder, adapter)(tokens_BT).logits.float()
    figures = _compare(ours, theirs, rounded)
    (proof / PROOF).write_text(json.dumps(figures, indent=2))
    if not figures["equal"]:
        raise UserError(
            f"{adapter or folder} and {streamed.folder} are not the same model: logits differ by up to {figures['max_abs_difference']:.2g} "
            f"at a largest logit of {figures['largest_logit']:.3g}. {proof / PROOF} has the figures; please report it with config.json"
        )


def summary(proof: Path) -> str:
    """One line of the figures."""
    figures = json.loads((proof / PROOF).read_text())
    return (
        f"verified against transformers {figures['transformers']}: logits of {figures['positions']} positions differ by at most "
        f"{figures['max_abs_difference']:.1e}, the largest is {figures['largest_logit']:.1f}; the same next token at {figures['same_argmax']:.1%}"
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


def _tokens(folder: Path, max_sequence_length: int) -> torch.Tensor:
    import tokenizers

    ids = (
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        .encode(_TEXT.read_text(), add_special_tokens=False)
        .ids
    )
    return torch.tensor(ids[: min(_POSITIONS, max_sequence_length)])[None]


def _reference(folder: Path, adapter: Path | None):
    """Stock transformers' model on the CPU, or peft's; layers that do not fit in half of the free memory are read from disk as they run."""
    import psutil
    import transformers

    transformers.utils.logging.set_verbosity_error()
    room = {"cpu": psutil.virtual_memory().available // 2}
    settings = {
        "dtype": torch.float32,
        "device_map": "auto",
        "max_memory": room,
        "offload_folder": tempfile.mkdtemp(),
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, **settings
    ).eval()
    if not adapter:
        return model
    import peft

    if "disk" in model.hf_device_map.values():
        return _adapted_from_disk(folder, adapter)
    return peft.PeftModel.from_pretrained(model, adapter)


def _adapted_from_disk(folder: Path, adapter: Path):
    """peft's model with its adapters, each weight of the base read when it is needed.

    peft puts no adapter on a model that transformers reads from disk itself, and would write the base's files anew.
    """
    import accelerate
    import peft
    import transformers

    weights = Weights(folder, trusted=True)
    with accelerate.init_empty_weights():
        base = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32
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
    """Give a module its weights while it runs, and before and after that numbers of their shape that take no memory.

    names: parameter -> what the weights know it as.
    """
    blank = {
        name: torch.zeros(()).expand(parameter.shape)
        for name, parameter in module.named_parameters(recurse=False)
    }

    def hold(tensors: dict[str, torch.Tensor]) -> None:
        module._parameters.update(
            {
                name: torch.nn.Parameter(tensor, requires_grad=False)
                for name, tensor in tensors.items()
            }
        )

    def read(*_) -> None:
        hold({name: weights.read(stored, (slice(None),)).float() for name, stored in names.items()})

    hold(blank)
    module.register_forward_pre_hook(read)
    module.register_forward_hook(lambda *_: hold(blank))
