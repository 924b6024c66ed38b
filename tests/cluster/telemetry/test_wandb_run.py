"""W&B is asked for its package and key before anything starts.

wandb is an optional package, so a module stands in for it: its settings, and an `init` that refuses.
"""

import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.config.files import validate
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.run.run_folder import RunFolder
from cluster.telemetry.wandb_run import require_wandb
from cluster.training import _run, train


class Refused(Exception):
    """wandb's own error."""


def refuse(**_: object) -> None:
    raise Refused("API key must have 40+ characters,\nhas 2.")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return validate({"folder": str(tmp_path / "runs"), "name": "run", "logging": {"wandb_project": "p"}})


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    settings = types.SimpleNamespace(mode="online", api_key=None, base_url="https://wandb.example.org")
    wandb = types.ModuleType("wandb")
    wandb.setup = lambda: types.SimpleNamespace(settings=settings)  # type: ignore[attr-defined]
    wandb.Error, wandb.init = Refused, refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return settings


def test_a_run_without_a_key_does_not_start(config: RunConfig, settings: types.SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(CosoError, match="wandb login") as refusal:
        train(config)
    assert "\n" not in str(refusal.value) and not Path(config.folder).exists()


@pytest.mark.parametrize("missing", ["key", "package"])
def test_a_dry_run_says_what_is_missing(
    config: RunConfig, settings: types.SimpleNamespace, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "package":
        monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    done = CliRunner().invoke(app, ["train", "--dry-run", "logging.wandb_project=p"])
    assert isinstance(done.exception, CosoError) and "wandb" in str(done.exception)


def test_a_key_or_a_mode_without_one_is_enough(
    config: RunConfig, settings: types.SimpleNamespace, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password 0123456789\n")
    (tmp_path / "netrc").chmod(0o600)
    require_wandb(config)
    (tmp_path / "netrc").unlink()
    settings.mode = "offline"
    require_wandb(config)
    settings.mode, settings.api_key = "online", "0123456789"
    require_wandb(config)


def test_a_key_that_is_refused_leaves_no_folder(config: RunConfig, settings: types.SimpleNamespace) -> None:
    with pytest.raises(CosoError, match=r"did not start: API key must have 40\+ characters, has 2\."):
        _run(config, RunFolder.create(config), None)
    assert not (Path(config.folder) / "run").exists()
