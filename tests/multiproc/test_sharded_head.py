"""Test the loss of a frozen output layer by pieces, against whole logits, at every layout."""

from conftest import launch, overrides

LORA = ["method=lora", "method.lora.rank=4", "init_from=unread"]
TIED = "model.tie_embeddings=true"
TP2 = ["parallel=tp2"]
SEQUENCE_PARALLEL = [*TP2, "parallel.sequence_parallel=true"]


def look(workspace, world_size: int, *changes: list[str]) -> None:
    """Look at a model with each of the changes, at pieces that divide its tokens and at others."""
    cases = []
    for number, changed in enumerate(changes):
        asked = overrides(workspace, "heads", "model.num_layers=4", *LORA, *changed)
        cases.append({"overrides": asked, "piece": (64, 100)[number % 2]})
    launch(world_size, cases, "heads")


def test_one_rank(workspace):
    look(workspace, 1, [], [], [TIED], ["method.lora.targets=mlp", "parallel.recompute=full"])


def test_two_ranks(workspace):
    look(workspace, 2, TP2, TP2, SEQUENCE_PARALLEL, SEQUENCE_PARALLEL)
    look(workspace, 2, [*SEQUENCE_PARALLEL, TIED], ["parallel=cp2"])
    look(workspace, 2, ["parallel=pp2", TIED], ["parallel=pp2"])


def test_a_shard_of_padding_only(workspace):
    # 60 tokens are padded to two shards of 64.
    changes = ["model.vocab_size=60", "model.hidden_size=96"]  # no other size is 64
    look(workspace, 2, [*TP2, *changes], [*SEQUENCE_PARALLEL, *changes])
