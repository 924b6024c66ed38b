"""Config files and overrides: every mistake is told with its key, its place and its mending, and nothing is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config.files import load_config, overlay, to_yaml, valid_keys, validate
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def complaint(files: list[Path], *overrides: str) -> str:
    with pytest.raises(CosoError) as error:
        load_config(files, overrides)
    return str(error.value)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 1_000, "is not valid YAML"),
        ("environment: {kwargs: &a {again: *a}}", "50 levels"),
        ("a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)), "100,000 values"),
        ('name: "half \\ud83d"', "half of a surrogate pair"),
    ],
    ids=["nested", "endless", "huge", "half a character"],
)
def test_values_without_end_are_refused_at_once(tmp_path: Path, text: str, words: str) -> None:
    file = written(tmp_path, text)
    assert words in (message := complaint([file])) and str(file) in message and len(message) < 2000


@pytest.mark.parametrize("override", ["a" + ".a" * 2_000 + "=1", "a=" + "{" * 1_000, "name=\udcff"])
def test_overrides_without_end_are_refused_at_once(override: str) -> None:
    assert len(complaint([], override)) < 2000


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("training.updats=3", "training.updats", "training.updates"),
        ("learnr.ranks=2", "learnr", "learner"),
        ("learner.lora.rnk=8", "learner.lora.rnk", "learner.lora.rank"),
        ("updates=5", "updates", "training.updates"),
        ("scoring.scm.hiden=5", "scoring.scm.hiden", "scoring.scm.hidden"),
    ],
)
def test_an_unknown_key_of_an_override_names_key_override_and_nearest_key(
    override: str, key: str, nearest: str
) -> None:
    message = complaint([], override)
    assert message == f"unknown config key {key!r} (in override {override!r}); the nearest valid key is {nearest!r}"


def test_an_unknown_key_of_a_file_names_the_file_it_is_in(tmp_path: Path) -> None:
    good = written(tmp_path, "training: {updates: 3}", "good.yaml")
    bad = written(tmp_path, "training: {updats: 3}", "bad.yaml")
    later = written(tmp_path, "training: {updates: 4}", "later.yaml")
    message = complaint([good, bad, later], "training.updates=5")
    assert f"'training.updats' (in {bad})" in message and "nearest valid key is 'training.updates'" in message


def test_a_key_like_no_other_points_to_the_list_of_keys() -> None:
    assert "`coso config` lists the valid keys" in complaint([], "zzzqqq=1")


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, "sead: 1\nmode: quick\n")
    message = complaint([path], "training.updates=-1")
    assert len(message.splitlines()) == 3
    for part in ("'sead'", "'mode'", "'training.updates'"):
        assert part in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.updates=soon", ("'training.updates'", "integer", "'soon'")),
        ("training.updates=0", ("greater than 0", "got 0")),
        ("seed=-1", ("'seed'", "greater than or equal to 0")),
        (f"seed={2**64}", ("'seed'", "less than 18446744073709551616")),
        ("training.updates=2.5", ("integer", "2.5")),
        ("training.updates=true", ("'training.updates'", "true or false")),
        ("learner.value_learning_rate=yes", ("'learner.value_learning_rate'", "true or false")),
        ("learner.learning_rate=.nan", ("'learner.learning_rate'", "nan")),
        ("entropy.mode=counterfctual", ("'entropy.mode'", "'counterfactual'")),
        ("learner=5", ("'learner'", "dictionary", "got 5")),
        ("learner.betas=[0.9]", ("'learner.betas.1'", "Field required")),
        ("learner.betas.x=1", ("'learner.betas'", "tuple")),
        ("name=1", ("'name'", "string", "quote")),
        ("name=../up", ("'name'", "../up")),
        ("warm_start.habit=-", ("'warm_start.habit'", "quote")),
        ("logging.console=3", ("'logging.console'", "boolean")),
        ("environment.restart_backoff_s=-1", ("'environment.restart_backoff_s'", "greater than or equal to 0")),
        ("environment.restart_backoff_max_s=-1", ("greater than or equal to 0",)),
        ("environment.quarantine_after=0", ("'environment.quarantine_after'", "greater than 0")),
        ("environment.quarantine_s=-0.1", ("'environment.quarantine_s'", "greater than or equal to 0")),
        ("learner.zero_stage=4", ("'learner.zero_stage'", "less than or equal to 3")),
    ],
)
def test_a_value_of_the_wrong_kind_names_key_override_and_value(override: str, parts: tuple[str, ...]) -> None:
    message = complaint([], override)
    assert f"(in override {override!r})" in message
    for part in parts:
        assert part in message


def test_the_algorithm_section_is_that_of_the_algorithm_it_names() -> None:
    assert type(load_config([]).algorithm).__name__ == "PpoSettings"
    own = load_config([], ["algorithm.name=examples.own_algorithm.reinforce:Reinforce", "algorithm.discount=0.5"])
    assert own.algorithm.discount == 0.5  # type: ignore[attr-defined]
    assert validate(own.model_dump()) == own
    assert "discount: 0.5" in to_yaml(own)


def test_another_algorithm_over_a_config_of_ppo_begins_with_its_own_defaults() -> None:
    """In any order of the words, which are one layer."""
    name = "algorithm.name=examples.own_algorithm.reinforce:Reinforce"
    for words in ([name, "algorithm.discount=0.5"], ["algorithm.discount=0.5", name]):
        algorithm = load_config([ROOT / "configs" / "numberline.yaml"], words).algorithm
        assert algorithm.model_dump() == {"name": name.removeprefix("algorithm.name="), "epochs": 4, "discount": 0.5}
    same = load_config([ROOT / "configs" / "numberline.yaml"], ["algorithm.name=ppo"]).algorithm
    assert same == load_config([ROOT / "configs" / "numberline.yaml"]).algorithm


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["algorithm.name=pp"], ("no algorithm 'pp'", "did you mean ppo?", "module:Class")),
        (["algorithm.name=3"], ("algorithm.name should be text",)),
        (["algorithm.name=nowhere.to.find:X"], ("module nowhere.to.find cannot be imported", "ModuleNotFoundError")),
        (["algorithm.name=json:JSONDecoder"], ("json has no class JSONDecoder that is an Algorithm",)),
        (["algorithm.clipp=0.2"], ("'algorithm.clipp'", "nearest valid key is 'algorithm.clip'")),
        (["algorithm.clip=-1"], ("'algorithm.clip'", "greater than 0")),
    ],
)
def test_a_wrong_algorithm_section_is_explained(overrides: list[str], parts: tuple[str, ...]) -> None:
    message = complaint([], *overrides)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["policy_server.tensor_parallel=2"], ("tensor_parallel > 1", "policy_server.device cuda")),
        (["weight_sync.transport=nccl"], ("nccl needs", "use gloo on CPUs")),
        (["weight_sync.transport=nccl", "policy_server.device=cuda"], ("nccl needs", "learner.device cuda")),
        (["weight_sync.transport=gloo", "policy_server.device=cuda"], ("gloo is for CPUs",)),
        (["learner.lora.rank=600"], ("learner.lora.rank is 600", "up to rank 512")),
        (["learner.lora.rank=8", "policy_server.device=cuda"], ("no float32 adapters on GPUs", "bfloat16", "merged")),
        (
            ["learner.lora.serving=merged", "model.dtype=bfloat16", "learner.zero_stage=3"],
            ("merged in bfloat16", "learner.zero_stage below 3"),
        ),
        (["learner.lora={rank: 8, alpha: 12}", "model.dtype=bfloat16"], ("learner.lora.rank is 1.5", "power of 2")),
    ],
)
def test_settings_that_cannot_work_on_the_devices_are_refused_before_anything_starts(
    overrides: list[str], parts: tuple[str, ...]
) -> None:
    message = complaint([], *overrides)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["learner.lora={rank: 8, alpha: 12}"],
        ["learner.lora={rank: 8, alpha: 4}", "model.dtype=bfloat16", "policy_server.device=cuda"],
        ["learner.lora={serving: merged, rank: 600}", "policy_server.device=cuda", "learner.zero_stage=3"],
        ["learner.lora={serving: merged, rank: 8, alpha: 12}", "model.dtype=bfloat16", "learner.zero_stage=2"],
    ],
)
def test_adapters_that_engines_can_serve(overrides: list[str]) -> None:
    config = load_config([], overrides)
    assert (config.learner.served_adapters is None) == (config.learner.lora.serving == "merged")


@pytest.mark.parametrize("word", ["training.updates", "=3", " =3", "--dry"])
def test_a_word_that_is_no_override_says_how_one_looks(word: str) -> None:
    assert "key.sub=value" in complaint([], word)


@pytest.mark.parametrize("value", ["[", "{a", "@", '"open', "1\t: 2: 3"])
def test_an_override_that_is_no_yaml_is_named(value: str) -> None:
    word = f"environment.kwargs={value}"
    assert repr(word) in complaint([], word)


def test_a_file_that_is_no_yaml_names_file_and_line(tmp_path: Path) -> None:
    path = written(tmp_path, "seed: 1\ntraining: [\n")
    message = complaint([path])
    assert str(path) in message and "not valid YAML" in message and "line" in message


@pytest.mark.parametrize(("text", "kind"), [("- 1\n", "list"), ("just text\n", "str"), ("3\n", "int")])
def test_a_file_that_is_no_mapping_says_what_it_is(tmp_path: Path, text: str, kind: str) -> None:
    assert f"not a {kind}" in complaint([written(tmp_path, text)])


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path: Path) -> None:
    assert "does not exist" in complaint([tmp_path / "none.yaml"])
    assert "cannot be read" in complaint([tmp_path])
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    assert str(binary) in complaint([binary])


# ---------------------------------------------------------------- files, overlays, overrides


def test_no_file_and_an_empty_file_mean_the_defaults(tmp_path: Path) -> None:
    assert load_config([]) == load_config([written(tmp_path, "# nothing yet\n")]) == RunConfig()


def test_later_files_and_then_overrides_win_and_sections_merge_key_by_key(tmp_path: Path) -> None:
    base = written(tmp_path, "seed: 3\nlearner: {ranks: 2, minibatch: 8}\nmodel: {value_hidden: [7, 8]}", "base.yaml")
    over = written(tmp_path, "learner: {minibatch: 16}\nmodel: {value_hidden: [9]}", "over.yaml")
    config = load_config([base, over], ["learner.micro_batch=4", "seed=5"])
    assert (config.seed, config.learner.ranks, config.learner.minibatch, config.learner.micro_batch) == (5, 2, 16, 4)
    assert config.model.value_hidden == (9,)  # a list is replaced, not merged
    assert load_config([over, base]).learner.minibatch == 8


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("learner.learning_rate=1e-5", 1e-5),
        ("learner.learning_rate=2E-3", 2e-3),
        ("learner.learning_rate=.5e1", 5.0),
        ("training.updates=1e3", 1000),
        ("environment.kwargs.scale=1e-5", 1e-5),
        ("environment.kwargs.version=1e-5x", "1e-5x"),
        ("environment.kwargs.day=2024-01-01", "2024-01-01"),
        ("environment.kwargs.deep.inside=[1, {a: null}]", [1, {"a": None}]),
        ("environment.kwargs.nothing=", ""),
        ("environment.kwargs.none=null", None),
        ("environment.kwargs.on=true", True),
        ("environment.kwargs.quoted='3'", "3"),
        ("environment.id=my.module:Name-v0", "my.module:Name-v0"),
        ("environment.id=a=b", "a=b"),
        ("model.value_hidden=[3, 4]", (3, 4)),
        ("model.value_hidden=[]", ()),
        ("learner.lora={rank: 4}", None),
        ("learner.lora.rank=8", 8),
        ("learner.lora=null", None),
        ("cluster.address=127.0.0.1:6379", "127.0.0.1:6379"),
        ('warm_start.habit="-"', "-"),
        ("warm_start.habit=+", "+"),
    ],
)
def test_an_override_means_what_it_says_and_survives_the_written_config(
    tmp_path: Path, override: str, value: Any
) -> None:
    config = load_config([], [override])
    key = override.partition("=")[0]
    found: Any = config
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    if override == "learner.lora={rank: 4}":
        found, value = (found.rank, found.alpha), (4, 256.0)
    assert found == value and type(found) is type(value)
    assert load_config([written(tmp_path, to_yaml(config))]) == config


def test_a_section_switched_off_in_a_file_can_be_switched_on_again(tmp_path: Path) -> None:
    off = written(tmp_path, "learner: {lora: null}")
    assert load_config([off]).learner.lora is None
    lora = load_config([off], ["learner.lora.rank=8"]).learner.lora
    assert lora is not None and lora.rank == 8


texts = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=12)
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | texts
scalars |= st.from_regex(
    r"[-+]?[0-9.]{1,4}([eE][-+]?[0-9]{1,3})?|\d{4}-\d\d-\d\d|0[xob][0-9]+|[0-9]+:[0-9]+", fullmatch=True
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))


@settings(max_examples=40, deadline=None)
@given(kwargs=st.dictionaries(texts, values, max_size=4), seed=st.integers(0, 2**40), rate=st.floats(1e-300, 1e300))
def test_any_config_written_as_yaml_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, kwargs: dict[str, Any], seed: int, rate: float
) -> None:
    config = validate({"environment": {"kwargs": kwargs}, "seed": seed, "learner": {"learning_rate": rate}})
    path = written(tmp_path_factory.getbasetemp(), to_yaml(config), "round_trip.yaml")
    read = load_config([path])
    assert read == config
    assert repr(read.environment.kwargs) == repr(config.environment.kwargs)  # 1 is not 1.0 nor True


trees = st.recursive(
    st.dictionaries(st.sampled_from("abc"), st.integers(), min_size=1, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner | st.integers(), min_size=1, max_size=3),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(base=trees, layer=trees)
def test_an_overlay_holds_every_leaf_of_the_layer_and_what_it_does_not_touch(
    base: dict[str, Any], layer: dict[str, Any]
) -> None:
    def leaves(tree: dict[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
        found: dict[tuple[str, ...], int] = {}
        for key, value in tree.items():
            found |= leaves(value, (*prefix, key)) if isinstance(value, dict) else {(*prefix, key): value}
        return found

    kept, over = leaves(base), leaves(layer)
    merged = leaves(overlay(base, layer))
    # A leaf of the base goes where the layer has a leaf at, above or below its place.
    hidden = {place for place in kept for new in over if place[: len(new)] == new or new[: len(place)] == place}
    assert merged == {place: value for place, value in kept.items() if place not in hidden} | over


def test_valid_keys_are_exactly_those_an_override_may_name() -> None:
    assert "learner.lora.rank" in valid_keys() and len(set(valid_keys())) == len(valid_keys())
    for key in valid_keys():
        try:
            load_config([], [f"{key}=null"])
        except CosoError as error:
            assert "unknown" not in str(error)


# ---------------------------------------------------------------- what ships, and what it needs


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_config_that_ships_loads_and_reads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config([path])
    assert load_config([written(tmp_path, to_yaml(config))]) == config
    # Written by hand, so every key in it is there for its effect.
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_configs_ship() -> None:
    assert SHIPPED


def test_the_config_can_be_read_where_neither_torch_nor_ray_is_installed() -> None:
    program = (
        "import sys, cluster.config.run_config, cluster.config.files, cluster.cli.main\n"
        "cluster.config.files.load_config([], ['seed=2'])\n"
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers', 'deepspeed', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
