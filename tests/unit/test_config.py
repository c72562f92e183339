"""Test configs: the presets load, and one message reports all problems."""

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
    with pytest.raises(UserError) as caught:
        load_config(overrides(Path(tmp), "x", *changes))
    return str(caught.value)


# The others are of the paper, for a corpus and a size that only their users have: test_lengths.py.
@pytest.mark.parametrize("name", [name for name in preset_names("run") if "demo" in name])
@pytest.mark.parametrize(
    "parallel", [name for name in preset_names("parallel") if "_" not in name]
)  # the others are for large models
def test_every_preset_of_the_demo_loads_with_every_layout(name, parallel):
    config = load_config([f"run={name}", f"parallel={parallel}"])
    assert config.steps > 0
    assert config.milestone_steps[-1] == config.steps


@pytest.mark.parametrize("name", preset_names("data"))
def test_every_corpus_preset_loads(name):
    data = load_data_config(
        [f"data={name}", "study=x", "data.path=a", "data.tokenizer=b", "data.source.path=c"]
    )
    assert (data.path, data.source.path) == ("a", "c")


@pytest.mark.parametrize("group", ["model", "method", "optimizer", "schedule"])
def test_every_group_preset_loads(group):
    for name in preset_names(group):
        lora = ["init_from=runs/demo/base"] if name == "lora" else []
        optimizer = ["optimizer.lr=1e-3"] if group == "optimizer" else []
        assert load_config(["run=demo_base", f"{group}={name}", *lora, *optimizer])


@pytest.mark.parametrize("path", sorted(conf_dir().rglob("*.yaml")), ids=lambda path: path.stem)
def test_presets_do_not_repeat_default_values(path):
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


def test_a_preset_resets_the_keys_of_another_preset_of_its_group():
    assert load_config(["run=demo_full", "schedule=cosine"]).schedule.min_lr_ratio == 0.01
    again = load_config(["run=demo_full", "schedule=cosine", "schedule=trapezoid"]).schedule
    assert (again.min_lr_ratio, again.cooldown_fraction) == (0.0, 0.2)
    assert load_config(["run=demo_lora", "method=full", "init_from=null"]).method.lora is None


def test_a_preset_that_uses_the_study_name_requires_it():
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
def test_token_counts_are_parsed(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(250_000_000, "250M"), (20 * 10**9, "20B"), (81920, "81920"), (1500, "1500"), (2000, "2K")],
)
def test_token_counts_are_formatted_short_and_exactly(tokens, text):
    assert format_tokens(tokens) == text
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["20 billion", "-3", "", "1G", None, True])
def test_invalid_token_counts_are_refused(text):
    with pytest.raises(ValueError):
        parse_tokens(text)


def test_all_problems_are_in_one_message_with_the_nearest_keys():
    message = problems(
        "optimizer.beta1=high", "train.lr=1e-3", "parallel.tensor_parallel=2", "train.tokens=20G"
    )
    assert message.startswith("The configuration has 4 problems:")
    assert "train.lr: unknown key; did you mean optimizer.lr?" in message
    assert (
        "parallel.tensor_parallel: unknown key; did you mean parallel.tensor_parallel_size?"
        in message
    )
    assert "optimizer.beta1:" in message
    assert "'high'" in message
    assert "train.tokens" in message
    assert "20G" in message


def test_a_renamed_key_is_refused_with_its_new_name():
    assert "anomaly.left_out_steps is now anomaly.skip_batches" in problems(
        "anomaly.left_out_steps=2"
    )


def test_unknown_keys_and_impossible_layouts_are_reported_together():
    message = problems("parallel.tensor_parallel_size=3", "train.lr=1e-3", "bogus=1")
    assert "did you mean optimizer.lr?" in message
    assert "bogus: unknown key" in message
    assert "tensor_parallel_size=3 does not divide model.num_attention_heads=4" in message


def test_every_impossible_parallel_size_is_reported():
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


def test_a_missing_required_value_is_named():
    with pytest.raises(UserError, match="train.tokens is required: set train.tokens="):
        load_config(["study=a", "name=b"])


def test_a_transformers_folder_must_be_imported_to_be_a_base(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(UserError, match=f"retemper import {tmp_path} runs/models/NAME"):
        load_config(["study=a", "name=b", f"init_from={tmp_path}"])


# All the required keys of a run except its model.
NO_MODEL = [
    "study=a",
    "name=b",
    "data=demo_code",
    "train.tokens=1M",
    "train.global_batch_size=8",
    "train.micro_batch_size=1",
]
NO_MODEL += ["optimizer.lr=1e-3", "data.seq_length=64"]


@pytest.mark.parametrize("key", ["init_from", "branch_of"])
@pytest.mark.parametrize(
    "model_keys",
    [[], ["model.max_sequence_length=64"], ["model.tie_embeddings=true", "++model.num_layers=2"]],
)
def test_a_missing_base_is_not_replaced_by_a_default_model(tmp_path, key, model_keys):
    missing = f"{key}={tmp_path / 'typo'}"
    with pytest.raises(
        UserError,
        match=f"^{missing} is not here .no config.json.: correct the path.*as model=llama2_7b",
    ):
        load_config([*NO_MODEL, missing, *model_keys])
    (tmp_path / "typo").mkdir()
    with pytest.raises(UserError, match="is not here"):
        load_config([*NO_MODEL, missing, *model_keys])
    assert (
        load_config([*NO_MODEL, missing, *model_keys, "model=llama2_7b"]).model.hidden_size == 4096
    )
    assert (
        load_config(
            [*NO_MODEL, missing, *model_keys, "model.hidden_size=128", "++model.num_layers=4"]
        ).model.num_layers
        == 4
    )


def test_a_run_preset_with_a_model_loads_without_its_base(tmp_path):
    missing = f"init_from={tmp_path / 'typo'}"
    assert load_config(["run=demo_full", missing]).model.num_layers == 4


def write_base(folder: Path, *changes: str) -> str:
    """Write a run folder with another model than the default preset's."""
    config = load_config([*NO_MODEL, "model=llama2_7b", *changes])
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json())
    return str(folder)


