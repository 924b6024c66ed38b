"""Formulas: the exact value of any text or entries, against Python's own grammar; nothing executed, nothing slow."""

import ast
import time
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.cards.formulas import MAX_DIGITS, entries_of, shown, value_of

entries = st.sampled_from([*map(str, range(1, 14)), "+", "-", "*", "/", "(", ")", ""])


def by_python(text: str) -> Fraction | None:
    """The value by Python's parser and a walk over its tree, where only the operators of these games are known."""
    if "**" in text or "//" in text:
        return None
    try:
        return walk(ast.parse(text.strip(" "), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, TypeError):
        return None


def walk(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        return walk(node.operand) * (1 if isinstance(node.op, ast.UAdd) else -1)
    if isinstance(node, ast.BinOp):
        binary: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
            ast.Add: lambda a, b: a + b,
            ast.Sub: lambda a, b: a - b,
            ast.Mult: lambda a, b: a * b,
            ast.Div: lambda a, b: a / b,
        }
        return binary[type(node.op)](walk(node.left), walk(node.right))
    raise TypeError(type(node))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8/(3-8/3)", 24),
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("2-3-4", -5),
        ("24/4/2", 3),
        ("1/3", Fraction(1, 3)),
        ("-2*-3", 6),
        ("2--+-3", -1),
        ("-(2+3)", -5),
        ("((7))", 7),
        (" 2 + 3 ", 5),
        ("10*10", 100),
    ],
)
def test_the_value_of_a_formula(text: str, value: Fraction | int) -> None:
    assert value_of(entries_of(text) or []) == value


@pytest.mark.parametrize(
    "text",
    ["", " ", "+", "2+", "*2", "2**3", "2//3", "2 3", "2(3)", "(2)(3)", "(2)3", "()", "(", ")", "2)", "(2", "1/0"]
    + ["1/(2-2)", "2+*3", "2*/3"],
)
def test_what_is_no_formula_has_no_value(text: str) -> None:
    assert value_of(entries_of(text) or []) is None


def test_adjacent_numbers_join_unless_a_blank_is_between() -> None:
    assert value_of(["2", "4"]) == 24
    assert value_of(["10", "5", "+", "1"]) == 106
    assert value_of(["2", "", "4"]) is None
    assert value_of(["", "2", "", "+", "", "4", ""]) == 6
    assert shown(["2", "", "+", "10"]) == "2 _ + 10"


@given(st.lists(entries, max_size=20))
@settings(max_examples=500, deadline=None)
def test_any_entries_have_the_value_that_python_would_give(formula: list[str]) -> None:
    assert value_of(formula) == by_python("".join(entry or " " for entry in formula))


@st.composite
def whole_formulas(draw: st.DrawFn, depth: int = 4) -> str:
    """Formulas that mostly have a value, which random entries seldom are."""
    if depth == 0 or draw(st.booleans()):
        return str(draw(st.integers(1, 13)))
    left, right = draw(whole_formulas(depth - 1)), draw(whole_formulas(depth - 1))
    text = draw(st.sampled_from(["", "", "-", "+"])) + left + draw(st.sampled_from("+-*/")) + right
    return f"({text})" if draw(st.booleans()) else text


@given(whole_formulas())
@settings(max_examples=300, deadline=None)
def test_a_whole_formula_has_the_value_that_python_would_give(text: str) -> None:
    assert value_of(entries_of(text) or []) == by_python(text)


@given(st.text(st.characters()))
@settings(deadline=None)
def test_any_text_is_answered(text: str) -> None:
    found = entries_of(text)
    assert found is None or value_of(found) == by_python(text) or not text.isascii() or "0" in text


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9**9",
        "(" * 10_000,
        "(" * 10_000 + ")" * 10_000,
        "-" * 100_000 + "1/0",
        "9" * (MAX_DIGITS + 1),
        "9" * 1_000_000,
        "*".join(["9" * MAX_DIGITS] * 10_000),
        "/".join(["7" * MAX_DIGITS] * 10_000),
        "٣+٤",
        "２+３",
        "²",
        "1e9",
        "__import__('os')",
    ],
)
def test_hostile_formulas_are_answered_at_once(text: str) -> None:
    started = time.perf_counter()
    found = entries_of(text)
    assert found is None or value_of(found) is None
    assert time.perf_counter() - started < 5


def test_nesting_is_bounded_by_nothing_but_the_length() -> None:
    started = time.perf_counter()
    assert value_of(entries_of("(" * 10_000 + "7" + ")" * 10_000) or []) == 7
    assert value_of(entries_of("1+" * 50_000 + "1") or []) == 50_001
    assert time.perf_counter() - started < 5
