"""Environments by id: a module that fails on import, and an unknown id, are named before anything starts."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import pytest

from cluster.demonstrations.collect import Play, load_demonstrations, write_demonstrations
from cluster.environments import make_environment, require_environment
from cluster.errors import CosoError
from cluster.play.session import play
from tests.envs_for_tests import MISSING, ODD

#: What a user's module may do wrong -> the error to see, with the line it is in.
BROKEN = {
    "import os\ndef f(:\n": r"SyntaxError: invalid syntax \({path}:2\)",
    "\n\nimport not_installed_anywhere\n": (
        r"ModuleNotFoundError: No module named 'not_installed_anywhere' \({path}:3\)"
    ),
    "from envs.base import NoSuchName\n": r"ImportError: cannot import name 'NoSuchName' .*\({path}:1\)",
    "def size():\n    raise ValueError('two\\nlines')\nsize()\n": r"ValueError: two lines \({path}:2\)",
    "raise SystemExit(3)\n": r"SystemExit: 3 \({path}:1\)",
}
GOOD = """
import gymnasium
from envs.cards.number_line import NumberLine
gymnasium.register("coso-plugin/Good-v3", entry_point=NumberLine)
gymnasium.register("coso-plugin/Late-v0", entry_point="late_module:Late")
"""


@pytest.fixture()
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the module path; what is imported from it and registered by it is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    registered = dict(gymnasium.registry)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    gymnasium.registry.clear()
    gymnasium.registry.update(registered)


@pytest.mark.parametrize(("text", "wanted"), BROKEN.items(), ids=["syntax", "module", "name", "raises", "exits"])
def test_a_module_that_fails_on_import_is_named_with_its_own_error_and_place(
    text: str, wanted: str, modules: Path, tmp_path: Path
) -> None:
    path = modules / "plugin_module.py"
    path.write_text(text, encoding="utf-8")
    env_id = "plugin_module:coso-plugin/Any-v0"
    line = rf"environment {env_id}: module plugin_module cannot be imported: " + wanted.format(
        path=re.escape(str(path))
    )
    for call in (
        lambda: require_environment(env_id),
        lambda: play(env_id, expert=True),
        lambda: write_demonstrations(Play(env_id, {}, 1, 0.0, ""), 5, tmp_path / "demos"),
    ):
        with pytest.raises(CosoError) as error:
            call()
        assert re.fullmatch(line, str(error.value))


def test_a_module_that_does_not_exist_is_named(modules: Path) -> None:
    with pytest.raises(CosoError, match=r"module no_such\.plugin cannot be imported: there is no module no_such; is"):
        require_environment("no_such.plugin:coso-plugin/Any-v0")


def test_a_module_that_is_imported_only_when_the_environment_is_made_is_checked_too(modules: Path) -> None:
    (modules / "plugin_module.py").write_text(GOOD, encoding="utf-8")
    (modules / "late_module.py").write_text("1 / 0\n", encoding="utf-8")
    with pytest.raises(CosoError, match="module late_module cannot be imported: ZeroDivisionError: .*late_module.py:1"):
        require_environment("plugin_module:coso-plugin/Late-v0")


@pytest.mark.parametrize("version", ["-v3", ""])
def test_a_good_module_passes_and_makes_its_environment(modules: Path, version: str) -> None:
    (modules / "plugin_module.py").write_text(GOOD, encoding="utf-8")
    made = make_environment(f"plugin_module:coso-plugin/Good{version}", {"max_position": 7})
    made.close()


def test_an_id_that_the_module_does_not_register_names_the_nearest(modules: Path) -> None:
    (modules / "plugin_module.py").write_text(GOOD, encoding="utf-8")
    with pytest.raises(
        CosoError, match=r"no environment 'plugin_module:coso-plugin/God-v3': did you mean coso-plugin/"
    ):
        require_environment("plugin_module:coso-plugin/God-v3")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"success": MISSING}, "step returned an info without 'success'"),
        ({"reward": float("nan")}, "step returned reward = nan"),
        ({"image": None}, "reset returned observation"),
    ],
)
def test_play_and_demonstrations_check_what_an_environment_returns(
    changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    kwargs = {"changes": changes, "after": 0 if "image" in changes else 1}
    with pytest.raises(CosoError, match=f"{ODD}: {words}"):
        play(ODD, env_kwargs=kwargs, expert=True)
    with pytest.raises(CosoError, match=f"{ODD}: {words}"):
        write_demonstrations(Play(ODD, kwargs, seed=1, noise=0.0, habit=""), 5, tmp_path / "demos")


def test_what_says_the_same_is_converted_for_demonstrations_too(tmp_path: Path) -> None:
    kwargs = {"changes": {"reward": True, "success": 1, "action_labels": [1], "prompt": "half \ud83d"}, "after": 0}
    write_demonstrations(Play(ODD, kwargs, seed=1, noise=0.0, habit=""), 5, tmp_path / "demos")
    shown = load_demonstrations(tmp_path / "demos", ODD).batch
    assert shown.column("reward").tolist() == [1.0] * 5 and set(shown.column("prompt")) == {"half \ufffd"}
