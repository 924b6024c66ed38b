"""From YAML files and `key.sub=value` overrides to a `RunConfig`. Errors name the key, its source and the fix."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cluster.config.changed_keys import CHANGED_KEYS
from cluster.config.run_config import RunConfig
from cluster.config.trust import is_of_a_run, require_trusted
from cluster.errors import CosoError
from envs.parsing import without_surrogates
from learner.algorithms.base import AlgorithmSettings
from learner.algorithms.registry import algorithms

#: A config has a few hundred values, a few levels deep; more is a file that was made to cost time and memory.
MOST_VALUES, DEEPEST_LEVEL = 100_000, 50


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads 1e-5 as a number (as YAML 1.2 does, not 1.1) and a date as text."""


class _Dumper(yaml.SafeDumper):
    """Writes YAML that `_Loader` reads back unchanged: it quotes text that would be read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )
    _side.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in _side.yaml_implicit_resolvers.items()
    }


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = (), trusted: Sequence[str] = ()) -> RunConfig:
    """Read `files` in order, later ones override earlier ones, then apply `overrides` (`key.sub=value`).

    trusted: what a run folder's config.yaml may name of code, see `cluster.config.trust`. Raises `CosoError` that names
    the key, its source and the nearest valid key.
    """
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for file in files:
        layer = _read_yaml(Path(file))
        if is_of_a_run(Path(file)):
            require_trusted(Path(file), layer, trusted)
        _remember_sources(layer, str(file), sources)
        merged = _lay_over(merged, layer)
    words: dict[str, Any] = {}
    for word in overrides:
        layer = _parse_override(word)
        _remember_sources(layer, f"override {word!r}", sources)
        words = overlay(words, layer)
    return validate(_lay_over(merged, words), sources)


def config_of_words(words: Sequence[str], trusted: Sequence[str] | None = None) -> RunConfig:
    """The config from command-line words: names of YAML files, and overrides. trusted and errors: as `load_config`."""
    files = [word for word in words if word.endswith((".yaml", ".yml")) and not re.match(r"[\w.]+=", word)]
    return load_config(files, [word for word in words if word not in files], trusted or ())


def overlay(base: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """Merge `layer` into `base`: mappings merge key by key, other values replace."""
    merged = dict(base)
    for key, value in layer.items():
        below = merged.get(key)
        merged[key] = overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _lay_over(base: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """`layer` laid over `base`. Where it names another algorithm, that one's section begins with its defaults: the keys
    of the algorithm before are not its own."""
    section = layer.get("algorithm")
    before = base.get("algorithm")
    if isinstance(section, dict) and isinstance(before, dict):
        default = AlgorithmSettings.model_fields["name"].default
        if section.get("name", before.get("name", default)) != before.get("name", default):
            base = {**base, "algorithm": {}}
    return overlay(base, layer)


def validate(values: dict[str, Any], sources: dict[str, str] | None = None) -> RunConfig:
    """Check values against the models. sources: dotted key -> the file or override that set it. Raises `CosoError`."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = [_explain(problem, sources or {}) for problem in error.errors()]
        raise CosoError("\n".join(problems)) from None


