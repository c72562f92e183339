"""A run's config, composed by Hydra from conf/ and checked as a whole against the schema before anything starts."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from retemper.pipeline.config.differences import changed_keys
from retemper.pipeline.config.rules import (
    data_conflicts,
)
from retemper.pipeline.config.stored import base_folder, read_config
from retemper.pipeline.config.validate import check_config, config_error, describe_problem
from retemper.pipeline.errors import UserError, nearest
from retemper.pipeline.schema.data import DataConfig
from retemper.pipeline.schema.model import ModelConfig, ParallelConfig
from retemper.pipeline.schema.run import Config


def load_config(overrides: list[str]) -> Config:
    """Compose conf/ with `key=value` overrides and check the result.

    Raises UserError with every problem in one message: unknown keys (nearest valid key named), ill-typed values,
    and topologies that cannot be.
    """
    raw = compose(overrides)
    begun = _begun(raw)
    raw["model"] = _model_of_base(raw, begun, overrides)
    _keep_scale(raw, begun)
    return check_config(raw, begins=not begun)


def _model_of_base(
    raw: dict[str, Any], begun: dict[str, Any], overrides: list[str]
) -> dict[str, Any]:
    """The model that a run begins from; where that is not here, the one that is named.

    begun: the config that the run has begun with, which has that model, too. Raises UserError where
    none of them is.
    """
    given = _given_of_model(overrides)
    for key, folder in _beginnings(raw).items():
        config = read_config(base_folder(folder))
        if config is None:
            continue
        if "model" not in config:
            raise UserError(
                f"{key}={folder} is no run folder. A transformers folder becomes one by "
                f"`retemper import {folder} runs/models/NAME`; then init_from=runs/models/NAME"
            )
        return _same_model(config["model"], raw["model"], given, f"{key}={folder}")
    if _beginnings(raw) and "model" in begun:
        return _same_model(begun["model"], raw["model"], given, "the run that has begun")
    for key, folder in _beginnings(raw).items():
        if not _names_a_shape(given, overrides):
            raise UserError(
                f"{key}={folder} is not here (no config.json): correct the path, or train or import "
                "that model first; to plan a run without it, name its shape, as model=llama2_7b"
            )
    return raw["model"]


def _beginnings(raw: dict[str, Any]) -> dict[str, str]:
    """The folders that a run begins from, that of a trunk before that of a base."""
    found = {key: raw.get(key) for key in ("branch_of", "init_from")}
    return {key: folder for key, folder in found.items() if folder and isinstance(folder, str)}


def _same_model(base: Any, asked: dict[str, Any], given: set[str], named: str) -> Any:
    """The base's model. Raises UserError where the command line gives it another value."""
    try:
        base = ModelConfig.model_validate(base).model_dump()
    except ValidationError:
        return base  # the schema says what is wrong with it
    keys = asked.keys() if "" in given else given
    shown = {key: asked[key] for key in keys if key in base and key in asked}
    if changes := changed_keys(base, base | shown, "model."):
        listed = "; ".join(changes)
        raise UserError(
            f"{named} holds another model ({listed}): a run has the model that it begins from, "
            "so leave out model=… and model.…"
        )
    # Unknown keys among them are the schema's to name.
    return base | {key: asked[key] for key in given if key in asked}


def _given_of_model(overrides: list[str]) -> set[str]:
    """The keys of the model that overrides set; "" where they name a preset."""
    words = [text.lstrip("+").partition("=")[0].split(".") for text in overrides]
    return {key[0] if key else "" for section, *key in words if section == "model"}


def _names_a_shape(given: set[str], overrides: list[str]) -> bool:
    """Whether a model is named: a preset, its size, or a run's preset that picks one.

    A few keys on top of the default preset name none.
    """
    runs = [text.partition("=")[2] for text in overrides if text.startswith("run=")]
    return "" in given or {"num_layers", "hidden_size"} <= given or any(map(_picks_a_model, runs))


def _picks_a_model(run: str) -> bool:
    import yaml

    preset = yaml.safe_load((conf_dir() / "run" / f"{run}.yaml").read_text())
    return any("override /model" in default for default in preset.get("defaults", []))


def _begun(raw: dict[str, Any]) -> dict[str, Any]:
    """The config that this run has begun with; empty where it has not begun."""
    folder = [raw.get(key) for key in ("runs_dir", "study", "name")]
    if not all(isinstance(part, str) for part in folder):
        return {}
    return read_config(Path(*folder)) or {}


def _keep_scale(raw: dict[str, Any], begun: dict[str, Any]) -> None:
    """Where no alpha is given, a run that has begun keeps its own: it may not follow the rank."""
    lora, before = ((config.get("method") or {}).get("lora") for config in (raw, begun))
    if isinstance(lora, dict) and before and lora.get("alpha") is None:
        lora["alpha"] = before["alpha"]


def load_data_config(overrides: list[str]) -> DataConfig:
    """The data section alone, for a corpus that no run is named for. Raises UserError."""
    raw = compose(overrides)
    try:
        data = DataConfig.model_validate(raw["data"])
    except ValidationError as error:
        raise config_error(
            [describe_problem(problem, "data.") for problem in error.errors()]
        ) from None
    if problems := list(data_conflicts(data)):
        raise config_error(problems)
    return data


def load_parallel(overrides: list[str]) -> ParallelConfig:
    """The parallel section alone. Raises UserError."""
    if strange := [text for text in overrides if not text.startswith("parallel")]:
        raise UserError(f"{strange[0]}: only parallel=… and parallel.… are given here")
    try:
        return ParallelConfig.model_validate(compose(overrides)["parallel"])
    except ValidationError as error:
        raise config_error(
            [describe_problem(problem, "parallel.") for problem in error.errors()]
        ) from None


def to_yaml(config: Config) -> str:
    """The resolved config as conf/ writes it."""
    import yaml

    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def conf_dir() -> Path:
    """The folder of presets, wherever the package is installed."""
    from importlib.resources import files

    return Path(str(files("retemper.conf")))


def preset_names(group: str) -> list[str]:
    """The presets of one group of conf/, sorted."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


_EMPTIED = ("evals.heldout", "evals.tasks")  # Hydra merges {} into what is there


def compose(overrides: list[str]) -> dict[str, Any]:
    from hydra import compose as compose_presets
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = {
        path.name
        for path in conf_dir().iterdir()
        if path.is_dir() and not path.name.startswith("_")
    }
    _check_presets(overrides, groups)
    # Hydra stops at the first unknown key; added with ++ it reaches the schema, which reports all of them together.
    arguments = []
    for text in overrides:
        key, _, value = text.partition("=")
        if value == "{}" and key in _EMPTIED:
            arguments.append(f"~{key}")
        arguments.append(text if key in groups else f"++{text.lstrip('+')}")
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return _without_unset(
                OmegaConf.to_container(
                    compose_presets("config", arguments), resolve=True, throw_on_missing=False
                )
            )
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(
            f"The configuration cannot be composed from {' '.join(overrides) or 'its defaults'}: {error}\n"
            "A value with special characters is quoted within the word, as 'key=\"a(b)=c\"'"
        ) from None


def _without_unset(section: dict[str, Any]) -> dict[str, Any]:
    """The values that are set: presets write ??? for those that the person must give."""
    return {
        key: _without_unset(value) if isinstance(value, dict) else value
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
                f"{key}={value}: no such preset; there are {', '.join(preset_names(key))}{nearest(value, preset_names(key))}"
            )
    if problems:
        raise config_error(problems)
