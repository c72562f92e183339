"""Compose a run's config by Hydra from conf/, and check it as a whole before anything starts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from retemper.pipeline.config.differences import changed_keys
from retemper.pipeline.config.lengths import in_tokens
from retemper.pipeline.config.stored import base_folder, read_config
from retemper.pipeline.config.validate import (
    check_config,
    check_data,
    config_error,
    describe_problem,
)
from retemper.pipeline.config.words import quoted
from retemper.pipeline.errors import UserError, nearest
from retemper.pipeline.files.credentials import refuse_credentials
from retemper.pipeline.schema.data import DataConfig
from retemper.pipeline.schema.model import ModelConfig, ParallelConfig
from retemper.pipeline.schema.run import Config
from retemper.pipeline.schema.section import defaults_of


def load_config(overrides: list[str]) -> Config:
    """Compose conf/ with `key=value` overrides and check the result.

    Raises:
        UserError: with every problem in one message: unknown keys (the nearest valid key is
            named), ill-typed values, and impossible topologies.
    """
    raw = in_tokens(compose(overrides))
    existing = _existing_config(raw)
    raw["model"] = _resolve_model(raw, existing, overrides)
    _keep_lora_alpha(raw, existing)
    return check_config(raw, begins=not existing)


def _resolve_model(
    raw: dict[str, Any], existing: dict[str, Any], overrides: list[str]
) -> dict[str, Any]:
    """Return the model section: that of the run or base that this run starts from.

    Where none of them is on this machine, it is the model that the overrides specify.

    Args:
        raw: the composed config.
        existing: the stored config of this run where it has begun, which has the same model.
        overrides: the command line's `key=value`.

    Raises:
        UserError: where neither is available, or where the overrides change the model.
    """
    overridden = _overridden_model_keys(overrides)
    for key, folder in _starting_folders(raw).items():
        config = read_config(base_folder(folder))
        if config is None:
            continue
        if "model" not in config:
            raise UserError(
                f"{key}={folder} is no run folder. Convert a transformers folder to one with "
                f"`retemper import {folder} runs/models/NAME`, then set init_from=runs/models/NAME"
            )
        return _require_same_model(config["model"], raw["model"], overridden, f"{key}={folder}")
    if _starting_folders(raw) and "model" in existing:
        return _require_same_model(
            existing["model"], raw["model"], overridden, "the run that has begun"
        )
    for key, folder in _starting_folders(raw).items():
        if not _specifies_model(overridden, overrides):
            raise UserError(
                f"{key}={folder} is not here (no config.json): correct the path, or train or "
                "import that model first; to plan a run without it, specify its shape, "
                "as model=llama2_7b"
            )
    return raw["model"]


def _starting_folders(raw: dict[str, Any]) -> dict[str, str]:
    """Return the folders that a run starts from, by key: branch_of before init_from."""
    folders = {key: raw.get(key) for key in ("branch_of", "init_from")}
    return {key: folder for key, folder in folders.items() if folder and isinstance(folder, str)}


def _require_same_model(
    base: Any, requested: dict[str, Any], overridden: set[str], source: str
) -> Any:
    """Return the base's model.

    Raises:
        UserError: where the overrides give one of its keys another value.
    """
    try:
        base = ModelConfig.model_validate(base).model_dump()
    except ValidationError:
        return base  # validation against the schema reports the problem
    keys = requested.keys() if "" in overridden else overridden
    shown = {key: requested[key] for key in keys if key in base and key in requested}
    if changes := changed_keys(base, base | shown, "model."):
        listed = "; ".join(changes)
        raise UserError(
            f"{source} has another model ({listed}): a run uses the model that it starts from, "
            "so remove model=… and model.…"
        )
    # Unknown keys are kept, so that validation against the schema reports them.
    return base | {key: requested[key] for key in overridden if key in requested}


def _overridden_model_keys(overrides: list[str]) -> set[str]:
    """Return the keys of the model that overrides set; "" stands for a preset."""
    words = [text.lstrip("+").partition("=")[0].split(".") for text in overrides]
    return {key[0] if key else "" for section, *key in words if section == "model"}


def _specifies_model(overridden: set[str], overrides: list[str]) -> bool:
    """Return whether a model is specified: a preset, its size, or a run's preset that selects one.

    A few keys on top of the default preset do not specify a model.
    """
    runs = [text.partition("=")[2] for text in overrides if text.startswith("run=")]
    return (
        "" in overridden
        or {"num_layers", "hidden_size"} <= overridden
        or any(map(_preset_selects_model, runs))
    )


def _preset_selects_model(run: str) -> bool:
    import yaml

    preset = yaml.safe_load((conf_dir() / "run" / f"{run}.yaml").read_text())
    defaults = preset.get("defaults", [])
    others = [name for name in defaults if isinstance(name, str) and name != "_self_"]
    return any("override /model" in default for default in defaults) or any(
        map(_preset_selects_model, others)
    )


def _existing_config(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the stored config of this run, or an empty one if the run has not begun."""
    values = (raw.get(key) for key in ("runs_dir", "study", "name"))
    folder = [value for value in values if isinstance(value, str)]
    return read_config(Path(*folder)) or {} if len(folder) == 3 else {}


