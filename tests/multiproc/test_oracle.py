"""Compare full training and every kind of LoRA at every layout with one rank, the oracle.

Initial weights, gradients and weight changes must be the same. A checkpoint does not depend on its
layout, and contains Adam's first moment: after one step that is the gradient.
"""

import pytest
import torch
from conftest import bits_per_byte, launch, overrides
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from retemper.pipeline.checkpoint.commit import folder_of
from retemper.pipeline.runs import run_folder

TWO_RANKS = {
    "tp2": ["parallel=tp2"],
    "tp2sp": ["parallel=tp2", "parallel.sequence_parallel=true"],
    "pp2": ["parallel=pp2"],
    # Four micro-batches: with the two of one group no rank sends to both neighbours at once.
    "pp2vpp2": [
        "parallel=pp2",
        "parallel.virtual_pipeline_parallel_size=2",
        "train.micro_batch_size=2",
    ],
    "cp2": ["parallel=cp2"],
    # Two micro-batches on a rank: their gradients are summed before ranks exchange them.
    "dp2": ["parallel=dp2", "train.micro_batch_size=2"],
}
FOUR_RANKS = {
    "tp2pp2": ["parallel=tp2", "parallel.pipeline_parallel_size=2"],
    "tp2spcp2": [
        "parallel=tp2",
        "parallel.sequence_parallel=true",
        "parallel.context_parallel_size=2",
    ],
}
# Layouts under which activations are computed again in the backward pass.
RECOMPUTED = {"full": "tp2sp", "selective": "pp2vpp2"}
TWO_RANKS |= {
    f"{layout}-{recompute}": [*TWO_RANKS[layout], f"parallel.recompute={recompute}"]
    for recompute, layout in RECOMPUTED.items()
}
TWO_RANKS |= {
    f"{layout}-overlap": [*TWO_RANKS[layout], "parallel.overlap=true"]
    for layout in ("dp2", "pp2vpp2")
}
LAYOUTS = TWO_RANKS | FOUR_RANKS
WHOLE = {"full": [], "tied": ["model.tie_embeddings=true"]}
METHODS = WHOLE | {
    f"r{rank}-{targets}": [
        "method=lora",
        f"method.lora.rank={rank}",
        "method.lora.alpha=32",
        f"method.lora.targets={targets}",
    ]
    for rank in (4, 16)
    for targets in ("all", "attention", "mlp")
}
VARIANTS = {name: [*METHODS["r4-all"], f"method.lora.{name}=true"] for name in ("dora", "pissa")}
# Of a fused layer's parts some have no adapter.
PARTS = [
    "method=lora",
    "method.lora.rank=4",
    "method.lora.alpha=32",
    "method.lora.targets=[q,v,up]",
]
VARIANTS |= {"parts": PARTS, "parts-dora": [*PARTS, "method.lora.dora=true"]}
# A scale of 2: at 16 the gradient norm leaps from 0.9 to 24 in one step, and float32's rounding
# with it (docs/dev/log.md).
VARIANTS["rslora-plus"] = [
    "method=lora",
    "method.lora.rank=4",
    "method.lora.alpha=4",
    "method.lora.rslora=true",
    "method.lora.lr_ratio=4",
]
PAIRS = [(method, layout) for method in ("full", "r4-all") for layout in TWO_RANKS]
PAIRS += [(method, "tp2sp") for method in ("r4-attention", "r16-mlp")]
# Selective recomputation breaks if only feed-forward layers are adapted, full recomputation if the
# embeddings require no gradient.
PAIRS += [("r16-mlp", f"{layout}-{recompute}") for recompute, layout in RECOMPUTED.items()]
PAIRS += [(method, "tp2sp") for method in VARIANTS]
# The first and the last stage have a copy each of a tied weight, and a part each of its gradient.
PAIRS += [("tied", layout) for layout in ("tp2sp", "pp2vpp2")]
SLOW_PAIRS = [
    (method, layout)
    for method in METHODS | VARIANTS
    for layout in LAYOUTS
    if (method, layout) not in PAIRS
]
# Only an adapted layer that is one function with its adapter recomputes the product of SwiGLU.
TWO_RANKS["tp2sp-swiglu"] = [*TWO_RANKS["tp2sp"], "parallel.recompute=swiglu"]
PAIRS.append(("r16-mlp", "tp2sp-swiglu"))
# What the presets for 8 and more GPUs combine.
COMBINED = {
    name: [
        *TWO_RANKS[layout],
        "parallel.data_parallel_size=2",
        "parallel.recompute=selective",
        "parallel.overlap=true",
        "train.micro_batch_size=2",
    ]
    for name, layout in {"tp2spdp2-combined": "tp2sp", "pp2vpp2dp2-combined": "pp2vpp2"}.items()
}
FOUR_RANKS |= COMBINED
SLOW_PAIRS += [(method, layout) for method in ("full", "tied", "r4-all") for layout in COMBINED]
# Fault -> the method and the layout that show it.
FAULTS = {
    "unmarked_adapter_factor": ("r4-all", "tp2sp"),
    "adapters_initialised_by_layout": ("r4-all", "tp2"),
    "adapter_shards_lost_at_save": ("r4-all", "tp2"),
    "recompute_closed_to_gradients": ("r4-all", "tp2sp-full"),
    "qk_norm_of_own_heads": ("full", "tp2"),
    "shards_left_out_of_norm": ("full", "tp2"),
}
STEPS = 5


