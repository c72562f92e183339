"""Test configs: presets that load, and one message for all problems."""

from pathlib import Path

import pytest
import yaml
from conftest import overrides

from retemper.pipeline.config.compose import (
    conf_dir,
    load_config,
    load_data_config,
    preset_names,
)
from retemper.pipeline.config.differences import changed_keys
from retemper.pipeline.config.existing_run import SCORING_OVERRIDES, load_run
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.run import Config
from retemper.pipeline.schema.section import defaults_of, fields_of, format_tokens, parse_tokens


def problems(*changes: str, tmp="/nowhere") -> str:
    from pathlib import Path

    with pytest.raises(UserError) as caught:
        load_config(overrides(Path(tmp), "x", *changes))
    return str(caught.value)


@pytest.mark.parametrize("name", preset_names("run"))
@pytest.mark.parametrize(
    "parallel", [name for name in preset_names("parallel") if "_" not in name]
)  # the others are of large models
def test_every_run_preset_loads_at_every_layout(name, parallel):
    config = load_config([f"run={name}", f"parallel={parallel}"])
    assert config.steps > 0
    assert config.milestone_steps[-1] == config.steps


@pytest.mark.parametrize("name", preset_names("data"))
def test_every_corpus_preset_loads(name):
    data = load_data_config(
        [f"data={name}", "study=x", "data.path=a", "data.tokenizer=b", "data.source.path=c"]
    )
    assert (data.path, data.source.path) == ("a", "c")


def test_a_corpus_that_cannot_be_is_refused_in_one_message():
    changes = [
        "data.executor=slurm",
        "data.tokens=100",
        "data.seq_length=4096",
        "data.source.kind=text",
        "data.source.prompt=x",
        "data.path=ftp://a",
    ]
    with pytest.raises(UserError) as refusal:
        load_data_config(["data=local", "data.tokenizer=b", "data.source.path=c", *changes])
    for said in (
        "data.slurm.partition=NAME",
        "less than one sample",
        "refers to columns of rows",
        "a folder, s3:// or gs://",
    ):
        assert said in str(refusal.value)


@pytest.mark.parametrize("group", ["model", "method", "optimizer", "schedule"])
def test_every_group_preset_loads(group):
    for name in preset_names(group):
        lora = ["init_from=runs/demo/base"] if name == "lora" else []
        optimizer = ["optimizer.lr=1e-3"] if group == "optimizer" else []
        assert load_config(["run=demo_base", f"{group}={name}", *lora, *optimizer])


@pytest.mark.parametrize("path", sorted(conf_dir().rglob("*.yaml")), ids=lambda path: path.stem)
def test_presets_have_no_value_that_is_the_default(path):
    group = path.parent.name if path.parent != conf_dir() else "run"
    preset = yaml.safe_load(path.read_text()) or {}
    preset.pop("defaults", None)
    defaults = defaults_of(Config)
    values = flat(preset if group in ("run", "_shared") else {group: preset})
    repeated = {key for key, value in values.items() if value == flat(defaults).get(key, ...)}
    by_key = {key: field for key, field in fields_of(Config) if not field.is_required()}
    repeated |= {key for key in values.keys() & by_key if values[key] == by_key[key].default}
    assert not repeated


def flat(section: dict, prefix: str = "") -> dict:
    """Return the values of a nested dictionary by their dotted keys."""
    values = {}
    for key, value in section.items():
        inner = flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else None
        values |= inner or {f"{prefix}{key}": value}
    return values


def test_a_preset_resets_what_another_of_its_group_set():
    assert load_config(["run=demo_full", "schedule=cosine"]).schedule.min_lr_ratio == 0.01
    again = load_config(["run=demo_full", "schedule=cosine", "schedule=trapezoid"]).schedule
    assert (again.min_lr_ratio, again.cooldown_fraction) == (0.0, 0.2)
    assert load_config(["run=demo_lora", "method=full", "init_from=null"]).method.lora is None


def test_a_preset_of_a_study_needs_the_study():
    with pytest.raises(UserError, match="data.path of a preset uses a key that is not set"):
        load_data_config(["data=demo_code"])


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("20B", 20 * 10**9),
        ("0.25B", 250_000_000),
        (4096, 4096),
        ("1.5K", 1500),
        ("2M", 2_000_000),
        ("1e6", 10**6),
    ],
)
def test_token_counts(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(250_000_000, "250M"), (20 * 10**9, "20B"), (81920, "81920"), (1500, "1500"), (2000, "2K")],
)
def test_token_counts_are_written_short_and_exact(tokens, text):
    assert format_tokens(tokens) == text and parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["20 billion", "-3", "", "1G", None, True])
