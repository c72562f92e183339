"""Weights from transformers and back, and training beside transformers and peft: the same logits, losses and weights."""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import launch
from safetensors.torch import load_file

# What every random model has, and what tells the families apart. 300 tokens: no multiple of 128.
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"vocab_size": 300, "max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    "linear_rope": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "head_dim": 8}),
    "mistral": ("Mistral", {"sliding_window": 128, "head_dim": 32}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
}


def save_random(folder: Path, family: str, changes: dict, tokenizer: Path, dtype=torch.float32, seed: int = 1) -> Path:
    """A folder as transformers writes it, with weights, biases and norms that all differ from their initial values."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**SHAPE | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1 if "norm" in name else 0))
    model.to(dtype).save_pretrained(folder, max_shard_size="200KB")
    (folder / "tokenizer.json").write_text((tokenizer / "tokenizer.json").read_text())
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def imported(folder: Path, run: Path, *changes: str) -> dict:
    return {"import": {"folder": str(folder), "run": str(run), "trust": None, "overrides": list(changes)}}


def exported(run: Path, folder: Path, *, step=None, adapter=False) -> dict:
    options = {"run": str(run), "folder": str(folder), "step": step, "adapter": adapter, "base": None, "tokenizer": None}
    return {"export": options}


@pytest.fixture(scope="module")
def folders(workspace) -> dict[str, Path]:
    """Of every family, of one in half precision, and of random shapes."""
    tokenizer, root = workspace / "data" / "tokenizer", workspace / "transformers"
    made = {name: save_random(root / name, family, changes, tokenizer) for name, (family, changes) in FAMILIES.items()}
    made["bf16"] = save_random(root / "bf16", "Qwen2", {}, tokenizer, torch.bfloat16)
    made["fp16"] = save_random(root / "fp16", "Llama", {}, tokenizer, torch.float16)
    draw = random.Random(7)
    for number in range(4):
        groups, per_group = draw.choice([2, 4]), draw.choice([1, 2, 3])
        changes = {"num_key_value_heads": groups, "num_attention_heads": groups * per_group, "head_dim": 2 * draw.randint(2, 12)}
        changes |= {"hidden_size": 8 * draw.randint(3, 12), "intermediate_size": 2 * draw.randint(5, 90)}
        changes |= {
            "vocab_size": draw.randint(300, 700),
            "num_hidden_layers": 2 * draw.randint(1, 2),
            "tie_word_embeddings": draw.random() < 0.5,
        }
        made[f"random-{number}"] = save_random(
            root / f"random-{number}", draw.choice(["Llama", "Qwen2", "Qwen3"]), changes, tokenizer, seed=number
        )
    return made


LAYOUTS = {"tp2": ["parallel=tp2"], "pp2": ["parallel=pp2"]}
STAGED = ("llama2", "llama3", "qwen3")  # under pp2 too: separate and tied head, norms of queries and keys


@pytest.fixture(scope="module")
def exchanged(workspace, folders) -> dict[tuple[str, str], tuple[Path, Path]]:
    """(folder, layout of two ranks) -> the base it was imported as, and what one rank exported from that."""
    pairs = [(name, "tp2") for name in folders] + [(name, "pp2") for name in STAGED]
    made = {pair: tuple(workspace / where / "-".join(pair) for where in ("imported", "exported")) for pair in pairs}
    launch(2, [imported(folders[name], run, *LAYOUTS[layout]) for (name, layout), (run, _) in made.items()], "exchange.py")
    launch(1, [exported(run, out) for run, out in made.values()], "exchange.py")
    return made


def test_every_import_and_export_is_proved_by_stock_transformers(exchanged):
    for run, out in exchanged.values():
        for proof in (run / "huggingface", out):
            figures = json.loads((proof / "verified.json").read_text())
            assert figures["positions"] >= 128 and figures["max_abs_difference"] < 1e-4 * max(1, figures["largest_logit"])
            assert figures["equal"] and not figures["weights_rounded"]


def test_a_round_trip_changes_no_byte(exchanged, folders):
    for (name, _), (_, out) in exchanged.items():
        before, after = tensors_of(folders[name]), tensors_of(out)
        assert before.keys() == after.keys()
        for tensor in before:
            assert before[tensor].dtype == after[tensor].dtype and before[tensor].equal(after[tensor]), (out, tensor)
        for file in ("config.json", "generation_config.json", "tokenizer.json"):
            assert (folders[name] / file).read_bytes() == (out / file).read_bytes()
