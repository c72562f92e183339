"""Test messages of `plan`, `launch` and `train` about missing bases, trunks and branches."""

import json

import pytest
from conftest import overrides

from retemper.pipeline.checkpoint.commit import folder_of
from retemper.pipeline.checkpoint.trunk import branches_of, check_against_trunk, check_trunk
from retemper.pipeline.cli import main
from retemper.pipeline.config.compose import load_config
from retemper.pipeline.entry.preflight import preflight
from retemper.pipeline.errors import UserError
from retemper.pipeline.estimate.plan import Machine, plan
from retemper.pipeline.schema.run import Config

STEP = 8 * 64
H100 = Machine(gpu="H100", gpu_memory=80, gpus_per_node=8, mfu=None, price=None)


def plan_lines(config: Config) -> list[str]:
    return list(plan(config, H100))


@pytest.fixture
def run_verb(capsys):
    """Return a function that runs a command and returns its exit code and both output streams."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        return code, *capsys.readouterr()

    return run


SEVEN_B = [
    "study=s",
    "name=n",
    "data=starcoder_python",
    "data.path=unmade",
    "train.tokens=1B",
    "optimizer.lr=1e-5",
]
SEVEN_B += ["train.global_batch_size=8", "train.micro_batch_size=1", "method=lora"]


@pytest.mark.parametrize(
    "verb",
    [["plan"], ["launch", "--target", "slurm"], ["launch", "--target", "torchrun"], ["train"]],
)
def test_run_with_a_missing_base_is_planned_only_with_a_model_shape(run_verb, verb, tmp_path):
    arguments = [*SEVEN_B, f"init_from={tmp_path / 'typo'}"]
    code, out, error = run_verb(*verb, *arguments)
    assert code == 1
    assert out == ""
    assert f"init_from={tmp_path / 'typo'} is not here" in error
    code, out, error = run_verb(*verb, *arguments, "model=llama2_7b")
    line = f"base not here: shape from model=; `train` needs init_from={tmp_path / 'typo'}"
    if verb == ["train"]:
        assert code == 1
        assert out == ""
        return
    assert code == 0
    assert line in (out if verb == ["plan"] else error).splitlines()
    if verb[-1] == "slurm":
        assert out.startswith("#!/bin/bash\n")  # nothing is printed before the script


def test_train_refuses_a_missing_base(workspace):
    with pytest.raises(UserError, match="no-base"):
        preflight(load_config(overrides(workspace, "x", f"init_from={workspace / 'no-base'}")))


def test_run_with_an_existing_base_is_planned_without_a_note(tmp_path, run_verb):
    config = load_config([*SEVEN_B, "init_from=unread", "model=llama2_7b"])
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(config.to_json())
    code, out, error = run_verb("plan", *SEVEN_B, f"init_from={tmp_path / 'base'}")
    assert code == 0
    assert error == ""
    assert "not here" not in out
    assert "6,738,415,616 frozen" in out


def write_run(config: Config, *steps: int) -> Config:
    """Write the folder of a started run, with empty checkpoints after these steps."""
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.json").write_text(config.to_json())
    for step in steps:
        folder_of(config.run_dir, step).mkdir(parents=True)
        (folder_of(config.run_dir, step) / "meta.json").touch()
    return config


@pytest.fixture
def trunk(tmp_path) -> Config:
    return write_run(
        load_config(
            overrides(tmp_path, "trunk", "train.branches=[5120]", "optimizer.weight_decay=0.1")
        ),
        8,
        10,
    )


def branch(trunk: Config, *changes: str) -> Config:
    of_trunk = [f"branch_of={trunk.run_dir}", "optimizer.weight_decay=0.1"]
    workspace = trunk.run_dir.parent.parent.parent
    return load_config([*overrides(workspace, "branch"), *of_trunk, *changes])


MAY_DIFFER = [
    "optimizer.lr=1e-4",
    "optimizer.weight_decay=0",
    "schedule.warmup_tokens=2048",
    "schedule.min_lr_ratio=0.1",
]
MAY_DIFFER += [
    "train.micro_batch_size=4",
    "parallel=tp2",
    "evals.max_samples=3",
    "evals.heldout={}",
    "train.log_every_steps=2",
]
MAY_DIFFER += [
    "checkpoint.save_every_steps=2",
    "anomaly.policy=rollback",
    "train.cuda_graph=off",
    "study=elsewhere",
]


@pytest.mark.parametrize("change", [*MAY_DIFFER, None])
def test_branch_may_differ_from_its_trunk_in_certain_keys(trunk, change):
    check_trunk(branch(trunk, *([change] if change else MAY_DIFFER)))


def test_branch_length_needs_a_trunk_checkpoint_where_its_cooldown_begins(trunk):
    check_trunk(branch(trunk, f"train.tokens={10 * STEP + 7}"))  # also ten whole steps
    with pytest.raises(UserError) as refusal:
        check_trunk(branch(trunk, f"train.tokens={20 * STEP}"))
    assert "begins after step 16, of which the trunk has no checkpoint (it has: 8, 10)" in str(
        refusal.value
    )
    assert f"train.branches=[{20 * STEP}]" in str(refusal.value)
    check_trunk(
        branch(trunk, f"train.tokens={20 * STEP}", "schedule.cooldown_fraction=0.5")
    )  # begins after step 10


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["optimizer.beta1=0.8"], "optimizer.beta1: 0.9 -> 0.8"),
        (["optimizer.beta2=0.999"], "optimizer.beta2: 0.95 -> 0.999"),
        (["optimizer.eps=1e-6"], "optimizer.eps: 1e-08 -> 1e-06"),
        (["optimizer.clip_grad=0"], "optimizer.clip_grad: 1.0 -> 0.0"),
        (["optimizer=lion", "optimizer.lr=1e-4"], 'optimizer.name: "adamw" -> "lion"'),
        (["train.global_batch_size=16"], "train.global_batch_size: 8 -> 16"),
        (["seed=18"], "seed: 17 -> 18"),
        (["precision=bf16"], 'precision: "fp32" -> "bf16"'),
        (["data.name=other"], 'data.name: "math" -> "other"'),
        (["data.seq_length=32"], "data.seq_length: 64 -> 32"),
        (["data.mask_documents=true"], "data.mask_documents: false -> true"),
        (["data.replay.path=x", "data.replay.fraction=0.1"], "data.replay: null -> "),
        (
            ["method=lora", "method.lora.rank=4", "init_from=unread"],
            'method.name: "full" -> "lora"',
        ),
    ],
)
def test_branch_that_differs_in_another_key_is_refused_and_the_key_named(trunk, changes, key):
    changed = branch(trunk, *changes)
    for check in (check_trunk, check_against_trunk, plan_lines):
        with pytest.raises(UserError) as refusal:
            check(changed)
        assert f"\n  - {key}" in str(refusal.value)
        assert str(refusal.value).startswith(f"branch_of={trunk.run_dir}: ")


def test_branch_with_another_shape_or_adapter_is_refused_and_the_key_named(tmp_path):
    lora = ["method=lora", "init_from=unread", "optimizer.weight_decay=0.1"]
    trunk = write_run(
        load_config(
            overrides(tmp_path, "trunk", "train.branches=[5120]", *lora, "method.lora.rank=4")
        ),
        8,
    )
    with pytest.raises(UserError, match="model.num_layers: 2 -> 4"):
        branch(trunk, *lora, "model.num_layers=4")
    for change, key in (
        (["method.lora.rank=8"], "method.lora.rank: 4 -> 8"),
        (["method.lora.rank=4", "method.lora.targets=mlp"], "method.lora.targets: "),
        (["method.lora.rank=4", "method.lora.alpha=32"], "method.lora.alpha: 8.0 -> 32.0"),
        (["method.lora.rank=4", "method.lora.lr_ratio=4"], "method.lora.lr_ratio: 1.0 -> 4.0"),
    ):
        with pytest.raises(UserError, match=key):
            check_trunk(branch(trunk, *lora, *change))
    check_trunk(branch(trunk, *lora, "method.lora.rank=4"))


def test_missing_trunk_is_refused_by_training_but_not_by_planning(trunk, tmp_path):
    missing = trunk.model_copy(update={"name": "away"})
    orphan = branch(missing)
    note = f"trunk not here: shape from model=; `train` needs branch_of={missing.run_dir}"
    assert note in plan_lines(orphan)
    with pytest.raises(UserError, match=f"branch_of={missing.run_dir}: there is no run"):
        check_trunk(orphan)
    # A branch that resumes from a checkpoint of its own needs no trunk.
    write_run(orphan, 9)
    check_trunk(orphan)


def test_older_trunk_gets_the_defaults_of_keys_added_later(trunk):
    raw = json.loads(trunk.to_json())
    del raw["fp8"], raw["train"]["cuda_graph"], raw["model"]["qk_norm"]
    (trunk.run_dir / "config.json").write_text(json.dumps(raw))
    check_trunk(branch(trunk))


def test_imported_model_is_refused_as_a_trunk(tmp_path, trunk):
    path = trunk.run_dir / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({key: raw[key] for key in ("model", "method", "parallel")}))
    with pytest.raises(UserError, match="an imported model is named in init_from"):
        check_trunk(branch(trunk))


def test_generated_branches_match_their_trunk(trunk):
    for branch_config in branches_of(trunk):
        check_trunk(branch_config)


def test_plan_prints_how_each_branch_ends(tmp_path):
    tokens = [5 * STEP, 10 * STEP, 20 * STEP]
    changes = [
        f"train.branches={tokens}",
        f"train.tokens={16 * STEP}",
        f"schedule.warmup_tokens={8 * STEP}",
    ]
    config = load_config(overrides(tmp_path, "trunk", *changes))
    assert [line for line in plan_lines(config) if line.startswith("branch")] == [
        "branch trunk-2560: 5 steps; ends within its warm-up at 50% of the peak rate",
        "branch trunk-5120: 10 steps; cools down; its last step is at 50% of the peak rate",
        "branch trunk-10240: 20 steps; cools down; its last step is at 25% of the peak rate",
    ]


def test_run_prints_how_its_branch_ends_and_what_differs_from_the_trunk(trunk):
    from retemper.pipeline.train.branches import introduction

    lines = introduction(
        branch(trunk, "optimizer.lr=1e-4", "schedule.warmup_tokens=9216", "evals.max_samples=3")
    )
    assert lines == [
        f"branch of {trunk.run_dir}: ends within its warm-up at 50% of the peak rate",
        "other than its trunk's: optimizer.lr: 0.005 -> 0.0001",
        "other than its trunk's: schedule.warmup_tokens: 1024 -> 9216",
    ]
