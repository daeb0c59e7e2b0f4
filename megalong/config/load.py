"""Read a recipe: defaults of the tree <- parent recipes (`base:`) <- the recipe <- `a.b=c` overrides.

Keys and types are checked leaf by leaf against the tree, so that an error names the key and the
file or override that holds it.
"""

from __future__ import annotations

import copy
import difflib
import os
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from megalong.config.errors import ConfigError
from megalong.config.tree import RunConfig

BASE_KEY = "base"
REQUIRED_BY_EVERY_TASK = ("model.path", "logger.run_dir")

Tree = TypeVar("Tree")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run; see load_recipe. `data.train` may still be missing: `validate` knows which task
    needs it."""
    return load_recipe(RunConfig, path, overrides, required=REQUIRED_BY_EVERY_TASK)


def load_recipe(tree: type[Tree], path: str | Path, overrides: Sequence[str], *, required: Sequence[str]) -> Tree:
    """Merge the defaults of `tree`, the recipe's parents, the recipe and the overrides; the result is read-only.

    path: a YAML file; its optional top-level key `base` names a parent file, relative to it.
    overrides: `section.key=value` strings; the value is read as YAML (`null`, `1e-6`, `{a: 1}`).
    required: keys without a default that must have a value.
    A mapping given for a free-form field (`reward.weights`) replaces the one before it.
    Returns an omegaconf DictConfig typed as `tree`: attribute access as on the dataclass, and an error on every write.
    Raises ConfigError naming the file or override, the key and what was expected.
    """
    config = OmegaConf.structured(tree)
    for file in _recipe_chain(Path(path)):
        _merge(config, _read_yaml(file), source=str(file))
    for override in overrides:
        key, value = _parse_override(override)
        _set_leaves(config, key, value, source=f"override '{override}'")
    _resolve(config, source=str(path))
    missing = [key for key in required if OmegaConf.is_missing(*_parent_and_name(config, key))]
    if missing:
        raise ConfigError([f"{path}: {key} has no value; set it in the recipe or add {key}=..." for key in missing])
    OmegaConf.set_readonly(config, True)
    return cast(Tree, config)


def with_run_dir(config: RunConfig, run_dir: Path, *, init_from: str | None = None) -> RunConfig:
    """The same configuration for another folder, and for other weights where init_from is given."""
    config = copy.deepcopy(config)
    with read_write(cast(Any, config)):
        config.logger.run_dir = str(run_dir)
        config.model.init_from = init_from or config.model.init_from
    return config


def with_gpus(config: RunConfig, gpus: int) -> RunConfig:
    """The same configuration for a launch of so many GPUs."""
    config = copy.deepcopy(config)
    with read_write(cast(Any, config)):
        config.gpus = gpus
    return config


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back; whole file or nothing."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    OmegaConf.save(cast(Any, config), partial, resolve=True)
    os.replace(partial, target)


def config_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML text; a value that was never set shows as ???."""
    return OmegaConf.to_yaml(cast(Any, config), resolve=True)


def known_keys(tree: type = RunConfig) -> tuple[str, ...]:
    """Dotted names of all leaves of the tree, in order; a free-form mapping counts as one leaf."""
    return tuple(_leaf_keys(tree, prefix=""))


