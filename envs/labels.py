"""Label spaces: an action as a fixed-length vector of small integers, one per head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NOT_APPLICABLE = -1
"""The label of a head that does not apply to an action."""


@dataclass(frozen=True)
class LabelHead:
    """One component of an action: its name, its number of values, and the values' names if they have any."""

    name: str
    size: int
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"label head {self.name!r} needs at least one value, not {self.size}")
        if self.labels is not None and len(self.labels) != self.size:
            raise ValueError(f"label head {self.name!r} has {self.size} values but {len(self.labels)} names")


@dataclass(frozen=True)
class LabelSpace:
    """The heads of an environment's actions, in the order of `action_labels`."""

    heads: tuple[LabelHead, ...]

    def __post_init__(self) -> None:
        names = [head.name for head in self.heads]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a label space needs heads with distinct names, not {names}")

    def __len__(self) -> int:
        return len(self.heads)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of each head, (K,)."""
        return tuple(head.size for head in self.heads)

    def none(self) -> NDArray[np.int32]:
        """Labels of an invalid utterance: int32 (K,), all `NOT_APPLICABLE`."""
        return np.full(len(self.heads), NOT_APPLICABLE, dtype=np.int32)

    def encode(self, values: Mapping[str, str | int]) -> NDArray[np.int32]:
        """Labels int32 (K,) of an action given as head name -> value (a label's name, or its index).

        Heads that are not given do not apply. Raises ValueError for an unknown head or value.
        """
        labels = self.none()
        positions = {head.name: index for index, head in enumerate(self.heads)}
        for name, value in values.items():
            if name not in positions:
                raise ValueError(f"no label head {name!r}; the heads are {list(positions)}")
            head = self.heads[positions[name]]
            if isinstance(value, str):
                if head.labels is None or value not in head.labels:
                    raise ValueError(f"label head {name!r} has no value {value!r}; its values: {head.labels}")
                value = head.labels.index(value)
            if not 0 <= value < head.size:
                raise ValueError(f"label head {name!r} takes 0..{head.size - 1}, not {value}")
            labels[positions[name]] = value
        return labels


@dataclass(frozen=True, eq=False)
class ParsedAction:
    """The result of parsing an utterance.

    `action` is the canonical text ("" when invalid), `labels` int32 (K,) (all -1 when invalid), and `valid`
    says whether the utterance names exactly one action. `start`, in [0, len(utterance)], is the first character of the
    part in which the parser looks for the action (len(utterance): there is none); what stands before is thought. None:
    the parser does not say.
    """

    action: str
    labels: NDArray[np.int32]
    valid: bool
    start: int | None = None