def test_a_run_has_the_model_of_its_base(tmp_path):
    base = write_base(tmp_path / "base", "model.qkv_bias=true")
    for key in ("init_from", "branch_of"):
        for model_keys in (
            [],
            ["model=llama2_7b", "model.qkv_bias=true"],
            ["model.num_layers=32"],
            ["+model.hidden_size=4096", "model.qkv_bias=true"],
        ):
            found = load_config([*NO_MODEL, f"{key}={base}", *model_keys]).model
            assert (found.num_layers, found.hidden_size, found.qkv_bias) == (32, 4096, True)
        with pytest.raises(UserError, match="model.qkv_bias: true -> false"):
            load_config([*NO_MODEL, f"{key}={base}", "model=llama2_7b"])
    assert load_config([*NO_MODEL, f"init_from={base}@1200"]).model.hidden_size == 4096


@pytest.mark.parametrize(
    ("model_keys", "message"),
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
def test_a_model_other_than_that_of_the_base_is_refused(tmp_path, model_keys, message):
    base = write_base(tmp_path / "base")
    with pytest.raises(UserError) as refusal:
        load_config([*NO_MODEL, f"init_from={base}", *model_keys])
    assert message in str(refusal.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_a_damaged_config_is_reported(tmp_path, text):
    for name, changes in (
        ("base", [f"init_from={tmp_path / 'base'}"]),
        ("b", [f"runs_dir={tmp_path}"]),
    ):
        folder = tmp_path / ("base" if name == "base" else "a/b")
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=f"^{folder / 'config.json'} is damaged"):
            load_config([*NO_MODEL, *changes])
    with pytest.raises(UserError, match="is damaged"):
        load_run(tmp_path / "base", [])


def test_changed_keys_show_both_values():
    assert changed_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ["a.c: 2 -> 3"]


@pytest.mark.parametrize("name", preset_names("evals"))
def test_every_evals_preset_loads(name):
    evals = load_config(["run=demo_full", f"evals={name}"]).evals
    assert evals.heldout.keys() == {"code", "math"}
    assert bool(evals.inline_tasks) == (name != "none")
    assert not {"humaneval", "gsm8k"} & set(evals.inline_tasks)


def test_load_run_applies_only_allowed_overrides_to_the_stored_config(tmp_path):
    run = tmp_path / "moved" / "demo" / "full"
    run.mkdir(parents=True)
    trained = load_config(["run=demo_full", "evals.max_samples=7", "optimizer.lr=0.25"])
    (run / "config.json").write_text(trained.model_dump_json())
    found = load_run(
        run,
        ["evals=quick", "parallel=pp2", "parallel.overlap=true", "data.path=there"],
        SCORING_OVERRIDES,
    )
    assert found.run_dir == run
    assert found.optimizer.lr == 0.25
    assert found.data.path == "there"
    assert found.parallel.pipeline_parallel_size == 2
    assert found.parallel.overlap
    assert found.evals.heldout == trained.evals.heldout
    assert found.evals.max_samples == 7
    assert "hellaswag" in found.evals.inline_tasks
    assert load_run(run, []) == trained.model_copy(update={"runs_dir": str(run.parents[1])})
    with pytest.raises(
        UserError,
        match=r"^parallel=pp2: cannot be overridden for an existing run; allowed: evals$",
    ):
        load_run(run, ["parallel=pp2"])


def test_overriding_one_key_of_evals_keeps_the_others(tmp_path, monkeypatch):
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
    expected["micro_batch_size"] = 2
    expected["tasks"]["hellaswag"]["limit"] = 50
    expected["heldout"]["more"] = "x"
    assert found.evals.model_dump() == expected
    assert found.parallel == trained.parallel
    assert load_run(
        run, ["evals.heldout={}", "evals.tasks={humaneval:{where:worker}}"]
    ).evals.tasks.keys() == {"humaneval"}
    assert load_run(run, ["evals=paper"]).evals.tasks_dir == "tasks"
    monkeypatch.chdir(run)
    assert load_run(Path(), []).run_dir == run


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        load_run(tmp_path, [])
    (tmp_path / "config.json").write_text('{"model": {}, "method": {"name": "full"}}')
    with pytest.raises(UserError, match="is an imported model, which no run has trained"):
        load_run(tmp_path, ["evals=quick"])


def test_empty_braces_clear_a_mapping_of_a_preset():
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