def _leaf_keys(node: type, *, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(node)
    for item in fields(node):
        key = f"{prefix}{item.name}"
        if is_dataclass(hints[item.name]):
            yield from _leaf_keys(hints[item.name], prefix=f"{key}.")
        else:
            yield key


def _recipe_chain(path: Path) -> list[Path]:
    """The recipe and its parents, outermost parent first."""
    chain = [path]
    while (base := _read_yaml(chain[-1]).get(BASE_KEY)) is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{chain[-1]}: {BASE_KEY} must be the path of one YAML file, got {base!r}")
        parent = chain[-1].parent / base
        if parent.resolve() in {file.resolve() for file in chain}:
            names = " -> ".join(str(file) for file in [*chain, parent])
            raise ConfigError(f"{path}: recipes form a circle: {names}")
        chain.append(parent)
    return chain[::-1]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except UnicodeDecodeError as error:
        byte = f"{error.object[error.start]:#04x}"
        raise ConfigError(f"{path}: not UTF-8 text, it holds the byte {byte}; save the file as UTF-8") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: a recipe is a mapping of sections, got a list")
    return cast(dict[str, Any], OmegaConf.to_container(loaded, resolve=False))


def _parse_override(override: str) -> tuple[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override '{override}': expected section.key=value")
    try:
        parsed = OmegaConf.from_dotlist([f"value={text}"])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override '{override}': the value is not valid YAML: {error}") from error
    return key, cast(dict[str, Any], OmegaConf.to_container(parsed, resolve=False))["value"]


def _merge(config: DictConfig, values: dict[str, Any], *, source: str) -> None:
    for name, value in values.items():
        if name != BASE_KEY:
            _set_leaves(config, str(name), value, source=source)


def _set_leaves(config: DictConfig, key: str, value: Any, *, source: str) -> None:
    """Set `key`, or every leaf under it when it names a section."""
    node = _type_at(OmegaConf.get_type(config), key, source=source)
    if not is_dataclass(node):
        _set_leaf(config, key, value, source=source)
        return
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: {key} is a section, expected a mapping, got {value!r}")
    for name, child in value.items():
        _set_leaves(config, f"{key}.{name}", child, source=source)


def _type_at(tree: type, key: str, *, source: str) -> Any:
    """The annotated type of a dotted key. Raises ConfigError with the nearest key that exists."""
    node: Any = tree
    for name in key.split("."):
        if is_dataclass(node):
            hints = typing.get_type_hints(node)
            if name not in hints:
                raise ConfigError(f"{source}: unknown key {key}; did you mean {_nearest_key(tree, key)}?")
            node = hints[name]
        elif typing.get_origin(node) is dict:
            node = typing.get_args(node)[1]
        else:
            raise ConfigError(f"{source}: unknown key {key}; {key.rpartition('.')[0]} is a single value")
    return node


def _nearest_key(tree: type, key: str) -> str:
    """The known key or section that looks most like `key`; the last name weighs more than the section."""
    leaves = known_keys(tree)
    candidates = [*leaves, *sorted({known.rpartition(".")[0] for known in leaves} - {""})]
    section, _, name = key.rpartition(".")
    section_weight = 0.35 if section else 0.05  # a bare name says little about the section it belongs to

    def likeness(known: str) -> float:
        known_section, _, known_name = known.rpartition(".")
        in_section = difflib.SequenceMatcher(None, section, known_section).ratio()
        by_name = difflib.SequenceMatcher(None, name, known_name).ratio()
        return (1 - section_weight) * by_name + section_weight * in_section

    return max(candidates, key=likeness)


def _set_leaf(config: DictConfig, key: str, value: Any, *, source: str) -> None:
    try:
        OmegaConf.update(config, key, value, merge=False)
    except OmegaConfBaseException as error:
        expected = _describe(_type_at(OmegaConf.get_type(config), key, source=source))
        raise ConfigError(f"{source}: {key} must be {expected}, got {value!r}") from error


def _describe(node: Any) -> str:
    """What values a field of this type takes, in words."""
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if isinstance(node, type) and issubclass(node, Enum):
        return "one of " + ", ".join(choice.name for choice in node)
    if typing.get_origin(node) is dict:
        return f"a mapping of names to {_describe(typing.get_args(node)[1]).removeprefix('a ')}s"
    if typing.get_args(node):
        return " or ".join(_describe(option) for option in typing.get_args(node))
    return names[node]


def _parent_and_name(config: DictConfig, key: str) -> tuple[Any, str]:
    section, _, name = key.rpartition(".")
    return OmegaConf.select(config, section), name


def _resolve(config: DictConfig, *, source: str) -> None:
    """Replace `${other.key}` by that key's value, checking its type."""
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: cannot resolve an interpolation: {error}") from error
