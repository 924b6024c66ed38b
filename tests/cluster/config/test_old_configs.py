"""Run folders of earlier commits: their configs load, or one line per key says what changed.

`old/COMMIT.yaml` is the `config.yaml` that COMMIT wrote for its `configs/numberline.yaml` (for its defaults, where that
file did not exist yet).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import files
from cluster.config.changed_keys import CHANGED_KEYS
from cluster.config.files import load_config, valid_keys
from cluster.errors import CosoError

OLD = sorted((Path(__file__).parent / "old").glob("*.yaml"))
SAYS_WHAT_CHANGED = re.compile(r"config key '[\w.]+' \(in .+\) (is now called '[\w.]+'; rename it|has no effect .+)")


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def test_there_are_old_configs() -> None:
    assert len(OLD) == 3


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_an_old_config_loads_with_its_values_or_is_told_what_changed(path: Path) -> None:
    try:
        config = load_config([path])
    except CosoError as error:
        for line in str(error).splitlines():
            assert SAYS_WHAT_CHANGED.fullmatch(line), line
        return
    loaded = leaves(config.model_dump(mode="json"))
    for key, value in leaves(yaml.safe_load(path.read_text(encoding="utf-8"))).items():
        assert loaded[key] == value, key


def test_a_removed_key_says_so() -> None:
    path = Path(__file__).parent / "old" / "42f425f.yaml"
    with pytest.raises(CosoError) as error:
        load_config([path])
    line = f"config key 'cluster.start_deadline_s' (in {path}) has no effect any more; remove it"
    assert line in str(error.value).splitlines()


def test_a_renamed_key_or_section_names_its_new_name_and_where_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHANGED_KEYS", {"training.rounds": "training.updates", "trainer": "learner"})
    old = tmp_path / "old.yaml"
    old.write_text("trainer: {ranks: 2}\n", encoding="utf-8")
    with pytest.raises(CosoError) as error:
        load_config([old], ["training.rounds=3"])
    assert sorted(str(error.value).splitlines()) == [
        "config key 'trainer' (in " + str(old) + ") is now called 'learner'; rename it",
        "config key 'training.rounds' (in override 'training.rounds=3') is now called 'training.updates'; rename it",
    ]


def test_the_table_names_only_keys_that_are_gone_and_names_that_exist() -> None:
    keys = set(valid_keys())
    assert not keys & set(CHANGED_KEYS)
    assert {new for new in CHANGED_KEYS.values() if new} <= keys
