"""Test that losses and scores are the same on one rank, on two, and after every restart.

test_oracle.py compares every weight and gradient.
"""

import json
import shutil
from pathlib import Path

import pytest
from conftest import bits_per_byte, launch, overrides, run_command

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.data.ledger import read_ledger
from retemper.pipeline.runs import eval_folder, run_folder

LAYOUTS = {
    "tp2": ["parallel=tp2"],
    "tp2sp": ["parallel=tp2", "parallel.sequence_parallel=true"],
    "pp2": ["parallel=pp2"],
    "dp2": ["parallel=dp2"],
}
# At 5e-3 the adapters' gradient norm leaps from 0.3 to 1.1 in one step, and float32's rounding
# with it (docs/dev/log.md).
LORA = ["method=lora", "method.lora.rank=4", "method.lora.alpha=32", "optimizer.lr=1e-3"]


# Sharded over data-parallel ranks when it stops, its states are resharded for what it goes on with.
LION = ["optimizer=lion", "optimizer.lr=5e-4", "optimizer.weight_decay=0.01"]


# Runs whose held-out scores are looked at.
SCORED = {
    "base",
    "lora-learns",
    *(f"{method}-{where}" for method in ("full", "lora") for where in ("single", "tp2", "pp2")),
}
SCORED |= {f"masked-{where}" for where in ("one", "single", *LAYOUTS)}
SCORED |= {f"prompts-{where}" for where in ("single", "cp2")}

# What a restart must restore beside weights and optimizer: the data position, the seed, the random
# state of dropout.
RESTART_FAULTS = ["lost_data_position", "another_seed", "lost_random_state"]


@pytest.fixture(scope="module")
def runs(workspace, pairs):
    """Train every run of this module by one launch of one rank and one launch of two."""
    base = f"init_from={workspace / 'runs' / 'test' / 'base'}"

    def case(name, *changes, **how):
        continued = [] if name == "base" else [base]
        corpus = "math" if name == "base" else "code"
        scored = [] if name in SCORED else ["evals.heldout={}"]
        return {
            "overrides": overrides(workspace, name, *continued, *scored, *changes, corpus=corpus)
        } | how

    def interrupted(name, *changes, layout="tp2"):
        return case(name, *changes, *LAYOUTS[layout], "checkpoint.save_every_steps=5", stop_after=7)

    def restarted(after, name, *changes, **how):
        """Continue a copy of the interrupted run `name`, in runs/after-…"""
        where = [
            f"runs_dir={workspace / 'runs' / f'after-{after}'}",
            "checkpoint.save_every_steps=5",
        ]
        return case(name, *changes, *where, copy_of=str(workspace / "runs" / "test" / name), **how)

    methods = {"full": [], "lora": LORA}
    masked = [
        f"data.path={pairs}",
        "data.name=pairs",
        "data.mask_documents=true",
        "init_from=null",
        "optimizer.lr=1e-3",
        f"data.mixture.math.path={workspace / 'data' / 'math'}",
        "data.mixture.math.fraction=0.25",
    ]  # prompts and padding without loss
    # The two ranks of cp2 have numbers of labelled tokens that differ.
    prompts = [*masked, "data.mask_documents=false"]
    launch(
        1,
        [
            case("base"),
            case("masked-single", *masked),
            case("prompts-single", *prompts),
            case("masked-one", *masked, "evals.micro_batch_size=1"),
            case("lora-learns", *LORA, "optimizer.lr=5e-3"),
            *(case(f"{method}-single", *changes) for method, changes in methods.items()),
        ],
    )
    cases = [
        case(f"{method}-{layout}", *changes, *LAYOUTS[layout])
        for method, changes in methods.items()
        for layout in ("tp2", "pp2")
    ]
    cases += [
        case("prompts-cp2", *prompts, "parallel=cp2"),
        case("prompts-fault", *prompts, "parallel=cp2", fault="mean_over_own_tokens"),
    ]
    cases += [case(f"masked-{layout}", *masked, *LAYOUTS[layout]) for layout in LAYOUTS]
    cases += [case("lora-fault", *LORA, *LAYOUTS["tp2"], fault="unreduced_adapter_gradient")]
    for method, changes in methods.items():
        cases += [interrupted(f"{method}-cut", *changes)]
        cases += [
            restarted(then, f"{method}-cut", *changes, *LAYOUTS[then]) for then in ("tp2", "pp2")
        ]
    cases += [
        case("lion-dp2", *LION, *LAYOUTS["dp2"]),
        interrupted("lion-cut", *LION, layout="dp2"),
    ]
    cases += [restarted(then, "lion-cut", *LION, *LAYOUTS[then]) for then in ("dp2", "tp2", "pp2")]
    cases += [
        restarted("forgetting", "lion-cut", *LION, *LAYOUTS["dp2"], fault="lost_optimizer_state")
    ]
    cases += [restarted("forgetting", "full-cut", *LAYOUTS["tp2"], fault="lost_optimizer_state")]
    dropout = [*LORA, "method.lora.dropout=0.1", "data.ledger=true"]
    cases += [case("dropout", *dropout, *LAYOUTS["tp2"]), interrupted("dropout-cut", *dropout)]
    cases += [
        restarted(fault, "dropout-cut", *dropout, *LAYOUTS["tp2"], fault=fault)
        for fault in (None, *RESTART_FAULTS)
    ]
    launch(2, cases)
    return workspace / "runs" / "test"


