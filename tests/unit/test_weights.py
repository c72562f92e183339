"""Test invalid transformers folders, and the table of names."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from retemper.pipeline.cli import main
from retemper.pipeline.errors import UserError
from retemper.pipeline.huggingface.names import Shard, tensor_shapes
from retemper.pipeline.huggingface.source_config import config_of, model_of
from retemper.pipeline.huggingface.source_folder import Weights
from retemper.pipeline.schema.model import ModelConfig, RopeScaling

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=50,
    max_sequence_length=32,
)


def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in tensor_shapes(MODEL).items()}


def write(folder: Path, held: dict | None = None, **config) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(MODEL, "float32") | config))
    if held is not None:
        save_file(held, folder / "model.safetensors")
    return folder


def write_index(folder: Path, held: dict[str, torch.Tensor], **changes) -> None:
    """Write two files and an index of them."""
    names = sorted(held)
    parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in parts.items():
        save_file({name: held[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map | changes})
    )


def test_a_sharded_folder_is_read_block_by_block(tmp_path):
    held = tensors()
    write_index(write(tmp_path / "m"), held)
    weights = Weights(tmp_path / "m")
    assert weights.names == list(held) and weights.model == MODEL.model_copy(
        update={"head_size": 4}
    )
    name = "model.layers.1.mlp.down_proj.weight"
    assert (
        weights.read(name, (slice(None), slice(3, 9))).equal(held[name][:, 3:9])
        and weights.dtype(name) == torch.float32
    )


def test_torch_files_are_read_as_tensors_alone(tmp_path):
    held = tensors()
    torch.save(held, write(tmp_path / "m") / "pytorch_model.bin")
    assert (
        Weights(tmp_path / "m")
        .read("lm_head.weight", (slice(2, 5),))
        .equal(held["lm_head.weight"][2:5])
    )


class Evil:
    """An object that runs a command when it is unpickled."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    torch.save(
        tensors() | {"evil": Evil(tmp_path / "ran")}, write(tmp_path / "m") / "pytorch_model.bin"
    )
    with pytest.raises(UserError, match=r"pytorch_model.bin holds more than tensors"):
        Weights(tmp_path / "m")
    assert not (tmp_path / "ran").exists()


def damage(kind: str, folder: Path) -> None:
    held = tensors()
    if kind == "missing":
        del held["model.layers.1.self_attn.k_proj.weight"]
    elif kind == "extra":
        held["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)
    elif kind == "shape":
        held["model.norm.weight"] = torch.ones(17)
    write(folder, held)
    file = folder / "model.safetensors"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "header":
        file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    elif kind == "python":
        (folder / "modeling_evil.py").write_text("raise SystemExit")
    elif kind == "none":
        file.unlink()
    elif kind.startswith("index"):
        file.unlink()
        write_index(folder, held, **{"index outside": {"lm_head.weight": "../evil.safetensors"},
                                     "index absent": {"x": "c.safetensors"},
                                     "index wrong": {"lm_head.weight": "b.safetensors"},
                                     "index damaged": {}}[kind])  # fmt: skip
        if kind == "index damaged":
            (folder / "model.safetensors.index.json").write_text("{")
    elif kind == "config damaged":
        (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "model.layers.1.self_attn.k_proj.weight is missing"),
        ("extra", "model.layers.0.self_attn.q_proj.bias belongs to no part of this architecture"),
        ("shape", r"model.norm.weight has the shape \(17,\), config.json asks for \(16,\)"),
        ("truncated", "model.safetensors is damaged or cut off"),
        ("header", "model.safetensors is damaged or cut off"),
        ("python", r"brings code of its own \(modeling_evil.py\).*--trust python"),
        ("none", "has no weights"),
        ("index outside", "names the file '../evil.safetensors': do not trust"),
        ("index absent", "lacks c.safetensors"),
        ("index wrong", "lm_head.weight is not in b.safetensors, where the index says it is"),
        ("index damaged", "index.json is damaged"),
        ("config damaged", "config.json is damaged"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(tmp_path, kind, said):
    damage(kind, tmp_path / kind)
    with pytest.raises(UserError, match=f"(?s){said}"):
        Weights(tmp_path / kind)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "the architecture GPT2LMHeadModel is not supported",
        ),
        ({"architectures": None}, "the architecture none named is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
            "rope_scaling without low_freq_factor",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"logit_scale": 0.5}, "the unknown key logit_scale=0.5"),
        ({"vocab_size": -1}, "vocab_size"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, change, said):
    with pytest.raises(UserError, match=re.escape(said)):
        Weights(write(tmp_path / "m", tensors(), **change))