@pytest.fixture(scope="module")
def case(workspace):
    """Return a function that makes a run of five steps.

    The run saves checkpoints after the first and the last step.
    """

    def make(method, name, *changes, **how):
        # The first step's rate is zero: the checkpoint after it has initial weights beside the
        # first gradient. With eps as large as a gradient Adam does not make the sign of a rounding
        # error into a step.
        asked = [
            f"train.tokens={STEPS * 8 * 64}",
            f"checkpoint.milestones=[{8 * 64}]",
            "optimizer.eps=1e-3",
        ]
        # With overlap, scoring meets weights that are still being gathered.
        if "overlap" not in name and name != "full-single":
            asked.append("evals.heldout={}")
        asked += [
            "study=oracle",
            "model.num_layers=4",
            # What Qwen 2 and 3 have beside Llama's weights; both are of one rank's heads.
            "model.qkv_bias=true",
            "model.qk_norm=true",
            "train.micro_batch_size=4",
            *(METHODS | VARIANTS)[method],
        ]
        if method != "tied" and name != "full-base":
            asked.append(f"init_from={workspace / 'runs' / 'oracle' / 'full-base'}")
        return {"overrides": overrides(workspace, name, *asked, *changes)} | how

    return make


def launch_pairs(case, pairs, *more) -> None:
    for world_size, layouts in ((2, TWO_RANKS), (4, FOUR_RANKS)):
        cases = [
            case(method, f"{method}-{layout}", *layouts[layout])
            for method, layout in pairs
            if layout in layouts
        ]
        if cases := cases + [make for make, size in more if size == world_size]:
            launch(world_size, cases, timeout=1800)


@pytest.fixture(scope="module")
def runs(workspace, case):
    """Run PAIRS, their methods on one rank, and FAULTS."""
    launch(
        1,
        [case("full", "full-base"), *(case(method, f"{method}-single") for method in dict(PAIRS))],
    )
    launch_pairs(
        case,
        PAIRS,
        *(
            (case(method, fault, *LAYOUTS[layout], fault=fault), 2)
            for fault, (method, layout) in FAULTS.items()
        ),
    )
    return workspace / "runs" / "oracle"


@pytest.fixture(scope="module")
def slow_runs(case, runs):
    launch(
        1,
        [
            case(method, f"{method}-single")
            for method in (METHODS | VARIANTS).keys() - dict(PAIRS).keys()
        ],
    )
    launch_pairs(case, SLOW_PAIRS)
    return runs


def tensors(run, step: int) -> dict[str, torch.Tensor]:
    """Return the whole weights and optimizer states of a checkpoint."""
    folder = folder_of(run, step)
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size)
        for key, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, checkpoint_id=folder, no_dist=True)
    return state