def curve(run: Path, key: str) -> list[float]:
    records = list(run_folder.read_metrics(run))
    assert [record["step"] for record in records] == list(range(1, 11))
    return [record[key] for record in records]


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_first_ten_losses_agree_with_one_rank(runs, method, layout):
    for key in ("loss", "grad_norm"):
        assert curve(runs / f"{method}-{layout}", key) == pytest.approx(
            curve(runs / f"{method}-single", key), rel=1e-5
        ), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_documents_and_prompts_of_a_mixture_agree_with_one_rank(runs, layout):
    for key in ("loss", "loss/pairs", "loss/math", "grad_norm"):
        assert curve(runs / f"masked-{layout}", key) == pytest.approx(
            curve(runs / "masked-single", key), rel=1e-5
        ), key


def test_masked_prompts_agree_with_one_rank_under_context_parallelism(runs):
    expected = {key: curve(runs / "prompts-single", key) for key in ("loss", "grad_norm")}
    for key, values in expected.items():
        assert curve(runs / "prompts-cp2", key) == pytest.approx(values, rel=1e-5), key
        assert curve(runs / "prompts-fault", key) != pytest.approx(values, rel=1e-5), key
    scores = bits_per_byte(runs / "prompts-single")
    assert scores and bits_per_byte(runs / "prompts-cp2") == pytest.approx(scores, rel=1e-5)


@pytest.mark.parametrize("layout", ["single", *LAYOUTS])
def test_heldout_scores_under_document_masks_are_those_of_one_sample_at_a_time(runs, layout):
    alone, together = (eval_folder.read_scores(runs / f"masked-{name}") for name in ("one", layout))
    assert alone.keys() == together.keys() == {0, 10}
    for step, domains in alone.items():
        for domain, scores in domains.items():
            assert scores["stderr"] > 0
            for name, value in scores.items():
                assert together[step][domain][name] == pytest.approx(value, rel=1e-5), (
                    step,
                    domain,
                    name,
                )


def test_a_masked_document_has_the_losses_it_has_alone(workspace, pairs):
    changes = [f"data.path={pairs}", "data.name=pairs", "data.mask_documents=true"]
    launch(
        1,
        [
            {
                "probe": "documents",
                "overrides": overrides(workspace, "alone", *changes, "train.micro_batch_size=4"),
            }
        ],
        "probes",
    )


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_heldout_scores_agree_with_one_rank(runs, method, layout):
    expected, got = (
        eval_folder.read_scores(runs / f"{method}-{where}") for where in ("single", layout)
    )
    assert expected.keys() == got.keys() == {0, 10}
    for step, domains in expected.items():
        for domain, scores in domains.items():
            found = got[step][domain]
            assert found.pop("interval") == pytest.approx(scores.pop("interval"), rel=1e-5), (
                step,
                domain,
            )
            assert found == pytest.approx(scores, rel=1e-5), (step, domain)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_scores_made_later_equal_those_of_the_run(workspace, runs, method, tmp_path):
    shutil.copytree(runs / f"{method}-tp2", tmp_path / "test" / f"{method}-tp2")
    shutil.rmtree(tmp_path / "test" / f"{method}-tp2" / "evals")
    changes = [f"init_from={runs / 'base'}", *(LORA if method == "lora" else []), *LAYOUTS["tp2"]]
    asked = [
        *overrides(workspace, f"{method}-tp2", *changes, corpus="code"),
        f"runs_dir={tmp_path}",
    ]
    launch(2, [{"overrides": asked, "all": True}], "scored")
    assert eval_folder.read_scores(tmp_path / "test" / f"{method}-tp2") == eval_folder.read_scores(
        runs / f"{method}-tp2"
    )


def test_both_methods_learn(runs):
    for name, domain in (("base", "math"), ("full-single", "code"), ("lora-learns", "code")):
        scores = eval_folder.read_scores(runs / name)
        assert scores[10][domain]["bits_per_byte"] < scores[0][domain]["bits_per_byte"], name


