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
from retemper.pipeline.rules import conflicts, data_conflicts, setup_conflicts
from retemper.pipeline.schema.base import Section
from retemper.pipeline.schema.data import DataConfig
from retemper.pipeline.schema.model import ModelSetup, ParallelConfig
from retemper.pipeline.schema.run import Config


def load_config(overrides: list[str]) -> Config:
    """Compose conf/ with `key=value` overrides and check the result.

    Raises UserError with every problem in one message: unknown keys (nearest valid key named), ill-typed values,
    and topologies that cannot be.
    """
    raw = _compose(overrides)
    if raw.get("init_from") and not any(text.startswith("model") for text in overrides):
        raw["model"] = _model_of_base(raw)
    return check_config(raw)


def _model_of_base(raw: dict[str, Any]) -> dict[str, Any]:
    """A run has the model that it begins from."""
    path = Path(raw["init_from"], "config.json")
    if not path.is_file():
        return raw["model"]
    config = json.loads(path.read_text())
    if "model" not in config:
        raise UserError(
            f"init_from={raw['init_from']} is no run folder. A transformers folder becomes one by "
            f"`retemper import {raw['init_from']} runs/models/NAME`; then init_from=runs/models/NAME"
        )
    return config["model"]


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
_KEPT = ("heldout", "max_samples", "micro_batch_size", "tasks_dir")


def load_run(run_dir: Path, overrides: list[str], may_change: tuple[str, ...] = OF_EVALUATIONS) -> Config:
    """The config of a run's folder, wherever that stands now, with keys as given here where they are. Raises UserError.

    may_change: the sections and keys that may be given.
    """
    if strange := [text for text in overrides if not any(_is_of(text, key) for key in may_change)]:
        raise UserError(f"{strange[0]}: the run's own config holds; what can be given anew is {', '.join(may_change)}")
    folder = Path(os.path.abspath(run_dir))
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{run_dir} is no run folder: it has no config.json; name runs_dir/study/name of a run that has begun")
    raw = json.loads(path.read_text())
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


def check_config(raw: dict[str, Any]) -> Config:
    """Check a plain dictionary against the schema and the rules between its keys. Raises UserError."""
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise _report([*(_describe(problem) for problem in error.errors()), *_conflicts_beside(error, raw)]) from None
    if problems := list(conflicts(config)):
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
