"""Test the reading of transformers folders, also of invalid ones, and the table of tensor names."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

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


def random_tensors() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in tensor_shapes(MODEL).items()}


def write_folder(folder: Path, tensors: dict | None = None, **config) -> Path:
    folder.mkdir(exist_ok=True)
    written = config_of(MODEL, "float32")
    del written["rope_parameters"]  # as transformers 4 writes it
    (folder / "config.json").write_text(json.dumps(written | config))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
    return folder


def write_index(folder: Path, tensors: dict[str, torch.Tensor], **changes) -> None:
    """Write the tensors into two files, and an index with these changes."""
    names = sorted(tensors)
    parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map | changes})
    )


def test_sharded_folder_is_read_block_by_block(tmp_path):
    tensors = random_tensors()
    write_index(write_folder(tmp_path / "m"), tensors)
    weights = Weights(tmp_path / "m")
    assert weights.names == list(tensors)
    assert weights.model == MODEL.model_copy(update={"head_size": 4})
    name = "model.layers.1.mlp.down_proj.weight"
    assert weights.read(name, (slice(None), slice(3, 9))).equal(tensors[name][:, 3:9])
    assert weights.dtype(name) == torch.float32


def test_torch_file_is_read_by_slices(tmp_path):
    tensors = random_tensors()
    torch.save(tensors, write_folder(tmp_path / "m") / "pytorch_model.bin")
    assert (
        Weights(tmp_path / "m")
        .read("lm_head.weight", (slice(2, 5),))
        .equal(tensors["lm_head.weight"][2:5])
    )


class Malicious:
    """An object that runs a command when it is unpickled."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


def test_pickle_with_code_is_refused_and_not_executed(tmp_path):
    torch.save(
        random_tensors() | {"evil": Malicious(tmp_path / "ran")},
        write_folder(tmp_path / "m") / "pytorch_model.bin",
    )
    with pytest.raises(UserError, match=r"pytorch_model.bin holds more than tensors"):
        Weights(tmp_path / "m")
    assert not (tmp_path / "ran").exists()


