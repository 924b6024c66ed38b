"""The `coso` command: help that explains, dry runs that start nothing, and mistakes told in a line with exit code 1."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cluster.cli import main as cli
from cluster.cli.check import ENVIRONMENT_ID
from cluster.config.files import load_config
from cluster.config.run_config import RunConfig
from cluster.run.run_folder import RunFolder

ROOT = Path(__file__).parents[3]
COMMANDS = [
    "train", "plan", "warmstart", "demos", "resume", "eval", "report", "influence", "serve", "play", "check", "config",
]  # fmt: skip


@dataclass
class Ended:
    code: int
    out: str
    err: str


Coso = Callable[..., Ended]


@pytest.fixture()
def coso(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Coso]:
    """Runs `coso WORDS...` in this process (an interpreter of its own takes seconds each time) in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COSO_TRACEBACK", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    before = signal.getsignal(signal.SIGTERM)

    def call(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["coso", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    yield call
    signal.signal(signal.SIGTERM, before)


def told(ended: Ended, *parts: str) -> None:
    """It ended with one message for a person: exit code 1, and no traceback."""
    assert ended.code == 1 and ended.err.startswith("coso: ") and "Traceback" not in ended.err
    for part in parts:
        assert part in ended.err


@pytest.fixture(scope="module")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from learner.supervised.default_model import make_default_vlm
    from tests.tiny_models import SMALL as SIZES  # heads of a width that the engine has a kernel for

    folder = tmp_path_factory.mktemp("tiny_vlm")
    make_default_vlm(folder, ["what is it", "it is this"], [np.zeros((8, 8, 3), np.uint8)], SIZES, seed=0)
    return folder


# ---------------------------------------------------------------- check


def test_check_shows_what_an_environment_does_and_costs(coso: Coso) -> None:
    shown = coso("check", "coso/NumberLine-v0", "max_position=7")
    assert shown.code == 0, shown.err
    for word in ("determinism", "step_ms_median", "resident_mb", "label_heads 1"):
        assert word in shown.out
    missing = coso("check", "coso/NumberLin-v0")
    assert missing.code == 1 and "1 of 1 checks of coso/NumberLin-v0 do not work" in missing.err


def test_check_says_what_is_missing_in_a_model_folder(coso: Coso, tiny_vlm: Path) -> None:
    broken = Path(shutil.copytree(tiny_vlm, "broken"))
    (broken / "model.safetensors").unlink()
    ended = coso("check", "broken")
    assert ended.code == 1 and "coso: 1 of 1 checks of broken do not work" in ended.err
    assert "no weights" in " ".join(ended.out.split())


@pytest.mark.parametrize(
    "words",
    [
        ("train", "model.path=broken"),
        ("eval", "model.path=broken"),
        ("warmstart", "model.path=broken", "warm_start.make_model=false"),
        ("play", "coso/NumberLine-v0", "--model", "broken"),
    ],
    ids=lambda words: words[0],
)
def test_every_command_reads_the_model_folder_before_it_starts(
    coso: Coso, tiny_vlm: Path, words: tuple[str, ...]
) -> None:
    broken = Path(shutil.copytree(tiny_vlm, "broken"))
    (broken / "model.safetensors").write_bytes(b"cut off")
    told(coso(*words), "broken/model.safetensors is broken or cut off", "Copy it again")
    assert [path.name for path in Path().iterdir()] == ["broken"]


@pytest.mark.parametrize(
    ("target", "environment"),
    [
        ("coso/NumberLine-v0", True),
        ("my_games.lamp:Lamp-v0", True),
        ("my_games:coso/Lamp-v0", True),
        ("models/numberline", False),
        ("organisation/model-v2", False),
    ],
)
def test_what_check_takes_for_an_environment(target: str, environment: bool) -> None:
    assert (ENVIRONMENT_ID.fullmatch(target) is not None) == environment


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_explains_it_and_each_of_its_options(coso: Coso, command: str) -> None:
    shown = coso(command, "--help")
    assert shown.code == 0
    described = next(each for each in cli.app.registered_commands if command in (each.name, each.callback.__name__))
    summary = " ".join((described.callback.__doc__ or "").split())
    assert len(summary) > 20 and summary[:40] in " ".join(shown.out.split())
    import typer.main

    for parameter in typer.main.get_command_from_info(
        described, pretty_exceptions_short=True, rich_markup_mode=None
    ).params:
        assert getattr(parameter, "help", None), f"coso {command}: {parameter.name} is not explained"


def test_every_command_there_is_is_tested_and_shown(coso: Coso) -> None:
    assert sorted(each.name or each.callback.__name__ for each in cli.app.registered_commands) == sorted(COMMANDS)
    shown = coso("--help")
    assert shown.code == 0 and all(command in shown.out for command in COMMANDS)


def test_help_and_mistakes_answer_at_once_because_nothing_heavy_is_imported() -> None:
    program = (
        "import sys\nfrom cluster.cli.main import main\n"
        "sys.argv = ['coso', 'train', 'seed=1', '--dry-run']\nmain()\n"
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0 and done.stderr.strip() == "[]"


def test_version_is_that_of_the_installed_package(coso: Coso) -> None:
    shown = coso("--version")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out == f"coso-rl {importlib.metadata.version('coso-rl')}\n"


def test_without_the_training_packages_a_command_says_which_one_it_needs(tmp_path: Path) -> None:
    program = (
        "import sys\nsys.modules['pyarrow'] = None\nfrom cluster.cli.main import main\n"
        "sys.argv = ['coso', 'demos', 'coso/NumberLine-v0', '1', 'demos']\nmain()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "needs pyarrow" in done.stderr and "requirements/cpu.txt" in done.stderr


# ---------------------------------------------------------------- demos


def test_demos_says_what_it_wrote_and_refuses_to_overwrite(coso: Coso, tmp_path: Path) -> None:
    words = ("demos", "coso/Points24-v0", 12, "shown", "solvable_only=true", "--noise", "0.2")
    written = coso(*words)
    assert written.code == 0 and written.out.startswith("12 steps in shown")
    assert (tmp_path / "shown" / "demonstrations.yaml").exists()
    told(coso(*words), "shown exists")
    told(coso("demos", "coso/Points24-v0", 12, "other", "solvable"), "'solvable' is not of the form key=value")
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------- dry run and config


@pytest.mark.parametrize("command", ["train", "warmstart"])
def test_a_dry_run_prints_config_and_resources_and_leaves_no_trace(coso: Coso, command: str, tmp_path: Path) -> None:
    shown = coso(command, "seed=5", "rollout.workers=2", "rollout.envs_per_worker=3", "learner.ranks=2", "--dry-run")
    assert shown.code == 0 and not list(tmp_path.iterdir())
    (tmp_path / "shown.yaml").write_text(shown.out)  # the resources are comments, so it is a config file
    config = load_config([tmp_path / "shown.yaml"])
    assert (config.seed, config.rollout.workers, config.learner.ranks) == (5, 2, 2)
    for line in ("learner ranks         2 CPU", "6 environment processes", "this machine offers"):
        assert line in shown.out


def test_config_prints_every_key_and_can_be_read_back(coso: Coso, tmp_path: Path) -> None:
    assert yaml.safe_load(coso("config").out) == RunConfig().model_dump(mode="json")
    (tmp_path / "my.yaml").write_text("seed: 4\n")
    (tmp_path / "resolved.yaml").write_text(coso("config", "my.yaml", "training.updates=7").out)
    assert load_config([tmp_path / "resolved.yaml"]) == load_config([tmp_path / "my.yaml"], ["training.updates=7"])


def test_config_docs_are_the_page_that_ships(coso: Coso) -> None:
    assert coso("config", "--docs").out == (ROOT / "docs" / "config.md").read_text(encoding="utf-8")


def test_an_override_may_end_like_a_file(coso: Coso) -> None:
    assert yaml.safe_load(coso("config", "environment.kwargs.deck=cards.yaml").out)["environment"]["kwargs"] == {
        "deck": "cards.yaml"
    }


# ---------------------------------------------------------------- mistakes


def test_a_mistake_ends_a_real_command_with_one_line_and_exit_code_1() -> None:
    words = [sys.executable, "-m", "cluster.cli.main", "train", "training.updats=3"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "coso: unknown config key 'training.updats' (in override 'training.updats=3'); "
        "the nearest valid key is 'training.updates'\n"
    )


def test_a_traceback_is_there_for_those_who_ask_for_it(coso: Coso, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.errors import CosoError

    monkeypatch.setenv("COSO_TRACEBACK", "1")
    with pytest.raises(CosoError):
        coso("train", "sead=1")


def test_words_that_are_no_command_or_no_option_are_usage_errors(coso: Coso) -> None:
    assert coso("trian").code == 2
    assert coso("train").code == 2
    wrong = coso("train", "seed=1", "--dryrun")
    assert wrong.code == 2 and "--dry" in wrong.err


@pytest.mark.parametrize("command", ["train", "warmstart", "eval"])
def test_a_config_file_that_is_not_there_is_named(coso: Coso, command: str) -> None:
    told(coso(command, "none.yaml"), "none.yaml does not exist")


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_model_that_is_not_there_is_named_with_how_to_get_one(coso: Coso, command: str, tmp_path: Path) -> None:
    told(coso(command, "model.path=models/nowhere"), "'models/nowhere' does not exist", "coso warmstart")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "vision-language"),
        ({"model_type": "llama", "hidden_size": 8}, "cannot be loaded"),  # whose heads do not divide its width
        ({"model_type": "nonsuch"}, "nonsuch"),
        ({}, "model_type"),
    ],
)
def test_a_model_that_is_no_vision_language_model_is_named(
    coso: Coso, tmp_path: Path, config: dict[str, object], part: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    told(coso("train", f"model.path={folder}"), str(folder), part)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_reads_text_but_no_pictures_is_told_what_it_lacks(
    coso: Coso, tmp_path: Path, tiny_vlm: Path
) -> None:
    from transformers import AutoTokenizer, LlamaConfig

    folder = tmp_path / "text-only"
    AutoTokenizer.from_pretrained(tiny_vlm).save_pretrained(folder)
    LlamaConfig().save_pretrained(folder)
    told(coso("train", f"model.path={folder}"), str(folder), "vision-language model", "preprocessor_config.json")


def test_a_run_folder_that_exists_stops_the_run_with_what_to_do(coso: Coso, tiny_vlm: Path) -> None:
    RunFolder.create(load_config([], ["name=mine"])).unlock()
    Path("runs/mine/metrics.jsonl").write_text("kept")
    told(coso("train", "name=mine", f"model.path={tiny_vlm}"), "runs/mine exists", "coso resume", "--overwrite")
    assert Path("runs/mine/metrics.jsonl").read_text() == "kept"


def test_more_ranks_than_this_machine_has_room_for_is_said_before_anything_starts(coso: Coso, tiny_vlm: Path) -> None:
    asked = 100 * len(os.sched_getaffinity(0))
    words = (f"learner.ranks={asked}", f"learner.minibatch={asked}", f"model.path={tiny_vlm}")
    told(coso("train", *words), "CPUs are needed", f"learner ranks {asked}", "this machine has", "learner.ranks")
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_what_is_no_run_can_be_neither_resumed_nor_reported(coso: Coso) -> None:
    told(coso("resume", "runs/none"), "runs/none is not a run folder")
    told(coso("report", "runs/none"), "runs/none is not a run folder")


# ---------------------------------------------------------------- seeds


def test_several_seeds_are_runs_of_their_own_names(coso: Coso, monkeypatch: pytest.MonkeyPatch) -> None:
    import cluster.training

    trained: list[tuple[str, int, bool]] = []

    def train(config: RunConfig, overwrite: bool = False) -> dict[str, object]:
        # In place of training, which has tests of its own: what is tested is what would be trained.
        trained.append((config.name, config.seed, overwrite))
        return {"success_before": 0.25, "success_after": 0.75, "evaluation_note": "note", "report": "report.html"}

    monkeypatch.setattr(cluster.training, "train", train)
    shown = coso("train", "name=many", "--seed", "1,2,3", "--overwrite")
    assert trained == [("many-seed1", 1, True), ("many-seed2", 2, True), ("many-seed3", 3, True)]
    assert shown.code == 0 and shown.out.count("success before 0.250  after 0.750") == 3
    trained.clear()
    assert coso("train", "name=one", "seed=3", "--seed", "9").code == 0
    assert trained == [("one", 9, False)]


@pytest.mark.parametrize("seeds", ["x", "1,,2", "1,x", "1,2,1", "-1", "1.5", ""])
def test_a_list_of_seeds_that_is_none_is_told(coso: Coso, seeds: str) -> None:
    told(coso("train", "name=many", f"--seed={seeds}", "--dry-run"), "seed")


# ---------------------------------------------------------------- play


def test_play_lets_the_expert_play_and_saves_every_frame(coso: Coso, tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    shown = coso("play", "coso/NumberLine-v0", "max_position=7", "--expert", "--episodes", 2, "--frames", frames)
    assert shown.code == 0 and "2 of 2 finished episodes succeeded" in shown.out
    pictures = sorted(frames.glob("*.png"))
    assert len(pictures) >= 4
    assert {Image.open(path).size for path in pictures} == {(300, 300)}


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_play_takes_seeds_that_a_run_takes(coso: Coso, seed: int) -> None:
    done = coso("play", "coso/NumberLine-v0", "--expert", f"--seed={seed}")
    assert done.code == 2 and "--seed" in done.err and "or equal to" in done.err


def test_play_names_the_nearest_environment(coso: Coso) -> None:
    told(coso("play", "coso/NumberLin-v0", "--expert"), "coso/NumberLin-v0", "did you mean coso/NumberLine-v0?")


@pytest.mark.parametrize("command", ["play", "demos", "train", "train --dry-run", "eval", "warmstart"])
def test_an_environment_whose_module_fails_on_import_is_told_in_one_line_and_leaves_no_trace(
    coso: Coso, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lamp_module.py").write_text("import os\nimport not_installed_anywhere\n", encoding="utf-8")
    env_id = "lamp_module:coso-lamp/Lamp-v0"
    words = {"play": [env_id, "--expert"], "demos": [env_id, 5, "demos"]}.get(command, [f"environment.id={env_id}"])
    ended = coso(*command.split(), *words)
    told(ended, f"environment {env_id}", "module lamp_module cannot be imported", f"{tmp_path}/lamp_module.py:2")
    told(ended, "ModuleNotFoundError: No module named 'not_installed_anywhere'")
    assert len(ended.err.splitlines()) == 1 and ended.out == ""
    assert {path.name for path in tmp_path.iterdir()} <= {"lamp_module.py", "__pycache__"}


@pytest.mark.parametrize("argument", ["max_position", "max_position=[", "max_position=1", "maximum=3"])
def test_play_tells_which_argument_of_the_environment_is_wrong(coso: Coso, argument: str) -> None:
    told(coso("play", "coso/NumberLine-v0", argument, "--expert"), argument.partition("=")[0])


# ---------------------------------------------------------------- being ended


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_from_outside_it_says_so_with_exit_code_130(number: signal.Signals, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "cluster.cli.main", "play", "coso/NumberLine-v0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    try:
        assert process.stdout is not None
        while b"quits" not in process.stdout.readline():  # it is playing, and waits for a line
            pass
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and b"interrupted" in err and b"Traceback" not in err