def differences(run, reference) -> list[str]:
    """Return what differs by more than 1e-5 of the reference.

    Losses, gradient norms, initial weights, gradients, and how far weights moved are compared.
    Initial weights that are drawn differ by no bit; those that DoRA and PiSSA compute from the base
    may round differently.
    """
    first, last, first_expected, last_expected = (
        tensors(run, 1),
        tensors(run, STEPS),
        tensors(reference, 1),
        tensors(reference, STEPS),
    )
    if first.keys() != first_expected.keys() or any(
        first[key].shape != first_expected[key].shape for key in first
    ):
        return ["names or shapes"]
    metrics, expected = (list(run_folder.read_metrics(where)) for where in (run, reference))
    found = [
        name
        for name in ("loss", "grad_norm")
        if [record[name] for record in metrics]
        != pytest.approx([record[name] for record in expected], rel=1e-5)
    ]
    for key in first:
        if "exp_avg_sq" in key:
            continue
        held = 0.0
        if "exp_avg" in key:
            compared = {
                f"first gradient, {key}": (first[key], first_expected[key]),
                f"gradients, {key}": (last[key], last_expected[key]),
            }
        else:
            held = (
                2**-24 * first[key].norm()
            )  # what float32 can say of a weight: half a unit in the last place
            compared = {
                f"change of {key}": (
                    last[key] - first[key],
                    last_expected[key] - first_expected[key],
                )
            }
            if "dora" in run.name or "pissa" in run.name:
                compared[f"initial {key}"] = first[key], first_expected[key]
            elif not first[key].equal(first_expected[key]):
                found.append(f"initial {key}")
        found += [
            name
            for name, (got, wanted) in compared.items()
            if (got - wanted).norm() > 1e-5 * wanted.norm() + held
        ]
    return found


@pytest.mark.parametrize(("method", "layout"), PAIRS)
def test_every_layout_trains_as_one_rank_does(runs, method, layout):
    assert differences(runs / f"{method}-{layout}", runs / f"{method}-single") == []


@pytest.mark.parametrize("layout", ["dp2-overlap", "pp2vpp2-overlap"])
def test_heldout_scores_with_overlap_are_those_of_one_rank(runs, layout):
    scores = bits_per_byte(runs / "full-single")
    assert scores and bits_per_byte(runs / f"full-{layout}") == pytest.approx(scores, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "layout"), SLOW_PAIRS)
def test_every_other_layout_trains_as_one_rank_does(slow_runs, method, layout):
    assert differences(slow_runs / f"{method}-{layout}", slow_runs / f"{method}-single") == []


@pytest.mark.parametrize("method", dict(PAIRS))
def test_every_trainable_weight_changes(runs, method):
    first, last = tensors(runs / f"{method}-single", 1), tensors(runs / f"{method}-single", STEPS)
    weights = [key for key in first if not key.startswith("optimizer.")]
    assert weights and all(
        ((last[key] - first[key]).norm() > 0) != key.endswith("_initial") for key in weights
    )
    assert all((".lora_" in key) == (method not in WHOLE) for key in weights)


@pytest.mark.parametrize("method", [method for method in dict(PAIRS) if method not in WHOLE])
def test_every_method_begins_with_the_loss_of_the_base(runs, method):
    first, base = (
        next(run_folder.read_metrics(runs / f"{name}-single"))["loss"] for name in (method, "full")
    )
    assert first == pytest.approx(base, rel=1e-6)


@pytest.mark.parametrize("fault", FAULTS)
def test_bugs_of_other_projects_are_detected(runs, fault):
    method, _layout = FAULTS[fault]
    assert differences(runs / fault, runs / f"{method}-single")


def probe(workspace, world_size: int, name: str, *changes: list[str]) -> None:
    """Look at a model with each of the changes."""
    cases = [
        {"probe": name, "overrides": overrides(workspace, "probe", "model.num_layers=4", *changed)}
        for changed in changes
    ]
    launch(world_size, cases, "probes")


LORA = [*METHODS["r4-all"], "init_from=unread"]


def test_dropout_masks_agree_where_activations_do(workspace):
    layouts = [TWO_RANKS[name] for name in ("tp2", "tp2sp", "dp2", "cp2", "tp2sp-full")] + [
        [*TWO_RANKS["tp2"], "parallel.recompute=full"]
    ]
    probe(
        workspace,
        2,
        "dropout",
        *([*LORA, "method.lora.dropout=0.5", *layout] for layout in layouts),
    )


def test_frozen_base_has_no_gradients_or_optimizer_state(workspace):
    probe(workspace, 1, "frozen", LORA, [*LORA, "method.lora.targets=mlp", "optimizer=lion"], [])
