"""Formulas of numbers, + - * / and parentheses: parsed and evaluated exactly, in linear time, without `eval`.

A formula is a sequence of entries: numbers as decimal text, operators, parentheses, and "" for a blank. Adjacent
numbers join (`2`, `4` reads 24) unless a blank stands between them; elsewhere blanks have no effect. Usual precedence,
left to right; unary signs; any nesting. `* *` and `/ /` are not operators.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

OPERATORS = frozenset("+-*/")
BLANK = ""
#: Bounds of values; a formula beyond them has no value, which bounds the time of evaluation.
MAX_DIGITS = 64
MAX_BITS = 4096

_NUMBER = re.compile("[0-9]+")
_TOKEN = re.compile(r"[0-9]| |[-+*/()]")


class Group(NamedTuple):
    """The part of a formula, or of one pair of parentheses, that has been read: `total` + `term`.

    `operator`: the operator whose right operand is missing, or "" if the group could end here. `sign`: the sign of
    that operand, from unary signs.
    """

    total: Fraction = Fraction(0)
    term: Fraction = Fraction(0)
    operator: str = "+"
    sign: int = 1

    @property
    def value(self) -> Fraction:
        """The value if the group ends here; valid only if `operator` is ""."""
        return self.total + self.term

    def with_operand(self, value: Fraction) -> Group | None:
        """The group with the missing operand; None for a division by zero or a value out of bounds."""
        value = value * self.sign
        if self.operator == "+":
            return _bounded(self.total + self.term, value)
        if self.operator == "-":
            return _bounded(self.total + self.term, -value)
        if self.operator == "*":
            return _bounded(self.total, self.term * value)
        return _bounded(self.total, self.term / value) if value else None

    def with_operator(self, operator: str) -> Group:
        """The group followed by an operator."""
        return self._replace(operator=operator, sign=1)


class Partial(NamedTuple):
    """The beginning of a formula: open groups, outermost first, and the digits of a number that may still grow.

    `digits` is "" or the missing operand of the innermost group. `closed`: a blank follows the digits.
    """

    groups: tuple[Group, ...]
    digits: str
    closed: bool


def read(entries: Iterable[str]) -> Partial | None:
    """Read entries as the beginning of a formula; None if no formula with a value begins like this."""
    groups = [Group()]
    digits = ""
    closed = False
    for entry in entries:
        if entry == BLANK:
            closed = bool(digits)
            continue
        if _NUMBER.fullmatch(entry):
            if closed or not groups[-1].operator or len(digits) + len(entry) > MAX_DIGITS:
                return None
            digits += entry
            continue
        if digits:
            grown = groups[-1].with_operand(Fraction(int(digits)))
            if grown is None:
                return None
            groups[-1] = grown
            digits, closed = "", False
        group = groups[-1]
        if entry == "(" and group.operator:
            groups.append(Group())
        elif entry == ")" and not group.operator and len(groups) > 1:
            groups.pop()
            outer = groups[-1].with_operand(group.value)
            if outer is None:
                return None
            groups[-1] = outer
        elif entry in OPERATORS and not group.operator:
            groups[-1] = group.with_operator(entry)
        elif entry in ("+", "-"):
            groups[-1] = group._replace(sign=-group.sign if entry == "-" else group.sign)
        else:
            return None
    return Partial(tuple(groups), digits, closed)


def value_of(entries: Iterable[str]) -> Fraction | None:
    """The exact value of a formula; None if it is not a formula, divides by zero, or is out of bounds."""
    partial = read(entries)
    if partial is None or len(partial.groups) != 1:
        return None
    group: Group | None = partial.groups[0]
    if partial.digits:
        group = partial.groups[0].with_operand(Fraction(int(partial.digits)))
    return group.value if group is not None and not group.operator else None


def entries_of(text: str) -> list[str] | None:
    """Split a formula's text into entries, digit by digit; None if it has an invalid character."""
    entries = ["" if token == " " else token for token in _TOKEN.findall(text)]
    return entries if len(entries) == len(text) else None


def shown(entries: Sequence[str]) -> str:
    """Entries as readable text: separated by spaces, with `_` for a blank."""
    return " ".join(entry or "_" for entry in entries)


def _bounded(total: Fraction, term: Fraction) -> Group | None:
    size = max(part.bit_length() for number in (total, term) for part in number.as_integer_ratio())
    return Group(total, term, "") if size <= MAX_BITS else None