def test_wrong_token_counts(text):
    with pytest.raises(ValueError):
        parse_tokens(text)


def test_all_problems_come_in_one_message_with_the_nearest_key():
    message = problems(
        "optimizer.beta1=high", "train.lr=1e-3", "parallel.tensor_parallel=2", "train.tokens=20G"
    )
    assert message.startswith("The configuration has 4 problems:")
    assert "train.lr: unknown key; did you mean optimizer.lr?" in message
    assert (
        "parallel.tensor_parallel: unknown key; did you mean parallel.tensor_parallel_size?"
        in message
    )
    assert "optimizer.beta1:" in message and "'high'" in message
    assert "train.tokens" in message and "20G" in message


def test_a_renamed_key_is_refused_with_its_new_name():
    assert "anomaly.left_out_steps is now anomaly.skip_batches" in problems(
        "anomaly.left_out_steps=2"
    )


def test_unknown_keys_and_impossible_layouts_come_together():
    message = problems("parallel.tensor_parallel_size=3", "train.lr=1e-3", "bogus=1")
    assert "did you mean optimizer.lr?" in message and "bogus: unknown key" in message
    assert "tensor_parallel_size=3 does not divide model.num_attention_heads=4" in message


def test_every_impossible_topology_is_named():
    message = problems(
        "parallel.tensor_parallel_size=3",
        "parallel.pipeline_parallel_size=5",
        "parallel.data_parallel_size=7",
    )
    assert "tensor_parallel_size=3 does not divide model.num_attention_heads=4" in message
    assert "tensor_parallel_size=3 does not divide model.num_query_groups=2" in message
    assert "pipeline_parallel_size=5 does not divide model.num_layers=2" in message
    assert (
        "train.global_batch_size=8 is not divisible by "
        "train.micro_batch_size × parallel.data_parallel_size = 2 × 7" in message
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["run=demo_bse"], "no such preset; available: demo_base"),
        (["nonsense"], "'nonsense' is not key=value"),
        (["method=lora"], "set init_from"),
        (["method.name=lora", "init_from=x"], "needs method.lora"),
        (["method.lora.rank=4"], "method.lora"),
        (["train.tokens=100"], "less than one step"),
        (["schedule.warmup_tokens=1M"], "schedule.warmup_tokens"),
        (
            ["schedule=inverse_sqrt", "schedule.warmup_tokens=0"],
            "set schedule.warmup_tokens above 0",
        ),
        (
            ["schedule=cosine", "schedule.cooldown_fraction=0.2"],
            "schedule.cooldown_fraction only applies to schedule=trapezoid",
        ),
        (["optimizer.name=sgd"], "optimizer.name: Input should be 'adamw' or 'lion'"),
        (["checkpoint.milestones=[1B]"], "beyond train.tokens"),
        (["data.seq_length=128"], "exceeds model.max_sequence_length"),
        (["parallel.sequence_parallel=true"], "needs parallel.tensor_parallel_size > 1"),
        (
            ["parallel.context_parallel_size=3"],
            "data.seq_length=64 is not divisible by the 6 parts that "
            "2 × parallel.context_parallel_size",
        ),
        (
            ["parallel=cp2", "data.mask_documents=true"],
            "data.mask_documents=true cannot be combined with parallel.context_parallel_size",
        ),
        (
            ["parallel.virtual_pipeline_parallel_size=2"],
            "needs parallel.pipeline_parallel_size > 1",
        ),
        (
            ["parallel=pp2", "parallel.virtual_pipeline_parallel_size=2"],
            "virtual_pipeline_parallel_size=2 does not divide model.num_layers=2",
        ),
        (
            [
                "parallel=pp2",
                "model.num_layers=4",
                "parallel.virtual_pipeline_parallel_size=2",
                "train.micro_batch_size=8",
            ],
            "1 micro-batches a step are not divisible by parallel.pipeline_parallel_size=2",
        ),
        (["name=../escape"], "name"),
        (
            ["train.branches=[10K]"],
            "the cooldown of 10000 begins after step 15, but train.tokens=5120 is 10 steps",
        ),
        (["train.branches=[5K]", "schedule=cosine"], "schedule=trapezoid"),
        (["train.branches=[5K]", "branch_of=runs/x"], "a branch has no branches"),
    ],
)
def test_rules_between_keys(change, said):
    assert said in problems(*change)


