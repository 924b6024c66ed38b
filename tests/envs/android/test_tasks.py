"""Task sets as data: enough of them, no item shared, none met by doing nothing; checks and edits of a state."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.android.general_tasks import general_tasks
from envs.android.phone.content import GOODS, SITES, initial_state, products, search
from envs.android.task_sets import load_tasks
from envs.android.tasks import Check, Edit, Task, matches, read_task_file
from envs.android.webshop_tasks import webshop_tasks

SETS = {"general": general_tasks, "webshop": webshop_tasks}
EVERY_TASK = [task for make in SETS.values() for split in ("train", "test") for task in make(split)]


def as_inspected(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "screen": state["stack"][-1]}


@pytest.mark.parametrize("name", SETS)
def test_there_are_enough_tasks_and_no_two_alike(name: str) -> None:
    train, test = SETS[name]("train"), SETS[name]("test")
    assert len(train) >= 100 and len(test) >= 50
    for words in ([task.name for task in (*train, *test)], [task.instruction for task in (*train, *test)]):
        assert len(set(words)) == len(words)


def test_the_halves_share_no_item() -> None:
    def items(tasks: tuple[Task, ...]) -> set[tuple[str, str]]:
        """What a task is about: the values its success is checked for, less the on and off of switches."""
        found = set()
        for task in tasks:
            for check in task.success:
                if check.path in ("screen.app", "screen.page", "screen.site") and len(task.success) > 1:
                    continue
                value = check.value
                if isinstance(value, dict):
                    value = {key: each for key, each in value.items() if key in ("name", "title", "time", "minutes")}
                found.add((check.path, json.dumps(value)) if not isinstance(value, bool) else (check.path, ""))
        return found

    assert not items(general_tasks("train")) & items(general_tasks("test"))
    departments = [{task.name.split("/")[2] for task in webshop_tasks(split) if task.family == "department"}
                   for split in ("train", "test")]  # fmt: skip
    assert departments[0] and departments[1] and not departments[0] & departments[1]
    goods = [
        {kind for shop in GOODS.values() for department, kinds in shop.items() for kind in kinds if department in half}
        for half in departments
    ]
    for half, other, split in ((0, 1, "train"), (1, 0, "test")):
        queries = {
            task.name.split("/")[2] for task in webshop_tasks(split) if task.family in ("search", "first_result")
        }
        assert all(any(kind in query for kind in goods[half]) for query in queries)
        assert not any(query.endswith(kind) for query in queries for kind in goods[other])


@pytest.mark.parametrize("seed", [0, 1, 2**30, 2**30 + 5])
def test_doing_nothing_accomplishes_no_task(seed: int) -> None:
    state = initial_state(seed)
    assert [task.name for task in EVERY_TASK if task.succeeded(as_inspected(task.begin(state)))] == []


def test_setting_a_task_changes_nothing_but_what_it_says() -> None:
    state = initial_state(4)
    before = json.dumps(state)
    for task in EVERY_TASK:
        task.begin(state)
    assert json.dumps(state) == before


def test_a_seed_is_a_phone() -> None:
    assert initial_state(5) == initial_state(5) != initial_state(6)
    assert initial_state(5, shuffle_apps=True)["layout"] != initial_state(6, shuffle_apps=True)["layout"]


def test_the_two_shops_differ() -> None:
    kinds = [{kind for each in GOODS[shop].values() for kind in each} for shop in SITES]
    assert not kinds[0] & kinds[1] and not set(GOODS["amberly"]) & set(GOODS["voltmart"])
    for shop in SITES:
        assert len({each["id"] for each in products(shop)}) == len(products(shop)) == 96
        assert search(shop, "") == products(shop) and search(shop, "no such thing") == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_a_value_matches_itself_as_a_pattern(value: Any) -> None:
    assert matches(value, value)


@given(st.dictionaries(st.text(max_size=3), json_values, min_size=1, max_size=4))
def test_a_pattern_is_part_of_what_it_matches(value: dict[str, Any]) -> None:
    name = next(iter(value))
    part = {key: each for key, each in value.items() if key != name}
    assert matches(part, value) and not matches(value, part)


@given(st.lists(json_values, max_size=4), json_values)
def test_has_and_lacks_are_opposites_and_edits_make_them_true(elements: list[Any], value: Any) -> None:
    state = {"list": elements}
    has, lacks = Check("list", "has", value), Check("list", "lacks", value)
    assert has.holds(state) != lacks.holds(state)
    Edit("put", "list", value).apply(state)
    assert has.holds(state)
    Edit("drop", "list", value).apply(state)
    assert lacks.holds(state)


def test_a_path_that_leads_nowhere_meets_no_condition() -> None:
    for state in ({}, {"a": 1}, {"a": {"b": 1}}, {"a": {"c": None}}):
        assert not Check("a.c.d", "equals", None).holds(state)
        assert not Check("a.c.d", "has", None).holds(state)


def test_instructions_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "errands.txt"
    path.write_text("# errands\n\nOpen the clock\n  Turn on Wi-Fi \n")
    assert [task.instruction for task in read_task_file(path)] == ["Open the clock", "Turn on Wi-Fi"]
    assert [task.name for task in read_task_file(path)] == ["errands/3", "errands/4"]
    held_out = tmp_path / "errands_test.txt"
    held_out.write_text("Open the maps\n")
    halves = load_tasks(str(path))
    assert [task.instruction for task in halves["test"]] == ["Open the maps"] and len(halves["train"]) == 2


def test_checks_are_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text("- instruction: Open the settings\n  checks: [{activity: com.android.settings}]\n")
    assert read_task_file(path)[0].device_checks == ({"activity": "com.android.settings"},)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.txt", "# nothing\n", "has no instructions"),
        ("a.yaml", "{", "is not valid YAML"),
        ("a.yaml", "x: 1", "must be a list"),
        ("a.yaml", "- instruction: 3", "task 1: a task has an instruction"),
        ("a.yaml", "[" * 1_000, "is not valid YAML"),
        (
            "a.yaml",
            f"- [&a0 [1], {', '.join(f'&a{n} [*a{n - 1}, *a{n - 1}]' for n in range(1, 40))}]",
            "task 1: a task has",
        ),
        ("a.yaml", "- {instruction: go, checks: [now]}", "task 1: checks must be a list"),
        ("a.yaml", "- {instruction: go, sure: yes}", "task 1: a task has an instruction"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as refusal:
        read_task_file(path)
    assert str(path) in str(refusal.value)


def test_only_keeps_families_and_names() -> None:
    kept = load_tasks("general", ["open_app", "toggle/wifi_on"])
    names = {task.name for half in kept.values() for task in half}
    assert "toggle/wifi_on" in names and {name.split("/")[0] for name in names} == {"open_app", "toggle"}
    with pytest.raises(ValueError, match=r"'opn_app'.*families: .*open_app"):
        load_tasks("general", ["opn_app"])
    with pytest.raises(ValueError, match="no 'nowhere.txt'"):
        load_tasks("nowhere.txt")


def test_the_errands_for_real_devices_can_be_read_and_share_nothing() -> None:
    halves = load_tasks(str(Path(__file__).parents[3] / "configs" / "tasks" / "errands.yaml"))
    train, test = ({task.instruction for task in half} for half in halves.values())
    assert train and test and not train & test
    assert all(task.device_checks for half in halves.values() for task in half)