def test_code_is_left_aside_for_those_who_trust_it_by_name(tmp_path):
    folder = write(
        tmp_path / "m", tensors(), auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}
    )
    with pytest.raises(UserError, match="auto_map in config.json"):
        Weights(folder)
    assert Weights(folder, trusted=True).model.num_layers == 2


def test_the_command_refuses_and_leaves_nothing(tmp_path, capfd):
    damage("missing", tmp_path / "m")
    assert main(["import", str(tmp_path / "m"), str(tmp_path / "runs" / "base")]) == 1
    said = capfd.readouterr().err
    assert "k_proj.weight is missing" in said and "Traceback" not in said
    assert not (tmp_path / "runs").exists()


def test_what_config_json_says_is_refused_before_ranks_start(tmp_path, capfd):
    folder = str(write(tmp_path / "m", tensors()))
    for arguments, said in (
        (
            [folder, str(tmp_path / "base"), "parallel.tensor_parallel_size=3"],
            "does not divide model.num_attention_heads=4",
        ),
        ([folder, folder], "exists already"),
        ([str(tmp_path), str(tmp_path / "base")], "no transformers folder"),
    ):
        assert main(["import", *arguments]) == 1 and said in capfd.readouterr().err
    assert main(["export", "run", str(tmp_path / "out"), "--base", folder]) == 1
    assert "--base requires --adapter" in capfd.readouterr().err


def test_the_same_weights_are_the_same_base_however_they_are_imported(tmp_path):
    held = tensors()
    one, other = (Weights(write(tmp_path / name, held)).sha256 for name in ("a", "b"))
    assert one == other != Weights(write(tmp_path / "c", held, rope_theta=5e5)).sha256
    held["lm_head.weight"][0, 0] += 1
    assert Weights(write(tmp_path / "d", held)).sha256 != one


@st.composite
def models(draw):
    groups, size = draw(st.sampled_from([4, 8])), draw(st.sampled_from([1, 2, 4]))
    scaling = st.builds(
        RopeScaling, kind=st.sampled_from(["linear", "llama3"]), factor=st.sampled_from([2.0, 8.0])
    )
    biased, normed = draw(st.sampled_from([(False, False), (True, False), (False, True)]))
    return size, ModelConfig(
        num_layers=draw(st.integers(1, 3)), hidden_size=draw(st.integers(1, 20)),
        ffn_hidden_size=size * draw(st.integers(1, 9)),
        num_attention_heads=groups * draw(st.integers(1, 3)), num_query_groups=groups,
        head_size=2 * draw(st.integers(1, 4)), vocab_size=draw(st.integers(1, 300)),
        max_sequence_length=64, tie_embeddings=draw(st.booleans()),
        qkv_bias=biased, qk_norm=normed, rope_scaling=draw(st.none() | scaling),
    )  # fmt: skip


