"""Which algorithms there are: one for each file of this folder that defines one, and those of modules of your own."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from functools import cache
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

import learner.algorithms
from learner.algorithms.base import Algorithm, AlgorithmSettings


@cache
def algorithms() -> dict[str, type[Algorithm]]:
    """Name -> class, of every algorithm in this folder."""
    found = {}
    for module in pkgutil.iter_modules(learner.algorithms.__path__, "learner.algorithms."):
        for _, member in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(member, Algorithm) and not inspect.isabstract(member) and member.__module__ == module.name:
                found[member.name] = member
    return found


def algorithm_class(name: str) -> type[Algorithm]:
    """The algorithm of that name, or the class that `module:Class` names. Raises `ValueError` that says what is wrong
    and what there is."""
    module_name, separator, class_name = name.partition(":")
    if not separator:
        if name in algorithms():
            return algorithms()[name]
        near = difflib.get_close_matches(name, algorithms(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"there is no algorithm {name!r}: {hint}there are {', '.join(sorted(algorithms()))}, and `module:Class` "
            "names one of your own"
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except Exception as error:  # whatever a user's module raises, the user wants to read
        raise ValueError(
            f"algorithm.name {name!r}: module {module_name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not (inspect.isclass(found) and issubclass(found, Algorithm)):
        raise ValueError(f"algorithm.name {name!r}: {module_name} has no class {class_name} that is an Algorithm")
    return found


def _of_its_class(value: Any) -> Any:
    """A mapping as the settings of the algorithm that its `name` selects (`AlgorithmSettings` has the default)."""
    if not isinstance(value, dict):
        return value
    name = value.get("name", AlgorithmSettings.model_fields["name"].default)
    if not isinstance(name, str):
        raise ValueError(f"algorithm.name should be text, not {name!r}")
    return algorithm_class(name).Settings.model_validate(value)


def default_algorithm() -> AlgorithmSettings:
    """The settings of a config that says nothing of its algorithm."""
    return _of_its_class({})


#: The type of the config's `algorithm` section: a union of all algorithms' settings, tagged by `name`.
AnyAlgorithmSettings = Annotated[SerializeAsAny[AlgorithmSettings], BeforeValidator(_of_its_class)]
