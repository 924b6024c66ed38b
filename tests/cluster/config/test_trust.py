"""What another user's run folder names is not imported, started or called before it is confirmed."""

import sys
from pathlib import Path

import pytest
import yaml

from cluster import training
from cluster.cli import main as cli
from cluster.config.files import load_config, validate
from cluster.config.trust import named_code
from cluster.errors import CosoError
from cluster.run.run_folder import RunFolder


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who has started nothing yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that leaves a file when it is imported."""
    traces = tmp_path / "imported"
    (tmp_path / "evil_module.py").write_text(f"open({str(traces)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "evil_module", raising=False)
    return traces


def run_of_somebody(folder: Path, **values: object) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


CODE = {
    "evil_module:Game-v0": {"environment": {"id": "evil_module:Game-v0"}},
    "evil_module:Own": {"algorithm": {"name": "evil_module:Own"}},
    "evil_module:Driver": {"environment": {"id": "coso/Android-v0", "kwargs": {"driver": "evil_module:Driver"}}},
}


@pytest.mark.parametrize(
    ("command", "name"),
    [("resume", name) for name in CODE] + [(other, "evil_module:Own") for other in ("influence", "report", "eval")],
)
def test_a_run_folder_of_somebody_else_imports_nothing(
    command: str, name: str, evil: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = run_of_somebody(tmp_path / "run", **CODE[name])
    monkeypatch.setattr(sys, "argv", ["coso", command, str(run / "config.yaml" if command == "eval" else run)])
    if command == "report":  # it reads the config as text
        cli.main()
    else:
        with pytest.raises(SystemExit):
            cli.main()
        said = capsys.readouterr().err
        assert f"--trust '{name}'" in said and len(said.splitlines()) == 1
    assert not evil.exists()


def test_what_is_confirmed_is_imported_and_remembered(evil: Path, tmp_path: Path) -> None:
    run = run_of_somebody(tmp_path / "run", **CODE["evil_module:Game-v0"])
    opened = RunFolder.open_existing(run)
    with pytest.raises(CosoError, match="--trust"):
        opened.config(["evil_module:Other-v0"])
    assert opened.config(["evil_module:Game-v0"]) == opened.config()
    # A module of the same name at another place is another one.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "evil_module.py").touch()
    sys.path.insert(0, str(tmp_path / "other"))
    try:
        with pytest.raises(CosoError, match="--trust"):
            opened.config()
    finally:
        sys.path.remove(str(tmp_path / "other"))
    assert not evil.exists()
    with pytest.raises(CosoError, match="no environment 'evil_module:Game-v0'"):
        training.resume(run)
    assert evil.exists()


def test_a_run_that_this_user_started_needs_no_word(tmp_path: Path) -> None:
    config = validate({"folder": str(tmp_path), "name": "run", "environment": {"id": "tests.envs_for_tests:X-v0"}})
    run = RunFolder.create(config)
    assert run.config() == config
    moved = RunFolder(run.path.rename(tmp_path / "moved"))
    assert moved.config() == config
    (tmp_path / "state" / "coso-rl" / "trusted.json").write_text("[")
    with pytest.raises(CosoError, match="tests.envs_for_tests:X-v0"):
        moved.config()


def test_a_file_that_a_user_wrote_and_names_is_the_users_wish(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("environment: {id: 'tests.envs_for_tests:X-v0'}\n")
    assert load_config([path]).environment.id == "tests.envs_for_tests:X-v0"


def test_programs_and_servers_are_named_too() -> None:
    kwargs = {
        "tasks": "general",
        "device": {"browser": "/tmp/program", "screen_size": [1, 2]},
        "evaluator_options": {"url": "http://example.org/v1", "api_key_variable": "AWS_SECRET_ACCESS_KEY"},
        "words": ["7:30", "http://x", "note: a:b", {"class": "os:system"}],
    }
    values = {"environment": {"id": "coso/Android-v0", "kwargs": kwargs}, "cluster": {"address": "10.0.0.1:6379"}}
    assert named_code(values) == [
        "browser=/tmp/program",
        "url=http://example.org/v1",
        "api_key_variable=AWS_SECRET_ACCESS_KEY",
        "os:system",
        "cluster.address=10.0.0.1:6379",
    ]
    assert named_code({"environment": None, "algorithm": [], "cluster": {"address": "auto"}}) == []