def test_a_missing_value_is_named():
    with pytest.raises(UserError, match="train.tokens is required: set train.tokens="):
        load_config(["study=a", "name=b"])


def test_a_transformers_folder_is_no_base_until_it_is_imported(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(UserError, match=f"retemper import {tmp_path} runs/models/NAME"):
        load_config(["study=a", "name=b", f"init_from={tmp_path}"])


# A run of which nothing but its model is missing.
SMALL = [
    "study=a",
    "name=b",
    "data=demo_code",
    "train.tokens=1M",
    "train.global_batch_size=8",
    "train.micro_batch_size=1",
]
SMALL += ["optimizer.lr=1e-3", "data.seq_length=64"]


@pytest.mark.parametrize("key", ["init_from", "branch_of"])
@pytest.mark.parametrize(
    "few",
    [[], ["model.max_sequence_length=64"], ["model.tie_embeddings=true", "++model.num_layers=2"]],
)
def test_a_missing_base_is_no_toy_model(tmp_path, key, few):
    missing = f"{key}={tmp_path / 'typo'}"
    with pytest.raises(
        UserError,
        match=f"^{missing} is not here .no config.json.: correct the path.*as model=llama2_7b",
    ):
        load_config([*SMALL, missing, *few])
    (tmp_path / "typo").mkdir()
    with pytest.raises(UserError, match="is not here"):
        load_config([*SMALL, missing, *few])
    assert load_config([*SMALL, missing, *few, "model=llama2_7b"]).model.hidden_size == 4096
    assert (
        load_config(
            [*SMALL, missing, *few, "model.hidden_size=128", "++model.num_layers=4"]
        ).model.num_layers
        == 4
    )


def test_a_runs_preset_that_picks_a_model_names_one(tmp_path):
    missing = f"init_from={tmp_path / 'typo'}"
    assert load_config(["run=demo_full", missing]).model.num_layers == 4


def base_in(folder: Path, *changes: str) -> str:
    """Write a run folder with another model than the default preset's."""
    config = load_config([*SMALL, "model=llama2_7b", *changes])
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json())
    return str(folder)


def test_a_run_has_the_model_that_it_begins_from(tmp_path):
    base = base_in(tmp_path / "base", "model.qkv_bias=true")
    for key in ("init_from", "branch_of"):
        for given in (
            [],
            ["model=llama2_7b", "model.qkv_bias=true"],
            ["model.num_layers=32"],
            ["+model.hidden_size=4096", "model.qkv_bias=true"],
        ):
            found = load_config([*SMALL, f"{key}={base}", *given]).model
            assert (found.num_layers, found.hidden_size, found.qkv_bias) == (32, 4096, True)
        with pytest.raises(UserError, match="model.qkv_bias: true -> false"):
            load_config([*SMALL, f"{key}={base}", "model=llama2_7b"])
    assert load_config([*SMALL, f"init_from={base}@1200"]).model.hidden_size == 4096


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["model.max_sequence_length=64"], "(model.max_sequence_length: 4096 -> 64)"),
        (["model=tiny"], "model.hidden_size: 4096 -> 128"),
        (
            ["model.rope_scaling.kind=linear", "model.rope_scaling.factor=2"],
            "model.rope_scaling: null -> ",
        ),
        (["model.hiden_size=64"], "model.hiden_size: unknown key; did you mean model.hidden_size?"),
    ],
)
def test_another_model_than_the_bases_is_refused_by_name(tmp_path, given, said):
    base = base_in(tmp_path / "base")
    with pytest.raises(UserError) as refusal:
        load_config([*SMALL, f"init_from={base}", *given])
    assert said in str(refusal.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_a_damaged_config_is_named(tmp_path, text):
    for name, changes in (
        ("base", [f"init_from={tmp_path / 'base'}"]),
        ("b", [f"runs_dir={tmp_path}"]),
    ):
        folder = tmp_path / ("base" if name == "base" else "a/b")
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=f"^{folder / 'config.json'} is damaged"):
            load_config([*SMALL, *changes])
    with pytest.raises(UserError, match="is damaged"):
        load_run(tmp_path / "base", [])