def damage(kind: str, folder: Path) -> None:
    tensors = random_tensors()
    if kind == "missing":
        del tensors["model.layers.1.self_attn.k_proj.weight"]
    elif kind == "extra":
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)
    elif kind == "shape":
        tensors["model.norm.weight"] = torch.ones(17)
    elif kind == "quantised":
        tensors["lm_head.weight"] = torch.ones(50, 16, dtype=torch.int8)
    elif kind == "eight bits":
        tensors["lm_head.weight"] = torch.ones(50, 16).to(torch.float8_e4m3fn)
    write_folder(folder, tensors)
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
        changes = {
            "index outside": {"lm_head.weight": "../evil.safetensors"},
            "index absent": {"x": "c.safetensors"},
            "index wrong": {"lm_head.weight": "b.safetensors"},
        }
        write_index(folder, tensors, **changes.get(kind, {}))
        index = folder / "model.safetensors.index.json"
        if kind == "index damaged":
            index.write_text("{")
        elif kind == "index short":
            index.write_text(index.read_text().replace('"lm_head.weight": "a.safetensors", ', ""))
        elif kind == "index twice":
            twice = load_file(folder / "b.safetensors") | {"lm_head.weight": torch.zeros(50, 16)}
            save_file(twice, folder / "b.safetensors")
        elif kind == "index beside":
            save_file(tensors, file)
    elif kind == "config damaged":
        (folder / "config.json").write_text("{")
    elif kind == "config nested":
        (folder / "config.json").write_text('{"a":' * 100_000)
    elif kind == "config of many layers":
        write_folder(folder, num_hidden_layers=10**9)
    elif kind == "generation damaged":
        (folder / "generation_config.json").write_text("[]")
    elif kind == "adapters":
        (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("kind", "message"),
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
        ("index short", "lm_head.weight is in a.safetensors, but the index does not name it"),
        ("index twice", "lm_head.weight is in b.safetensors, but the index says a.safetensors"),
        ("index beside", "has both model.safetensors and other files named by .*remove one"),
        ("config damaged", "config.json is damaged"),
        ("config nested", "config.json is damaged"),
        ("config of many layers", "num_hidden_layers=1000000000, but there are only 21 tensors"),
        ("generation damaged", "generation_config.json is damaged"),
        ("adapters", "holds adapters .adapter_config.json.*merged model alone"),
        ("quantised", "lm_head.weight is of type torch.int8: quantised"),
        ("eight bits", "lm_head.weight is of type torch.float8_e4m3fn: quantised"),
    ],
)
def test_damaged_folder_is_refused_and_the_damage_named(tmp_path, kind, message):
    damage(kind, tmp_path / kind)
    with pytest.raises(UserError, match=f"(?s){message}"):
        Weights(tmp_path / kind)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "the architecture GPT2LMHeadModel is not supported",
        ),
        (
            {"architectures": None, "model_type": "gpt2"},
            "the architecture none named is not supported",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
            "rope_scaling without high_freq_factor, low_freq_factor",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"logit_scale": 0.5}, "logit_scale=0.5, which could change what the model computes"),
        ({"vocab_size": -1}, "vocab_size"),
    ],
)
def test_unsupported_config_is_refused_and_the_key_named(tmp_path, change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Weights(write_folder(tmp_path / "m", random_tensors(), **change))


def test_folder_with_code_is_read_without_the_code_if_trusted(tmp_path):
    folder = write_folder(
        tmp_path / "m", random_tensors(), auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}
    )
    with pytest.raises(UserError, match="auto_map in config.json"):
        Weights(folder)
    assert Weights(folder, trusted=True).model.num_layers == 2


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "model.safetensors"])
def test_a_link_out_of_the_folder_is_refused_and_within_it_or_the_hub_cache_followed(
    tmp_path, name
):
    secret = tmp_path / "secret"
    folder = write_folder(tmp_path / "m", random_tensors())
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / name).rename(secret)
    (folder / name).symlink_to(secret)
    with pytest.raises(UserError, match=f"{name} is a link out of its folder, to {secret}"):
        Weights(folder)
    (folder / name).unlink()
    secret.rename(folder / "beside")
    (folder / name).symlink_to("beside")
    Weights(folder)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (snapshot.parents[1] / "blobs").mkdir()
    (snapshot / "beside").rename(snapshot.parents[1] / "blobs" / "2")
    (snapshot / name).unlink()
    (snapshot / name).symlink_to("../../blobs/2")
    Weights(snapshot)


def test_a_folder_that_is_itself_a_link_is_read(tmp_path):
    write_folder(tmp_path / "m", random_tensors())
    (tmp_path / "link").symlink_to("m")
    Weights(tmp_path / "link")


def test_refused_import_leaves_no_files(tmp_path, capfd):
    damage("missing", tmp_path / "m")
    assert main(["import", str(tmp_path / "m"), str(tmp_path / "runs" / "base")]) == 1
    message = capfd.readouterr().err
    assert "k_proj.weight is missing" in message
    assert "Traceback" not in message
    assert not (tmp_path / "runs").exists()


def test_invalid_import_or_export_is_refused_before_ranks_start(tmp_path, capfd):
    folder = str(write_folder(tmp_path / "m", random_tensors()))
    for arguments, message in (
        (
            [folder, str(tmp_path / "base"), "parallel.tensor_parallel_size=3"],
            "does not divide model.num_attention_heads=4",
        ),
        ([folder, folder], "exists already"),
        ([str(tmp_path), str(tmp_path / "base")], "no transformers folder"),
    ):
        assert main(["import", *arguments]) == 1
        assert message in capfd.readouterr().err
    assert main(["export", "run", str(tmp_path / "out"), "--base", folder]) == 1
    assert "--base requires --adapter" in capfd.readouterr().err


