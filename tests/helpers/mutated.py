"""Change config.json of small folders at random on one rank, and compare what is then imported.

conftest.launch runs it. A case is {"folders": a list of transformers folders, "examples": number}.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st

from retemper.pipeline.distributed import topology as topologies
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.model import MethodConfig, ModelSetup, ParallelConfig

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, 4, 8, 16, 24, 32, 64, 96, 128, 256, 300, 301, -1, 10**9]),
    st.sampled_from([0.0, 1e-6, 1e-5, 0.5, 1.0, 2.5, 1e4, 5e5, float("inf"), float("nan")]),
    st.sampled_from(["", "silu", "swish", "gelu", "linear", "null", "2", "1e-5", "full_attention"]),
    st.lists(st.sampled_from(["full_attention", "sliding_attention", "chunked_attention", 1])),
    st.dictionaries(st.sampled_from(["full_attention", "a"]), st.integers(0, 9)),
)
ROPE = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear", "llama3", "yarn", "dynamic", None]),
        "type": st.sampled_from(["default", "linear", "llama3"]),
        "rope_theta": st.sampled_from([1e4, 5e5, 10000, "1e4", 0]),
        "factor": st.sampled_from([1.0, 2.0, 8, "4", None, -1.0]),
        "low_freq_factor": st.sampled_from([1.0, 2, 4.0]),
        "high_freq_factor": st.sampled_from([4.0, 2]),
        "original_max_position_embeddings": st.sampled_from([64, 32.0, 32.5, None]),
        "partial_rotary_factor": st.sampled_from([1.0, 0.5]),
    },
)
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPES = st.sampled_from([LINEAR, LLAMA3]) | ROPE
BY_TYPE = st.fixed_dictionaries({"full_attention": ROPES, "sliding_attention": ROPES | st.none()})
# Keys of other families, tools and versions, beside those that the folder has.
OTHERS = [
    "attention_multiplier", "attn_logit_softcapping", "clip_qkv", "do_sample", "eos_token_id",
    "head_dim", "is_causal", "is_decoder", "layer_types", "logit_scale", "mlp_bias",
    "no_rope_layers", "num_experts", "num_key_value_heads", "partial_rotary_factor",
    "quantization_config", "residual_multiplier", "rms_norm_eps", "rope_interleaved", "rope_theta",
    "scale_emb", "sliding_window", "temperature", "tie_word_embeddings", "torch_dtype",
    "transformers_weights", "unsloth_version", "use_mrope", "use_qk_norm", "use_sliding_window",
]  # fmt: skip

# A change of these may leave a model of other tensors, which the message then lists.
SHAPES = {
    "head_dim", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "tie_word_embeddings", "vocab_size",
}  # fmt: skip


def changes(keys: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy for changes of one or two keys."""
    anything = st.dictionaries(st.sampled_from(sorted({*keys, *OTHERS})), VALUES, max_size=2)
    old = st.fixed_dictionaries({"rope_scaling": ROPES})
    new = st.fixed_dictionaries(
        {"rope_parameters": ROPES | BY_TYPE, "rope_theta": st.none() | st.just(5e5)}
    )
    return anything | old | new


def main(cases: list[dict]) -> None:
    place = topologies.start(ParallelConfig())
    for case in cases:
        for folder in map(Path, case["folders"]):
            imported = count_imported(folder, case["examples"], place)
            assert imported > 2, "nearly every change was refused"
    topologies.stop(leave=False)


def count_imported(folder: Path, examples: int, place: topologies.Topology) -> int:
    """Return how many random changes of a folder's config.json left it one that is imported."""
    config = json.loads((folder / "config.json").read_text())
    imported = []

    @hypothesis.settings(max_examples=examples, deadline=None, database=None)
    @hypothesis.given(changes(list(config)))
    def check(changed):
        with tempfile.TemporaryDirectory() as copy:
            for file in folder.glob("*"):
                if file.name != "config.json":
                    os.link(file, Path(copy, file.name))
            Path(copy, "config.json").write_text(json.dumps(config | changed))
            imported.append(equal_or_refused(Path(copy), changed, place))

    check()
    return sum(imported)


def equal_or_refused(folder: Path, changed: dict[str, Any], place: topologies.Topology) -> bool:
    """Return whether a folder was imported, with transformers' logits.

    If it was refused, the message has to name a changed key, or the tensors of another shape.
    """
    from retemper.pipeline.config.validate import check_setup
    from retemper.pipeline.huggingface import verify
    from retemper.pipeline.huggingface.load import fill
    from retemper.pipeline.huggingface.names import Shard
    from retemper.pipeline.huggingface.source_folder import Weights
    from retemper.pipeline.model.build import build_layers

    try:
        weights = Weights(folder)
        method = MethodConfig(name="full")
        setup = ModelSetup(
            model=weights.model, method=method, parallel=ParallelConfig(), precision="fp32"
        )
        check_setup(setup)
        reference = verify._reference(folder, None)
    except UserError as error:
        other_shapes = "does not hold the model of its config.json" in str(error)
        assert (other_shapes and SHAPES & changed.keys()) or any(
            key in str(error) for key in changed
        ), (changed, error)
        return False
    [model] = build_layers(setup, place)
    fill(model, weights, Shard(setup.model))
    tokens_BT = torch.arange(min(setup.model.max_sequence_length, 200))[None]
    with torch.no_grad():
        ours = model.eval()(tokens_BT, torch.arange(tokens_BT.shape[1])[None], attention_mask=None)
        theirs = reference(tokens_BT).logits
    figures = verify._compare(ours[..., : setup.model.vocab_size], theirs, rounded=False)
    assert figures["equal"], (changed, figures)
    return True