def _keep_lora_alpha(raw: dict[str, Any], existing: dict[str, Any]) -> None:
    """Keep an existing run's alpha where none is set: the default for its rank may differ."""
    lora, before = ((config.get("method") or {}).get("lora") for config in (raw, existing))
    if isinstance(lora, dict) and before and lora.get("alpha") is None:
        lora["alpha"] = before["alpha"]


def load_data_config(overrides: list[str]) -> DataConfig:
    """Compose and check the data section alone, for a corpus outside of any run.

    Raises:
        UserError: with every problem in one message.
    """
    return check_data(compose(overrides)["data"])


def load_parallel(overrides: list[str]) -> ParallelConfig:
    """Compose and check the parallel section alone.

    Raises:
        UserError: for other keys, and with every problem of the section.
    """
    if unknown := [text for text in overrides if not text.startswith("parallel")]:
        raise UserError(f"{unknown[0]}: only parallel=… and parallel.… are allowed here")
    try:
        return ParallelConfig.model_validate(compose(overrides)["parallel"])
    except ValidationError as error:
        raise config_error(
            [describe_problem(problem, "parallel.") for problem in error.errors()]
        ) from None


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML, in the form of conf/."""
    import yaml

    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def conf_dir() -> Path:
    """Return the folder of presets, wherever the package is installed."""
    from importlib.resources import files

    return Path(str(files("retemper.conf")))


def preset_names(group: str) -> list[str]:
    """Return the names of the presets of one group of conf/, sorted."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


_CLEARABLE = ("evals.heldout", "evals.tasks")  # Hydra would merge {} into the existing entries


def compose(overrides: list[str]) -> dict[str, Any]:
    """Compose conf/ with overrides into a plain dictionary, not yet checked against the schema.

    Raises:
        UserError: for unknown presets, overrides that Hydra cannot parse, and credentials.
    """
    refuse_credentials(overrides)
    composed = _composed(overrides)
    refuse_credentials(_values(composed))
    return composed


def _values(value: Any, key: str = "") -> Iterator[str]:
    """Yield every text in a config, as key=value."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _values(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _values(inner, key)
    elif isinstance(value, str):
        yield f"{key}={value}"


def _composed(overrides: list[str]) -> dict[str, Any]:
    from hydra import compose as compose_presets
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

    groups = {
        path.name
        for path in conf_dir().iterdir()
        if path.is_dir() and not path.name.startswith("_")
    }
    _check_presets(overrides, groups)
    ConfigStore.instance().store("schema_defaults", defaults_of(Config))
    # Hydra stops at the first unknown key. Added with ++, it reaches the schema, which reports all
    # unknown keys together.
    arguments = []
    for text in overrides:
        key, _, value = text.partition("=")
        if value == "{}" and key in _CLEARABLE:
            arguments.append(f"~{key}")
        arguments.append(text if key in groups else f"++{quoted(text.lstrip('+'))}")
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return _drop_unset(
                OmegaConf.to_container(
                    compose_presets("config", arguments), resolve=True, throw_on_missing=False
                )
            )
    except InterpolationKeyError as error:
        raise UserError(
            f"{error.full_key} of a preset uses a key that is not set: set it, or {error.full_key} "
            f"({str(error).splitlines()[0]})"
        ) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(
            f"The configuration cannot be composed from {' '.join(overrides) or 'its defaults'}: "
            f"{error}\n"
            "Quote a value with special characters within the word, as 'key=\"a(b)=c\"'"
        ) from None


def _drop_unset(section: dict[str, Any]) -> dict[str, Any]:
    """Return only the values that are set: presets mark those that the user must set with ???."""
    return {
        key: _drop_unset(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != "???"
    }


def _check_presets(overrides: list[str], groups: set[str]) -> None:
    problems = []
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator:
            problems.append(f"{text!r} is not key=value")
        elif key in groups and value not in preset_names(key):
            problems.append(
                f"{key}={value}: no such preset; available: {', '.join(preset_names(key))}"
                f"{nearest(value, preset_names(key))}"
            )
    if problems:
        raise config_error(problems)
