"""The shape of an SCM: what it is made from besides its weights, and what a checkpoint says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from scoring.settings import ScmEncoderSettings


@dataclass(frozen=True, kw_only=True)
class ScmSizes:
    """The sizes of an SCM's input and outputs, which the tokenizer and the environment decide.

    vocab_size: number of token ids, at least all those that the policy can sample.
    head_sizes: number of labels of each head of the environment's label space, in its order.
    Raises ValueError when there is no head or a size is below 1.
    """

    vocab_size: int
    head_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_sizes", tuple(int(size) for size in self.head_sizes))
        if not self.head_sizes:
            raise ValueError("head_sizes is empty: give the number of labels of each head of the label space")
        numbers = {"vocab_size": self.vocab_size}
        numbers |= {f"head_sizes[{index}]": size for index, size in enumerate(self.head_sizes)}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name} is {value}: give a whole number of at least 1")


def saved_shape(settings: ScmEncoderSettings, sizes: ScmSizes) -> dict[str, Any]:
    """Return what a checkpoint says of an SCM's shape: sizes and encoder settings by name, as JSON types."""
    encoder = {name: getattr(settings, name) for name in ScmEncoderSettings.model_fields}
    return asdict(sizes) | {"head_sizes": list(sizes.head_sizes)} | encoder


def read_shape(saved: Mapping[str, Any]) -> tuple[ScmEncoderSettings, ScmSizes]:
    """Undo `saved_shape`.

    Raises ValueError, in one line, when the names are not those that this version of the code writes.
    """
    encoder, sizes = list(ScmEncoderSettings.model_fields), [field.name for field in fields(ScmSizes)]
    if changed := sorted(saved.keys() ^ {*encoder, *sizes}):
        raise ValueError(
            f"the saved SCM comes from another version of the code, which differs in {', '.join(changed)}: load it "
            "with the version that saved it, or train a new SCM"
        )
    return (
        ScmEncoderSettings(**{name: saved[name] for name in encoder}),
        ScmSizes(**{name: saved[name] for name in sizes}),
    )


def check_shape(saved: Mapping[str, Any], settings: ScmEncoderSettings, sizes: ScmSizes) -> None:
    """Raise ValueError, in one line, unless a saved SCM has the shape that `settings` and `sizes` describe."""
    ours = saved_shape(settings, sizes)
    theirs = saved_shape(*read_shape(saved))
    for name, value in ours.items():
        if theirs[name] != value:
            raise ValueError(
                f"the saved SCM has {name} = {theirs[name]}, this run has {value}: resume with the same scoring "
                "settings, model and environment, or start without the saved SCM"
            )
