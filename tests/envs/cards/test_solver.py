"""The solver: what it finds is right, it finds something wherever there is something, and it says the shortest."""

import random
from fractions import Fraction
from itertools import combinations_with_replacement

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.cards.formulas import value_of
from envs.cards.solver import complete, solvable

numbers_up_to_ten = st.lists(st.integers(1, 10), min_size=4, max_size=4)


def reachable(numbers: tuple[Fraction, ...]) -> set[Fraction]:
    """Every value four numbers make, by the other way round: put any two together, and go on with three."""
    if len(numbers) == 1:
        return set(numbers)
    found = set()
    for i in range(len(numbers)):
        for j in range(len(numbers)):
            if i != j:
                a, b = numbers[i], numbers[j]
                rest = tuple(numbers[k] for k in range(len(numbers)) if k not in (i, j))
                for value in {a + b, a - b, a * b} | ({a / b} if b else set()):
                    found |= reachable((*rest, value))
    return found


def completions(formula: list[str], held: list[str], target: int, operators: str, room: int) -> list[tuple[str, ...]]:
    """Every completion of up to `room` entries, by trying all: for short ones."""
    found = [()] if not held and value_of(formula) == target else []
    if room:
        for entry in [*dict.fromkeys(held), *operators, ")"]:
            rest = list(held)
            if entry in rest:
                rest.remove(entry)
            found += [(entry, *way) for way in completions([*formula, entry], rest, target, operators, room - 1)]
    return found


def test_566_of_the_715_deals_of_numbers_up_to_ten_make_24() -> None:
    """The count that is known for the 24 game with numbers from 1 to 10."""
    deals = list(combinations_with_replacement(range(1, 11), 4))
    assert len(deals) == 715
    assert sum(solvable(deal, 24) for deal in deals) == 566


@given(numbers_up_to_ten, st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_solvable_is_what_putting_numbers_together_reaches(numbers: list[int], target: int) -> None:
    assert solvable(numbers, target) == (target in reachable(tuple(map(Fraction, numbers))))


@given(numbers_up_to_ten, st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_a_completion_of_any_beginning_uses_each_number_and_makes_the_target(numbers: list[int], seed: int) -> None:
    rng = random.Random(seed)
    left = [str(number) for number in numbers]
    formula: list[str] = []
    for _ in range(rng.randrange(6)):
        entry = rng.choice([*left, *"+-*/()", ""])
        if entry in left:
            left.remove(entry)
        formula.append(entry)
    way = complete(formula, [int(number) for number in left], 24)
    if way is not None:
        assert value_of([*formula, *way]) == 24
        assert sorted(entry for entry in way if entry.isdigit()) == sorted(left)


@pytest.mark.parametrize(
    ("formula", "held", "target"),
    [
        ([], "34", 12),
        ([], "93", 12),
        (["3"], "4", 12),
        (["+"], "26", 12),
        (["("], "84", 12),
        (["(", "8"], "4", 2),
        (["2", "*", "("], "4", 8),
        (["-"], "39", 6),
        (["1", "2"], "", 12),
        (["1"], "2", 12),
        (["6", "/"], "12", 3),
        (["2", "-", "3", "*"], "4", 10),
        (["2", "", "4"], "", 24),
        ([")"], "34", 12),
        (["3", "*", "*"], "4", 12),
        (["1", "/", "(", "2", "-"], "2", 1),
    ],
)
def test_short_completions_are_the_shortest_of_all_there_are(formula: list[str], held: str, target: int) -> None:
    everything = completions(formula, list(held), target, "+-*/(", 6)
    way = complete(formula, [int(number) for number in held], target, room=6)
    # Unary signs and needless parentheses make completions that the solver does not look for, but none is needed here.
    assert (way is None) == (not everything)
    if way is not None:
        assert way in everything and len(way) == min(map(len, everything))


def test_without_parentheses_none_are_written_and_room_is_kept() -> None:
    assert complete((), [2, 3, 4], 20) is not None
    assert complete((), [2, 3, 4], 20, "+*") is None
    assert complete((), [2, 3, 4], 14, "+*") in {("2", "+", "3", "*", "4"), ("2", "+", "4", "*", "3")}
    assert complete((), [3, 3, 8, 8], 24) == ("8", "/", "(", "3", "-", "8", "/", "3", ")")
    assert complete((), [3, 3, 8, 8], 24, room=8) is None


def test_numbers_are_joined_only_where_nothing_else_helps() -> None:
    assert complete((), [2, 4], 24) == ("2", "4")
    assert not solvable([2, 4], 24)
    assert not solvable([1, 1, 2, 4], 24)
    assert complete((), [1, 1, 2, 4], 24) == ("1", "+", "2", "4", "-", "1")
    assert complete(("1",), [2], 12) == ("2",)