def test_hash_of_a_base_depends_only_on_its_weights_and_config(tmp_path):
    tensors = random_tensors()
    first, second = (Weights(write_folder(tmp_path / name, tensors)).sha256 for name in ("a", "b"))
    assert first == second
    assert Weights(write_folder(tmp_path / "c", tensors, rope_theta=5e5)).sha256 != first
    tensors["lm_head.weight"][0, 0] += 1
    assert Weights(write_folder(tmp_path / "d", tensors)).sha256 != first


@st.composite
def models(draw):
    """Draw a tensor-parallel size and a model that can be split by it."""
    groups = draw(st.sampled_from([4, 8]))
    size = draw(st.sampled_from([1, 2, 4]))
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
def test_blocks_of_all_ranks_cover_every_weight_once(drawn):
    size, model = drawn
    counts = {name: torch.zeros(shape) for name, shape in tensor_shapes(model).items()}
    replicated = {name for name in counts if "norm" in name}
    for rank in range(size):
        for name, shape in megatron_shapes(model, size).items():
            covered = torch.zeros(shape)
            for block in Shard(model, rank, size).blocks(name, torch.Size(shape)):
                stored = counts[block.name][block.source_region]
                assert stored.shape == covered[block.target_region].shape
                stored += 1
                covered[block.target_region] += 1
            padding = (
                max(0, (rank + 1) * shape[0] - model.vocab_size)
                if "embedding" in name or "output" in name
                else 0
            )
            unpadded = max(0, shape[0] - padding)
            assert (covered[:unpadded] == 1).all()
            assert not covered[unpadded:].any()
    for name, count in counts.items():
        assert (count == (size if name in replicated else 1)).all(), name


@settings(deadline=None, max_examples=60)
@given(models())
def test_model_config_survives_the_round_trip_through_transformers(drawn):
    _, model = drawn
    linear = model.rope_scaling and model.rope_scaling.kind == "linear"
    expected = (
        RopeScaling(kind="linear", factor=model.rope_scaling.factor)
        if linear
        else model.rope_scaling
    )
    assert model_of(config_of(model, "float32"), Path("m")) == model.model_copy(
        update={"rope_scaling": expected}
    )


TIED = MODEL.model_copy(update={"tie_embeddings": True})
EMBEDDING = torch.arange(800.0).view(50, 16)
DIFFERS_IN_LAST_ELEMENT = EMBEDDING.clone()
DIFFERS_IN_LAST_ELEMENT[-1, -1] += 1


def write_tied(folder: Path, head: torch.Tensor | None) -> Path:
    """Write a folder whose config ties the head to the embedding, with or without a stored head."""
    tensors = {name: torch.ones(shape) for name, shape in tensor_shapes(TIED).items()} | {
        "model.embed_tokens.weight": EMBEDDING
    }
    if head is not None:
        tensors["lm_head.weight"] = head
    return write_folder(folder, tensors, tie_word_embeddings=True)


@pytest.mark.parametrize("head", [None, EMBEDDING.clone(), EMBEDDING.half(), EMBEDDING.double()])
def test_stored_head_equal_to_the_tied_embedding_is_accepted(tmp_path, head):
    weights = Weights(write_tied(tmp_path / "m", head))
    assert weights.model.tie_embeddings
    assert "lm_head.weight" not in weights.names


@pytest.mark.parametrize(
    "head",
    [
        DIFFERS_IN_LAST_ELEMENT,
        EMBEDDING[:49].clone(),
        EMBEDDING[:, :8].clone(),
        -EMBEDDING,
        EMBEDDING.bfloat16(),
        EMBEDDING.flatten().clone(),
    ],
)
def test_stored_head_that_differs_from_the_tied_embedding_is_refused(tmp_path, head, monkeypatch):
    monkeypatch.setattr("retemper.pipeline.huggingface.source_folder._ROWS", 7)
    folder = write_tied(tmp_path / "m", head)
    with pytest.raises(
        UserError,
        match=r"lm_head.weight is not the same matrix as model.embed_tokens.weight"
        r".*tie_word_embeddings to false",
    ):
        Weights(folder)
    if head.shape == EMBEDDING.shape:  # then the advice of the message works
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        assert Weights(folder).read("lm_head.weight", (slice(None),)).equal(head)
