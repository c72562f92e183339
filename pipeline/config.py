"""A run's config, composed by Hydra from conf/ and checked as a whole against the schema before anything starts."""

import copy
import functools
import json
import operator
import os
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from retemper.pipeline.errors import UserError, nearest
from retemper.pipeline.rules import beginning_conflicts, conflicts, data_conflicts, setup_conflicts
from retemper.pipeline.schema.base import Section
from retemper.pipeline.schema.data import DataConfig
from retemper.pipeline.schema.model import ModelConfig, ModelSetup, ParallelConfig
from retemper.pipeline.schema.run import Config


def load_config(overrides: list[str]) -> Config:
    """Compose conf/ with `key=value` overrides and check the result.

    Raises UserError with every problem in one message: unknown keys (nearest valid key named), ill-typed values,
    and topologies that cannot be.
    """
    raw = _compose(overrides)
    begun = _begun(raw)
    raw["model"] = _model_of_base(raw, begun, overrides)
    _keep_scale(raw, begun)
    return check_config(raw, begins=not begun)


_STEP = re.compile(r"@(\d+)$")


def base_folder(name: str) -> Path:
    """The run folder that init_from names, as RUN or as RUN@STEP."""
    return Path(_STEP.sub("", name))


def base_step(name: str) -> int | None:
    """The step that init_from asks for, as RUN@STEP. None where it names the run alone."""
    asked = _STEP.search(name)
    return int(asked[1]) if asked else None


def read_config(folder: Path) -> dict[str, Any] | None:
    """What config.json of a run's folder holds, if there is one. Raises UserError where it is damaged."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(
            f"{path} is damaged: it holds no JSON object. Restore it "
            "(meta.json of each checkpoint beside it has it under config)"
        )
    return config


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
    raw = _compose(overrides)
    try:
        data = DataConfig.model_validate(raw["data"])
    except ValidationError as error:
        raise _report([_describe(problem, "data.") for problem in error.errors()]) from None
    if problems := list(data_conflicts(data)):
        raise _report(problems)
    return data


def load_parallel(overrides: list[str]) -> ParallelConfig:
    """The parallel section alone. Raises UserError."""
    if strange := [text for text in overrides if not text.startswith("parallel")]:
        raise UserError(f"{strange[0]}: only parallel=… and parallel.… are given here")
    try:
        return ParallelConfig.model_validate(_compose(overrides)["parallel"])
    except ValidationError as error:
        raise _report([_describe(problem, "parallel.") for problem in error.errors()]) from None


# What may be said anew of a run that is evaluated, and of one that ranks of a launch evaluate, who need its inputs and a layout.
OF_EVALUATIONS = ("evals",)
OF_SCORING = (*OF_EVALUATIONS, "parallel", "train.micro_batch_size", "track", "init_from", "data.path", "data.tokenizer")
# Of its evaluations, what a preset leaves as it was: what the run has been scored on so far, and what fits its machine.
_KEPT = ("heldout", "learned", "max_samples", "micro_batch_size", "tasks_dir")


def load_run(run_dir: Path, overrides: list[str], may_change: tuple[str, ...] = OF_EVALUATIONS) -> Config:
    """The config of a run's folder, wherever that stands now, with keys as given here where they are. Raises UserError.

    may_change: the sections and keys that may be given.
    """
    if strange := [text for text in overrides if not any(_is_of(text, key) for key in may_change)]:
        raise UserError(f"{strange[0]}: the run's own config holds; what can be given anew is {', '.join(may_change)}")
    folder = Path(os.path.abspath(run_dir))
    raw = read_config(folder)
    if raw is None:
        raise UserError(f"{run_dir} is no run folder: it has no config.json; name runs_dir/study/name of a run that has begun")
    if "evals" not in raw:
        raise UserError(f"{run_dir} is an imported model, which no run has trained: name the folder of a run that begins from it")
    raw |= {"runs_dir": str(folder.parent.parent), "study": folder.parent.name, "name": folder.name}
    return check_config(_with_overrides(raw, overrides) if overrides else raw)


def _is_of(text: str, key: str) -> bool:
    """Whether an override sets a key, or one below it."""
    return re.match(rf"{re.escape(key)}[.=]", text) is not None


def _with_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A run's config with presets and single values in place of its own."""
    composed, changed = _compose(overrides), copy.deepcopy(raw)
    for section in ("evals", "parallel"):
        if presets := [text for text in overrides if text.startswith(f"{section}=")]:
            kept = {key: raw[section][key] for key in _KEPT} if section == "evals" else {}
            changed[section] = _compose(presets)[section] | kept
    for *sections, key in (text.partition("=")[0].split(".") for text in overrides):
        if sections or key not in ("evals", "parallel"):
            value, target = composed, changed
            for section in sections:
                value, target = value[section], target.setdefault(section, {})
            target[key] = value[key]
    return changed