def to_yaml(config: RunConfig) -> str:
    """The config as YAML that `load_config` reads back to an equal config."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, width=100)


def parse_value(text: str, word: str) -> Any:
    """Read the value of a `key=value` word as YAML. Raises `CosoError` that names the word."""
    try:
        value = yaml.load(text, Loader=_Loader) if text else ""
    except (yaml.YAMLError, ValueError, RecursionError):
        raise CosoError(f"{word[:200]!r}: the value is not valid YAML; quote it") from None
    _require_storable(value, f"override {word[:200]!r}")
    return value


def keyword_arguments(words: Sequence[str]) -> dict[str, Any]:
    """`key=value` words as keyword arguments. Raises `CosoError` for other words."""
    arguments = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator:
            raise CosoError(f"environment argument {word!r} is not of the form key=value")
        arguments[key] = parse_value(value, word)
    return arguments


def valid_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key of the config, sections included."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for section in sections_of(field.annotation):
            keys.extend(valid_keys(section, f"{prefix}{name}."))
    return list(dict.fromkeys(keys))


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The config sections that a field's annotation may hold (also `Section | None`): none, one, or one for each
    algorithm."""
    if annotation is AlgorithmSettings:
        return [algorithm.Settings for algorithm in algorithms().values()]
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CosoError(f"config file {path} does not exist; configs/ has ready-made ones") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CosoError(f"config file {path} cannot be read: {error}") from None
    try:
        values = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CosoError(f"config file {path} is not valid YAML: {error}") from None
    _require_storable(values, f"config file {path}")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise CosoError(f"config file {path} must hold a mapping of keys to values, not a {type(values).__name__}")
    return values


def _parse_override(word: str) -> dict[str, Any]:
    key, separator, text = word.partition("=")
    if not separator or not key.strip():
        raise CosoError(f"override {word!r} is not of the form key.sub=value, for instance training.updates=10")
    value = parse_value(text, word)
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    _require_storable(value, f"override {word[:200]!r}")
    return value


def _require_storable(values: Any, where: str) -> None:
    """Raise `CosoError` for values that no file could hold again: endless or huge by aliases (`&a`, `*a`), nested too
    deeply, or text with half a character."""
    waiting = [(values, 1)]
    for count in itertools.count(1):
        if not waiting:
            return
        value, level = waiting.pop()
        if count > MOST_VALUES or level > DEEPEST_LEVEL:
            raise CosoError(
                f"{where} has more than {MOST_VALUES:,} values (aliases written out) or {DEEPEST_LEVEL} levels; a "
                "config has fewer, so look for an alias (*name) that repeats too much"
            )
        if isinstance(value, dict):
            waiting += [(each, level + 1) for pair in value.items() for each in pair]
        elif isinstance(value, list | tuple | set):
            waiting += [(each, level + 1) for each in value]
        elif isinstance(value, str) and without_surrogates(value) != value:
            raise CosoError(f"{where} has text with half of a surrogate pair, which no file can store: {value[:80]!a}")


def _remember_sources(layer: dict[str, Any], source: str, sources: dict[str, str], prefix: str = "") -> None:
    for key, value in layer.items():
        sources[f"{prefix}{key}"] = source
        if isinstance(value, dict):
            _remember_sources(value, source, sources, f"{prefix}{key}.")


def _explain(problem: Any, sources: dict[str, str]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    source = _nearest_source(problem["loc"], sources)
    where = f" (in {source})" if source else ""
    if problem["type"] == "extra_forbidden":
        if key in CHANGED_KEYS:
            new = CHANGED_KEYS[key]
            change = f"is now called {new!r}; rename it" if new else "has no effect any more; remove it"
            return f"config key {key!r}{where} {change}"
        near = difflib.get_close_matches(key, valid_keys(), n=1, cutoff=0.5) or _same_leaf(key)
        hint = f"; the nearest valid key is {near[0]!r}" if near else "; `coso config` lists the valid keys"
        return f"unknown config key {key!r}{where}{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "string_type":
        message += " (quote text that YAML reads as another type)"
    if problem["type"] == "value_error":
        return f"config{where}: {message}"
    return f"config key {key!r}{where}: {message}, got {problem['input']!r}"


def _same_leaf(key: str) -> list[str]:
    leaf = key.rsplit(".", 1)[-1]
    leaves = {valid.rsplit(".", 1)[-1]: valid for valid in valid_keys()}
    return [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=1)]


def _nearest_source(location: Iterable[Any], sources: dict[str, str]) -> str | None:
    parts = [str(part) for part in location]
    while parts:
        if source := sources.get(".".join(parts)):
            return source
        parts.pop()
    return None
