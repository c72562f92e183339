"""Test the plan's parameters against built models, and its memory against training steps.

Both run on real ranks.
"""

import random

import pytest
from conftest import TINY, launch

LORA = ["method=lora", "method.lora.rank=4", "init_from=unread"]
TWO_RANKS = {"tp2": ["parallel=tp2"], "pp2": ["parallel=pp2"]}
MORE_OF_TWO = {
    "tp2sp": ["parallel=tp2", "parallel.sequence_parallel=true"],
    "pp2vpp2": ["parallel=pp2", "parallel.virtual_pipeline_parallel_size=2"],
    "cp2": ["parallel=cp2"],
    "dp2": ["parallel=dp2"],
}
MODELS = {
    "full": [],
    "tied": ["model.tie_embeddings=true"],
    "biased": ["model.qkv_bias=true", "model.qk_norm=true", "model.head_size=24"],
    "lora": LORA,
    "lora-tied-biased": [
        *LORA,
        "model.tie_embeddings=true",
        "model.qkv_bias=true",
        "method.lora.targets=[q,down]",
    ],
    "dora": [*LORA, "method.lora.dora=true"],
    "pissa": [*LORA, "method.lora.pissa=true", "method.lora.targets=attention"],
}


def probe(world_size: int, name: str, *changes: list[str]) -> None:
    unread = ["name=plan", "data=demo_math", "data.path=unread", "data.tokenizer=unread"]
    cases = [
        {"probe": name, "overrides": [*TINY, *unread, "model.num_layers=4", *changed]}
        for changed in changes
    ]
    launch(world_size, cases, "probes")


def test_planned_counts_equal_those_of_built_models():
    probe(1, "counts", *MODELS.values())
    probe(
        2,
        "counts",
        *([*model, *layout] for model in MODELS.values() for layout in TWO_RANKS.values()),
    )


DEMO = [["run=demo_full", "init_from=null"], ["run=demo_lora", "init_from=unread"]]


def demo(world_size: int, *layouts: list[str]) -> None:
    launch(
        world_size,
        [{"probe": "memory", "overrides": [*run, *layout]} for layout in layouts for run in DEMO],
        "probes",
    )


def test_planned_memory_of_the_demo_equals_that_of_its_steps():
    demo(2, TWO_RANKS["tp2"])


@pytest.mark.slow
def test_planned_memory_covers_dropout():
    dropout = ["dropout.attention=0.1", "dropout.hidden=0.1"]
    demo(2, [*TWO_RANKS["tp2"], *dropout], [*MORE_OF_TWO["cp2"], *dropout])


SCORED = ["evals.micro_batch_size=16", "train.micro_batch_size=1", "parallel.recompute=full"]


@pytest.mark.slow
def test_planned_memory_covers_scoring():
    demo(1, ["parallel=single", *SCORED])


RECOMPUTED = [f"parallel.recompute={how}" for how in ("selective", "full")]
SWIGLU = [*LORA, "parallel.recompute=swiglu"]


# Small micro-batches of scoring, so that training holds the most.
OTHERS_OF_ONE = [
    ["parallel=single", *changed, "evals.micro_batch_size=1"]
    for changed in ([RECOMPUTED[0]], [RECOMPUTED[1]], ["precision=bf16"], SWIGLU)
]
OTHERS_OF_TWO = [
    [*layout, "train.micro_batch_size=2", "evals.micro_batch_size=1"]
    for layout in MORE_OF_TWO.values()
]
OTHERS_OF_TWO += [[*MORE_OF_TWO["tp2sp"], how, "evals.micro_batch_size=1"] for how in RECOMPUTED]
OTHERS_OF_TWO += [
    ["parallel=tp2", "precision=bf16", "evals.micro_batch_size=1"],
    ["parallel=dp2", *SCORED],
]


@pytest.mark.slow
def test_planned_memory_of_the_demo_in_other_layouts():
    demo(1, ["parallel=single"], *OTHERS_OF_ONE)
    demo(2, TWO_RANKS["pp2"], *OTHERS_OF_TWO)


def drawn_shape(draw: random.Random) -> list[str]:
    """Draw a shape, a method and the length and number of sequences.

    They are such that activations are most of the memory.
    """
    groups = draw.choice([2, 4])
    targets = draw.choice(["all", "attention", "mlp", "[q,v]"])
    changes = {
        "model.num_layers": 4,
        "model.hidden_size": (hidden := draw.choice([64, 96, 128])),
        "model.ffn_hidden_size": draw.choice([2, 3, 4]) * hidden,
        "model.num_attention_heads": draw.choice([4, 8]),
        "model.num_query_groups": groups,
        "model.vocab_size": draw.choice([200, 1000, 5000]),
        "model.max_sequence_length": 256,
        "model.tie_embeddings": draw.choice(["true", "false"]),
        "data.seq_length": draw.choice([128, 256]),
        "train.global_batch_size": 16,
        "train.micro_batch_size": draw.choice([2, 4, 8]),
        "train.tokens": "1M",
        "parallel.recompute": draw.choice(["none", "none", "selective", "full"]),
    }
    lora = [*LORA, f"method.lora.targets={targets}", f"method.lora.rank={draw.choice([4, 16])}"]
    return [*(f"{key}={value}" for key, value in changes.items()), *draw.choice([[], lora])]


@pytest.mark.slow
def test_planned_memory_of_random_shapes():
    draw = random.Random(1)
    probe(1, "memory", *(drawn_shape(draw) for _ in range(3)))
    probe(
        2,
        "memory",
        *([*drawn_shape(draw), *layout] for layout in TWO_RANKS.values() for _ in range(2)),
    )


@pytest.mark.slow
def test_planned_memory_of_many_random_shapes():
    draw = random.Random(2)
    probe(1, "memory", *(drawn_shape(draw) for _ in range(20)))
    probe(
        2,
        "memory",
        *(
            [*drawn_shape(draw), *layout]
            for layout in (TWO_RANKS | MORE_OF_TWO).values()
            for _ in range(6)
        ),
    )