def test_lora_starts_from_the_base(runs):
    assert curve(runs / "lora-tp2", "loss")[0] == pytest.approx(
        curve(runs / "full-tp2", "loss")[0], rel=1e-6
    )


def test_an_unreduced_adapter_gradient_is_detected(runs):
    broken, right = (
        curve(runs / "lora-fault", "grad_norm"),
        curve(runs / "lora-single", "grad_norm"),
    )
    # B is zero at first, so A's gradient, the one left unreduced, is zero until it has moved.
    assert broken[-1] != pytest.approx(right[-1], rel=1e-5)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_restart_equals_the_uninterrupted_run_bit_for_bit(runs, method):
    for key in ("loss", "grad_norm", "lr"):
        assert curve(runs.parent / "after-tp2" / "test" / f"{method}-cut", key) == curve(
            runs / f"{method}-tp2", key
        ), key


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_restart_at_another_layout_has_the_same_losses(runs, method):
    assert curve(runs.parent / "after-pp2" / "test" / f"{method}-cut", "loss") == pytest.approx(
        curve(runs / f"{method}-tp2", "loss"), rel=1e-5
    )


def test_a_restart_of_lion_is_equal_at_every_layout(runs):
    def after(layout, key="loss"):
        return curve(runs.parent / f"after-{layout}" / "test" / "lion-cut", key)

    for key in ("loss", "grad_norm", "lr"):
        assert after("dp2", key) == curve(runs / "lion-dp2", key), key
    for layout in ("tp2", "pp2"):
        assert after(layout) == pytest.approx(curve(runs / "lion-dp2", "loss"), rel=1e-5), layout


@pytest.mark.parametrize(("name", "layout"), [("full", "tp2"), ("lion", "dp2")])
def test_a_lost_optimizer_state_is_detected(runs, name, layout):
    broken, straight = (
        curve(run, "loss")
        for run in (
            runs.parent / "after-forgetting" / "test" / f"{name}-cut",
            runs / f"{name}-{layout}",
        )
    )
    assert broken[:5] == straight[:5] and broken[-1] != pytest.approx(straight[-1], rel=1e-5)


def test_a_restart_with_dropout_equals_the_uninterrupted_run(runs):
    assert curve(runs.parent / "after-None" / "test" / "dropout-cut", "loss") == curve(
        runs / "dropout", "loss"
    )
    straight, restarted = (
        read_ledger(runs / "dropout"),
        read_ledger(runs.parent / "after-None" / "test" / "dropout-cut"),
    )
    assert list(straight) == list(restarted) == list(range(1, 11))
    assert all((straight[step] == restarted[step]).all() for step in straight)


@pytest.mark.parametrize("fault", RESTART_FAULTS)
def test_state_left_out_of_a_restart_is_detected(runs, fault):
    straight, broken = (
        curve(runs / "dropout", "loss"),
        curve(runs.parent / f"after-{fault}" / "test" / "dropout-cut", "loss"),
    )
    assert broken[:5] == straight[:5] and broken[5:] != pytest.approx(straight[5:], rel=1e-5)
    same_samples = [
        (
            read_ledger(runs / "dropout")[step]
            == read_ledger(runs.parent / f"after-{fault}" / "test" / "dropout-cut")[step]
        ).all()
        for step in range(6, 11)
    ]
    assert all(same_samples) == (fault == "lost_random_state")


def test_a_lora_checkpoint_contains_only_adapters(runs):
    def size(name):
        return sum(
            path.stat().st_size
            for path in (runs / name / "checkpoints" / "step-00000010").glob("*.distcp")
        )

    assert size("lora-tp2") < size("full-tp2") / 2
    meta = json.loads(
        (runs / "lora-tp2" / "checkpoints" / "step-00000010" / "meta.json").read_text()
    )
    assert set(meta["fingerprints"]) == {"data", "tokenizer", "base"}


@pytest.mark.slow
def test_adapters_of_another_base_are_refused(runs, workspace):
    result = run_command(
        [
            "train",
            *overrides(
                workspace, "lora-single", f"init_from={runs / 'full-single'}", *LORA, corpus="code"
            ),
        ]
    )
    assert result.returncode == 1
    assert f"lora-single began from {runs / 'base'} after step 10, but " in result.stderr


def test_the_warmup_and_cooldown_are_the_closed_form(runs, workspace):
    config = load_config(overrides(workspace, "full-tp2"))
    peak, warmup, total = config.optimizer.lr, config.schedule.warmup_tokens, config.train.tokens
    cooldown = 0.2 * total

    def lr(tokens):
        return peak * min(tokens / warmup, 1.0, (total - tokens) / cooldown)

    assert curve(runs / "full-tp2", "lr") == pytest.approx(
        [lr(step * config.tokens_per_step) for step in range(10)], rel=1e-9
    )
