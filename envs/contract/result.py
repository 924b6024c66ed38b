"""What a check returns."""

from __future__ import annotations

from dataclasses import dataclass, field


class Broken(Exception):
    """A check's finding: what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Passed:
    """A check that found nothing wrong. measured: numbers by name, with the unit in the name; note: what the author
    may want to know."""

    measured: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Result:
    """The outcome of one check.

    name: of the check; ok: whether it passed; message: what is wrong, where and what to do, or a note, or ""; measured:
    numbers by name, with the unit in the name; seconds: what the check took.
    """

    name: str
    ok: bool
    message: str
    measured: dict[str, float]
    seconds: float

    @property
    def summary(self) -> str:
        """The message, then what was measured, for a table."""
        measured = ", ".join(f"{name} {value:.3g}" for name, value in self.measured.items())
        return ". ".join(part for part in (self.message, measured) if part)