def check_setup(setup: ModelSetup) -> ModelSetup:
    """Check a model against its layout. Raises UserError."""
    if problems := list(setup_conflicts(setup)):
        raise _report(problems)
    return setup


def to_yaml(config: Config) -> str:
    """The resolved config as conf/ writes it."""
    import yaml

    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def check_config(raw: dict[str, Any], *, begins: bool = False) -> Config:
    """Check a plain dictionary against the schema and the rules between its keys. Raises UserError.

    begins: the run has not begun; one that has may break rules that came later.
    """
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise _report([*(_describe(problem) for problem in error.errors()), *_conflicts_beside(error, raw)]) from None
    if problems := [*conflicts(config), *(beginning_conflicts(config) if begins else ())]:
        raise _report(problems)
    return config


def _conflicts_beside(error: ValidationError, raw: dict[str, Any]) -> list[str]:
    """The rules broken beside unknown keys; a value that is missing or ill-typed leaves nothing to check them on."""
    known = copy.deepcopy(raw)
    for problem in error.errors():
        if problem["type"] != "extra_forbidden":
            return []
        *path, key = problem["loc"]
        functools.reduce(operator.getitem, path, known).pop(key)
    return list(conflicts(Config.model_validate(known)))


def changed_keys(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys whose values differ between two dumped configs, as "key: before -> after"."""
    changes = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += changed_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            changes.append(f"{prefix}{key}: {json.dumps(old)} -> {json.dumps(new)}")
    return changes


def conf_dir() -> Path:
    """The folder of presets, wherever the package is installed."""
    from importlib.resources import files

    return Path(str(files("retemper.conf")))


def preset_names(group: str) -> list[str]:
    """The presets of one group of conf/, sorted."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


_EMPTIED = ("evals.heldout", "evals.tasks")  # Hydra merges {} into what is there


def _compose(overrides: list[str]) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = {path.name for path in conf_dir().iterdir() if path.is_dir() and not path.name.startswith("_")}
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
            return _without_unset(OmegaConf.to_container(compose("config", arguments), resolve=True, throw_on_missing=False))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(
            f"The configuration cannot be composed from {' '.join(overrides) or 'its defaults'}: {error}\n"
            "A value with special characters is quoted within the word, as 'key=\"a(b)=c\"'"
        ) from None


def _without_unset(section: dict[str, Any]) -> dict[str, Any]:
    """The values that are set: presets write ??? for those that the person must give."""
    return {key: _without_unset(value) if isinstance(value, dict) else value for key, value in section.items() if value != "???"}


def _check_presets(overrides: list[str], groups: set[str]) -> None:
    problems = []
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator:
            problems.append(f"{text!r} is not key=value")
        elif key in groups and value not in preset_names(key):
            problems.append(f"{key}={value}: no such preset; there are {', '.join(preset_names(key))}{nearest(value, preset_names(key))}")
    if problems:
        raise _report(problems)


def _report(problems: list[str]) -> UserError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return UserError("\n".join([f"The configuration has {count}:", *(f"  - {problem}" for problem in problems)]))


def _describe(problem: dict[str, Any], prefix: str = "") -> str:
    key = prefix + ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key{nearest(key, _schema_keys(Config))}"
    if problem["type"] == "missing":
        return f"{key}: has no value; set it as {key}=…"
    return f"{key}: {problem['msg']} (got {problem['input']!r})"


def _schema_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        inner = [kind for kind in (field.annotation, *getattr(field.annotation, "__args__", ())) if _is_section(kind)]
        keys += _schema_keys(inner[0], f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return keys


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