def megatron_shapes(model: ModelConfig, size: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of megatron-core's weights on one of `size` tensor-parallel ranks."""
    hidden, head = model.hidden_size, model.kv_channels
    qkv = (model.num_attention_heads + 2 * model.num_query_groups) * head // size
    vocab = -(-model.vocab_size // 128) * 128 // size
    layer = {
        "self_attention.linear_qkv.weight": (qkv, hidden),
        "self_attention.linear_proj.weight": (hidden, model.num_attention_heads * head // size),
    }
    layer |= {
        "mlp.linear_fc1.weight": (2 * model.ffn_hidden_size // size, hidden),
        "mlp.linear_fc2.weight": (hidden, model.ffn_hidden_size // size),
    }
    layer |= dict.fromkeys(("input_layernorm.weight", "pre_mlp_layernorm.weight"), (hidden,))
    if model.qkv_bias:
        layer["self_attention.linear_qkv.bias"] = (qkv,)
    if model.qk_norm:
        layer |= dict.fromkeys(
            ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"), (head,)
        )
    shapes = {
        f"decoder.layers.{number}.{name}": shape
        for number in range(model.num_layers)
        for name, shape in layer.items()
    }
    shapes |= {
        "decoder.final_layernorm.weight": (hidden,),
        "embedding.word_embeddings.weight": (vocab, hidden),
    }
    return shapes if model.tie_embeddings else shapes | {"output_layer.weight": (vocab, hidden)}


@settings(deadline=None, max_examples=60)
@given(models())
def test_the_blocks_of_all_ranks_hold_every_number_once(drawn):
    size, model = drawn
    held = {name: torch.zeros(shape) for name, shape in tensor_shapes(model).items()}
    replicated = {name for name in held if "norm" in name}
    for rank in range(size):
        for name, shape in megatron_shapes(model, size).items():
            covered = torch.zeros(shape)
            for block in Shard(model, rank, size).blocks(name, torch.Size(shape)):
                there = held[block.name][block.there]
                assert there.shape == covered[block.here].shape
                there += 1
                covered[block.here] += 1
            padding = (
                max(0, (rank + 1) * shape[0] - model.vocab_size)
                if "embedding" in name or "output" in name
                else 0
            )
            assert (covered[: max(0, shape[0] - padding)] == 1).all() and not covered[
                max(0, shape[0] - padding) :
            ].any()
    for name, counts in held.items():
        assert (counts == (size if name in replicated else 1)).all(), name


@settings(deadline=None, max_examples=60)
@given(models())
def test_a_config_comes_back_as_it_went(drawn):
    _, model = drawn
    linear = model.rope_scaling and model.rope_scaling.kind == "linear"
    kept = (
        RopeScaling(kind="linear", factor=model.rope_scaling.factor)
        if linear
        else model.rope_scaling
    )
    assert model_of(config_of(model, "float32"), Path("m")) == model.model_copy(
        update={"rope_scaling": kept}
    )


TIED = MODEL.model_copy(update={"tie_embeddings": True})
EMBEDDING = torch.arange(800.0).view(50, 16)
LAST = EMBEDDING.clone()
LAST[-1, -1] += 1


def tied(folder: Path, head: torch.Tensor | None) -> Path:
    """Write a folder whose config ties the head to the embedding, but that may store a head."""
    held = {name: torch.ones(shape) for name, shape in tensor_shapes(TIED).items()} | {
        "model.embed_tokens.weight": EMBEDDING
    }
    if head is not None:
        held["lm_head.weight"] = head
    return write(folder, held, tie_word_embeddings=True)


@pytest.mark.parametrize("head", [None, EMBEDDING.clone(), EMBEDDING.half(), EMBEDDING.double()])
def test_a_tied_head_may_be_written_beside_its_embedding(tmp_path, head):
    weights = Weights(tied(tmp_path / "m", head))
    assert weights.model.tie_embeddings and "lm_head.weight" not in weights.names


@pytest.mark.parametrize(
    "head",
    [
        LAST,
        EMBEDDING[:49].clone(),
        EMBEDDING[:, :8].clone(),
        -EMBEDDING,
        EMBEDDING.bfloat16(),
        EMBEDDING.flatten().clone(),
    ],
)
def test_a_head_that_is_tied_and_another_is_refused_and_not_dropped(tmp_path, head, monkeypatch):
    monkeypatch.setattr("retemper.pipeline.huggingface.source_folder._ROWS", 7)
    folder = tied(tmp_path / "m", head)
    with pytest.raises(
        UserError,
        match=r"lm_head.weight is not the same matrix as model.embed_tokens.weight"
        r".*tie_word_embeddings to false",
    ):
        Weights(folder)
    if head.shape == EMBEDDING.shape:  # what the message advises
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        assert Weights(folder).read("lm_head.weight", (slice(None),)).equal(head)