def test_changed_keys_name_both_values():
    assert changed_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ["a.c: 2 -> 3"]


@pytest.mark.parametrize("name", preset_names("evals"))
def test_every_evals_preset_loads(name):
    evals = load_config(["run=demo_full", f"evals={name}"]).evals
    assert evals.heldout.keys() == {"code", "math"}
    assert bool(evals.inline_tasks) == (name != "none") and not {"humaneval", "gsm8k"} & set(
        evals.inline_tasks
    )


def test_a_run_is_evaluated_as_its_folder_says_and_as_is_asked(tmp_path):
    run = tmp_path / "moved" / "demo" / "full"
    run.mkdir(parents=True)
    trained = load_config(["run=demo_full", "evals.max_samples=7", "optimizer.lr=0.25"])
    (run / "config.json").write_text(trained.model_dump_json())
    found = load_run(
        run,
        ["evals=quick", "parallel=pp2", "parallel.overlap=true", "data.path=there"],
        SCORING_OVERRIDES,
    )
    assert found.run_dir == run and found.optimizer.lr == 0.25 and found.data.path == "there"
    assert found.parallel.pipeline_parallel_size == 2 and found.parallel.overlap
    assert (
        found.evals.heldout == trained.evals.heldout
        and found.evals.max_samples == 7
        and "hellaswag" in found.evals.inline_tasks
    )
    assert load_run(run, []) == trained.model_copy(update={"runs_dir": str(run.parents[1])})
    with pytest.raises(
        UserError,
        match=r"^parallel=pp2: cannot be overridden for an existing run; allowed: evals$",
    ):
        load_run(run, ["parallel=pp2"])


def test_a_single_key_of_a_runs_evaluations_leaves_the_others(tmp_path, monkeypatch):
    run = tmp_path / "demo" / "full"
    run.mkdir(parents=True)
    trained = load_config(
        [
            "run=demo_full",
            "parallel=tp2",
            "evals=quick",
            "evals.tasks_dir=tasks",
            "evals.micro_batch_size=4",
        ]
    )
    (run / "config.json").write_text(trained.model_dump_json())
    found = load_run(
        run, ["evals.micro_batch_size=2", "evals.tasks.hellaswag.limit=50", "evals.heldout.more=x"]
    )
    expected = trained.evals.model_dump()
    (
        expected["micro_batch_size"],
        expected["tasks"]["hellaswag"]["limit"],
        expected["heldout"]["more"],
    ) = 2, 50, "x"
    assert found.evals.model_dump() == expected and found.parallel == trained.parallel
    assert load_run(
        run, ["evals.heldout={}", "evals.tasks={humaneval:{where:worker}}"]
    ).evals.tasks.keys() == {"humaneval"}
    assert load_run(run, ["evals=paper"]).evals.tasks_dir == "tasks"
    monkeypatch.chdir(run)
    assert load_run(Path(), []).run_dir == run


def test_what_is_no_run_is_not_evaluated(tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        load_run(tmp_path, [])
    (tmp_path / "config.json").write_text('{"model": {}, "method": {"name": "full"}}')
    with pytest.raises(UserError, match="is an imported model, which no run has trained"):
        load_run(tmp_path, ["evals=quick"])


def test_generated_programs_are_not_run_inline():
    said = problems(
        "evals=paper", "evals.tasks.humaneval.where=inline", "evals.tasks.heldout.limit=1"
    )
    assert (
        "evals.tasks.humaneval.where=inline" in said
        and "evals.tasks.heldout: that name is taken" in said
    )
    assert "did you mean arc_challenge?" in problems(
        "evals.tasks_dir=tasks", "evals.tasks.arc_chalenge.limit=1"
    )


def test_empty_braces_empty_what_a_preset_names():
    assert (
        load_config(
            [
                "run=demo_full",
                "evals=quick",
                "evals.heldout.more=x",
                "evals.heldout={}",
                "evals.tasks={}",
            ]
        ).evals.tasks
        == {}
    )
    assert load_config(
        ["run=demo_full", "evals.heldout={}", "evals.heldout.mine=x"]
    ).evals.heldout == {"mine": "x"}
