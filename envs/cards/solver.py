"""The solver of EZPoints and Points24: completes a formula so that it uses all remaining numbers and has a given value.

An expression over some numbers is one number, or an operator between two expressions over a split of the numbers
(`expressions`, cached by numbers). A partial formula is completed from its innermost open group outwards: each possible
value of a closed group, with the numbers then left, is an operand of the group around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import combinations, permutations
from typing import NamedTuple

from envs.cards.formulas import Group, read

Numbers = tuple[int, ...]  # in ascending order
Entries = tuple[str, ...]

#: All operators and parentheses; a game may allow fewer. Without "(" the solver uses no parentheses.
ALL_OPERATORS = "+-*/("


class Expression(NamedTuple):
    """An expression as seen by the one around it: its value, and its kind: "atom" (a number), "product" or "sum"."""

    value: Fraction
    kind: str


class Closing(NamedTuple):
    """A way to close a group: its value, and the numbers left for the rest of the formula."""

    value: Fraction
    left: Numbers


def solvable(numbers: Sequence[int], target: int, operators: str = ALL_OPERATORS) -> bool:
    """Whether each number once, with the operators and parentheses, can make the target (without joining numbers)."""
    return _complete((), tuple(sorted(numbers)), target, operators, False) is not None


def complete(
    entries: Sequence[str], numbers: Sequence[int], target: int, operators: str = ALL_OPERATORS, room: int = 100
) -> Entries | None:
    """The entries to append so that the formula uses each of `numbers` once more and has the value `target` (int > 0).

    A shortest completion with at most `room` entries, deterministic; None if there is none. Numbers are joined (2, 4
    to 24) only if there is no other completion.
    """
    left = tuple(sorted(numbers))
    for joined in (False, True):
        found = _complete(tuple(entries), left, target, operators, joined)
        if found is not None and len(found) <= room:
            return found
    return None


@lru_cache(maxsize=16384)
def _complete(entries: Entries, left: Numbers, target: int, operators: str, joined: bool) -> Entries | None:
    partial = read(entries)
    if partial is None:
        return None
    goal = Fraction(target)
    if partial.groups == (Group(),) and not partial.digits:
        return _whole(left, goal, operators, joined)
    *outer_groups, innermost = partial.groups
    starts = list(_with_digits(innermost, partial.digits, partial.closed, left, joined))
    while outer_groups:
        closings: dict[Closing, Entries] = {}
        for group, numbers, begun in starts:
            for closing, way in _closings(group, numbers, operators, joined).items():
                _keep_shorter(closings, closing, (*begun, *way))
        outer = outer_groups.pop()
        starts = []
        for (value, numbers), begun in closings.items():
            grown = outer.with_operand(value)
            if grown is not None:
                starts.append((grown, numbers, (*begun, ")")))
    ends = ((begun, _reach(group, numbers, goal, operators, joined)) for group, numbers, begun in starts)
    return min(((*begun, *end) for begun, end in ends if end is not None), key=len, default=None)


def _whole(numbers: Numbers, goal: Fraction, operators: str, joined: bool) -> Entries | None:
    """A shortest expression of all the numbers with the value `goal`; one side of an operator gives the other."""
    ways = [atom for atom in _atoms(numbers, joined) if int("".join(atom)) == goal]
    for some, others in _splits(numbers):
        for operator in operators.replace("(", ""):
            if len(some) <= len(others):
                sides = (
                    (left, right)
                    for left in expressions(some, operators, joined)
                    for right in _of_value(others, _right_side(left.value, operator, goal), operators, joined)
                )
            else:
                sides = (
                    (left, right)
                    for right in expressions(others, operators, joined)
                    for left in _of_value(some, _left_side(operator, right.value, goal), operators, joined)
                )
            for left, right in sides:
                in_left, in_right = _parentheses(left, operator, right)
                if "(" in operators or not (in_left or in_right):
                    left_entries = _written(expressions(some, operators, joined)[left], in_left)
                    right_entries = _written(expressions(others, operators, joined)[right], in_right)
                    ways.append((*left_entries, operator, *right_entries))
    return min(ways, key=len, default=None)


@lru_cache(maxsize=256)
def expressions(numbers: Numbers, operators: str, joined: bool = False) -> Mapping[Expression, Entries]:
    """All values that the numbers can make, each used once, with a shortest way to write each value."""
    found: dict[Expression, Entries] = {}
    for atom in _atoms(numbers, joined):
        _keep_shorter(found, Expression(Fraction(int("".join(atom))), "atom"), atom)
    for some, others in _splits(numbers):
        for left, left_entries in expressions(some, operators, joined).items():
            for right, right_entries in expressions(others, operators, joined).items():
                for operator in operators.replace("(", ""):
                    in_left, in_right = _parentheses(left, operator, right)
                    if operator == "/" and not right.value or "(" not in operators and (in_left or in_right):
                        continue
                    written = (*_written(left_entries, in_left), operator, *_written(right_entries, in_right))
                    kind = "sum" if operator in "+-" else "product"
                    _keep_shorter(found, Expression(_apply(left.value, operator, right.value), kind), written)
    return found


def _of_value(numbers: Numbers, value: Fraction | None, operators: str, joined: bool) -> list[Expression]:
    """The expressions over the numbers that have the value, of every kind; [] for None."""
    if value is None:
        return []
    known = expressions(numbers, operators, joined)
    return [found for kind in ("atom", "product", "sum") if (found := Expression(value, kind)) in known]


def _with_digits(
    group: Group, digits: str, closed: bool, left: Numbers, joined: bool
) -> Iterator[tuple[Group, Numbers, Entries]]:
    """All forms of the innermost group once the number at the end of the formula is complete."""
    if not digits:
        yield group, left, ()
        return
    ways: list[tuple[Entries, Numbers]] = [((), left)]
    if joined and not closed:
        ways += [(order, rest) for some, rest in _parts(left) for order in _atoms(some, joined)]
    for more, rest in ways:
        grown = group.with_operand(Fraction(int(digits + "".join(more))))
        if grown is not None:
            yield grown, rest, more


def _reach(group: Group, left: Numbers, goal: Fraction, operators: str, joined: bool) -> Entries | None:
    """A shortest continuation of the outermost group that uses all the numbers and has the value `goal`."""
    if not group.operator:
        if not left:
            return () if group.value == goal else None
        steps = [((operator,), group.with_operator(operator), left) for operator in operators.replace("(", "")]
        ways = [(*begun, *way) for begun, grown, rest in steps if (way := _reach(grown, rest, goal, operators, joined))]
        return min(ways, key=len, default=None)
    ways = []
    for some, rest in _parts(left):
        if rest:
            operands = list(expressions(some, operators, joined))
        elif group.operator == "*" and not group.term:
            operands = list(expressions(some, operators, joined)) if group.total == goal else []
        else:
            operands = _of_value(some, _operand(group, goal), operators, joined)
        for operand in operands:
            grown = group.with_operand(operand.value)
            if grown is None or operand.kind != "atom" and "(" not in operators:
                continue
            way = _reach(grown, rest, goal, operators, joined)
            if way is not None:
                written = _written(expressions(some, operators, joined)[operand], operand.kind != "atom")
                ways.append((*written, *way))
    return min(ways, key=len, default=None)


def _operand(group: Group, goal: Fraction) -> Fraction | None:
    """The operand that gives a group the value `goal`; None if there is none."""
    missing = goal - group.total
    if group.operator in "+-":
        return (missing - group.term) * (group.sign if group.operator == "+" else -group.sign)
    if group.operator == "*":
        return missing / group.term * group.sign
    return group.term / missing * group.sign if missing else None


@lru_cache(maxsize=256)
def _closings(group: Group, left: Numbers, operators: str, joined: bool) -> Mapping[Closing, Entries]:
    """All results of continuing a group until it can be closed, with a shortest way to write each."""
    found: dict[Closing, Entries] = {}
    if not group.operator:
        found[Closing(group.value, left)] = ()
        if left:
            for operator in operators.replace("(", ""):
                for closing, way in _closings(group.with_operator(operator), left, operators, joined).items():
                    _keep_shorter(found, closing, (operator, *way))
        return found
    for some, rest in _parts(left):
        if group == Group() and not rest and len(some) > 1:
            continue  # parentheses around the whole group change nothing
        for operand, written in expressions(some, operators, joined).items():
            grown = group.with_operand(operand.value)
            if grown is None or operand.kind != "atom" and "(" not in operators:
                continue
            begun = _written(written, operand.kind != "atom")
            for closing, way in _closings(grown, rest, operators, joined).items():
                _keep_shorter(found, closing, (*begun, *way))
    return found


def _keep_shorter(found: dict, key: Expression | Closing, entries: Entries) -> None:
    if key not in found or len(entries) < len(found[key]):
        found[key] = entries


def _atoms(numbers: Numbers, joined: bool) -> list[Entries]:
    """The numbers as one atom: a single number, or several joined in every order."""
    if len(numbers) == 1:
        return [(str(numbers[0]),)]
    return sorted({tuple(map(str, order)) for order in permutations(numbers)}) if joined else []


@lru_cache(maxsize=2048)
def _parts(numbers: Numbers) -> tuple[tuple[Numbers, Numbers], ...]:
    """Every non-empty part of the numbers, with the rest; both ascending, no pair twice."""
    positions = range(len(numbers))
    pairs = {
        (tuple(numbers[i] for i in chosen), tuple(numbers[i] for i in positions if i not in chosen))
        for size in range(1, len(numbers) + 1)
        for chosen in combinations(positions, size)
    }
    return tuple(sorted(pairs, key=lambda pair: (len(pair[0]), pair)))


def _splits(numbers: Numbers) -> Iterator[tuple[Numbers, Numbers]]:
    return ((some, rest) for some, rest in _parts(numbers) if rest)


def _parentheses(left: Expression, operator: str, right: Expression) -> tuple[bool, bool]:
    """Whether the operands of an operator need parentheses: a + (b - c) and a * (b / c) do not."""
    if operator == "+":
        return False, False
    if operator == "-":
        return False, right.kind == "sum"
    return left.kind == "sum", right.kind == "sum" if operator == "*" else right.kind != "atom"


def _written(entries: Entries, in_parentheses: bool) -> Entries:
    return ("(", *entries, ")") if in_parentheses else entries


def _apply(left: Fraction, operator: str, right: Fraction) -> Fraction:
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    return left * right if operator == "*" else left / right


def _right_side(left: Fraction, operator: str, goal: Fraction) -> Fraction | None:
    """The number on the right of an operator that makes `goal` (> 0), if there is one."""
    if operator == "+":
        return goal - left
    if operator == "-":
        return left - goal
    if not left:
        return None
    return goal / left if operator == "*" else left / goal


def _left_side(operator: str, right: Fraction, goal: Fraction) -> Fraction | None:
    """The number on the left of an operator that makes `goal` (> 0), if there is one."""
    if operator == "+":
        return goal - right
    if operator == "-":
        return goal + right
    if not right:
        return None
    return goal / right if operator == "*" else goal * right
