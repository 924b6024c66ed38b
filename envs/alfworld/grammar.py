"""The texts of a game: TextWorld's context-sensitive grammar, evaluated without `eval` and without deep copies.

The engine's own parser reads the grammar. The derived texts equal those of `textworld.envs.pddl.textgen`
(`tests/envs/alfworld/test_engine.py` compares them) at a small part of the cost. A grammar holds Python expressions
that the engine passes to `eval`. This module understands only what games use: attributes of variables
(`{o.indefinite + ' ' + o.name}`), `+` and `or`. Anything else is a `ValueError`, so a game file cannot run code.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

Variables = Mapping[str, Any]


class TextGrammar:
    """Derives texts from the rules of one game."""

    def __init__(self, rules: Mapping[str, list[Any]], entities: Mapping[str, Any]) -> None:
        """`rules`: the engine's production rules by symbol. `entities`: the engine's `EntityInfo` by id."""
        self._rules = rules
        self._entities = entities

    def derive(self, text: str, state: Any, mapping: Mapping[Any, Any]) -> str:
        """Expand the symbols of `text` in `state` (a `textworld.logic.State`), with an action's `mapping` from
        placeholders to variables. Raises ValueError for a symbol without a rule."""
        variables = {placeholder.name: self._entities[variable.name] for placeholder, variable in mapping.items()}
        return self._derive_all(parse_symbols(text), state, variables, mapping)

    def _derive_all(
        self, symbols: tuple[Any, ...], state: Any, variables: Variables, mapping: Mapping[Any, Any]
    ) -> str:
        return "".join(self._derive_one(symbol, state, variables, mapping) for symbol in symbols)

    def _derive_one(self, symbol: Any, state: Any, variables: Variables, mapping: Mapping[Any, Any]) -> str:
        kind = type(symbol).__name__
        if kind == "TerminalSymbol":
            return str(symbol.symbol)
        if kind == "NonterminalSymbol":
            return self._derive_all(self._rule(str(symbol.symbol), state, mapping), state, variables, mapping)
        if kind == "EvalSymbol":
            return _expression(symbol.expression)(variables)
        if kind == "ConditionalSymbol":
            return "".join(self._each(symbol, state, variables, mapping))
        if kind == "ListSymbol":
            return self._listed(self._each(symbol.symbol, state, variables, mapping), state, variables, mapping)
        raise ValueError(f"the game's grammar has a symbol of unknown kind {kind}")

    def _each(self, symbol: Any, state: Any, variables: Variables, mapping: Mapping[Any, Any]) -> list[str]:
        """The texts of a conditional symbol, one for each binding for which its condition holds."""
        if not symbol.given:
            return [self._derive_one(symbol.expression, state, variables, mapping)]
        texts = []
        for found in state.all_assignments(_query(symbol.given), mapping):
            things = {placeholder.name: self._entities[variable.name] for placeholder, variable in found.items()}
            texts.append(self._derive_one(symbol.expression, state, {**variables, **things}, {**mapping, **found}))
        return texts

    def _listed(self, texts: list[str], state: Any, variables: Variables, mapping: Mapping[Any, Any]) -> str:
        if not texts:
            return self._derive_all(self._rule("list_empty", state, mapping), state, variables, mapping)
        if len(texts) == 1:
            return texts[0]
        comma, last = (
            self._derive_all(self._rule(name, state, mapping), state, variables, mapping)
            for name in ("list_separator", "list_last_separator")
        )
        return comma.join(texts[:-1]) + last + texts[-1]

    def _rule(self, name: str, state: Any, mapping: Mapping[Any, Any]) -> tuple[Any, ...]:
        """The replacement for a symbol by its first applicable rule."""
        for rule in self._rules.get(name, ()):
            if not rule.condition or any(True for _ in state.all_assignments(_query(rule.condition), mapping)):
                return tuple(rule.rhs)
        raise ValueError(f"the game's grammar has no rule for #{name}# here")


@lru_cache(maxsize=4096)
def parse_symbols(text: str) -> tuple[Any, ...]:
    """The symbols of a text from the engine's parser. Do not modify them."""
    from textworld.envs.pddl import textgen

    return tuple(textgen._parse_and_convert(text, rule_name="symbols"))


@lru_cache(maxsize=4096)
def _query(condition: str) -> Any:
    from textworld.logic import Rule

    return Rule.parse_conjunctive_query(condition)


@lru_cache(maxsize=4096)
def _expression(source: str) -> Callable[[Variables], str]:
    """A function from variables to text for a grammar expression. Raises ValueError for an unsupported expression."""
    try:
        tree = ast.parse(source.strip(), mode="eval").body
    except SyntaxError:
        raise ValueError(f"the game's grammar has an expression that cannot be read: {source!r}") from None
    value = _compiled(tree, source)
    return lambda variables: str(value(variables))


def _compiled(node: ast.expr, source: str) -> Callable[[Variables], Any]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
        return lambda variables: text
    if isinstance(node, ast.Name):
        name = node.id
        return lambda variables: _named(variables, name, source)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in _ATTRIBUTES:
        owner, attribute = node.value.id, node.attr
        return lambda variables: getattr(_named(variables, owner, source), attribute)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _compiled(node.left, source), _compiled(node.right, source)
        return lambda variables: left(variables) + right(variables)
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
        choices = [_compiled(choice, source) for choice in node.values]
        return lambda variables: next((text for choice in choices if (text := choice(variables))), "")
    raise ValueError(f"the game's grammar has an unsupported expression: {source!r}")


_ATTRIBUTES = frozenset({"id", "name", "definite", "indefinite"})


def _named(variables: Variables, name: str, source: str) -> Any:
    if name not in variables:
        raise ValueError(f"the game's grammar uses {name!r} in {source!r}, which is not defined")
    return variables[name]
