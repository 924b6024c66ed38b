"""`coso influence` shows a run's answers before and after; what is missing is said, and no answer acts on the page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from actors.chat import ChatProcessor
from actors.images import PngEncoder
from actors.trajectory import TrajectoryBatch as Batch
from actors.trajectory import TrajectoryLog
from cluster.cli.main import app
from cluster.config.files import to_yaml, validate
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from envs.action_parser import action_parser
from scoring.scm.shape import ScmSizes
from scoring.scm.training import ScmTrainer
from scoring.settings import ScmSettings
from tests.cluster.report.test_page import Page, step
from tests.tiny_models import make_idefics3, picture

SAID = {
    1: '{"thoughts": "I should <b>add</b>", "action": "+"}',
    2: '{"thoughts": "I should subtract", "action": "-"}',
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_idefics3(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Path:
    """Two logged updates that answer one screen, the first with `+`, the second with `-`; the last token decides."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = validate({**RunConfig().model_dump(), "name": "shown", "model": {"path": str(model)}})
    (folder / "config.yaml").write_text(to_yaml(config))
    log = TrajectoryLog(folder / "trajectories")
    tokenizer = ChatProcessor(str(model)).tokenizer
    parse = action_parser("coso/NumberLine-v0", {}).parse
    key, png = PngEncoder().encode(np.asarray(picture()))
    for update, text in SAID.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        parsed = parse(text)
        made = step(
            f"{update}", 0, key, response_ids=ids, utterance=text, action=parsed.action,
            action_labels=parsed.labels.tolist(), influence=[0.0] * (len(ids) - 1) + [1.0],
        )  # fmt: skip
        log.write(update, Batch.from_rows([made], {key: png}))
    return folder


def coso(*words: str):
    return CliRunner().invoke(app, ["influence", *words], catch_exceptions=True)


def test_terminal_page_and_picture_show_the_same_screen_before_and_after(run: Path, tmp_path: Path):
    shown = coso(str(run))
    assert shown.exit_code == 0, shown.output
    first, second = shown.output.index("update 1: action +"), shown.output.index("update 2: action -")
    assert first < second and SAID[1] in shown.output and SAID[2] in shown.output
    page = Page((run / "influence.html").read_text())
    assert "b" not in page.tags and SAID[1] in page.text.replace("\n", "")
    assert not [value for name, value in page.attributes if name in ("src", "href")]  # needs nothing else
    assert sum(value == "influence 1.000" for name, value in page.attributes) == 2
    with Image.open(run / "influence.png") as image:
        assert image.size[0] > 300

    elsewhere = tmp_path / "out"
    one = coso(str(run), "--update", "2", "--out", str(elsewhere))
    assert one.exit_code == 0 and "update 1:" not in one.output and (elsewhere / "influence.png").exists()


def test_the_parser_scores_anew_without_any_scm(run: Path):
    shown = coso(str(run), "--estimator", "parser")
    assert shown.exit_code == 0, shown.output
    values = [float(value.split()[1]) for name, value in Page((run / "influence.html").read_text()).attributes
              if name == "title"]  # fmt: skip
    assert set(values) == {0.0, 1.0}


def test_the_checkpoints_scm_scores_anew(run: Path, model: Path):
    size = len(ChatProcessor(str(model)).tokenizer)
    trainer = ScmTrainer(ScmSettings(hidden=8, layers=1, heads=1), ScmSizes(vocab_size=size, head_sizes=(2,)))
    tensors, facts = trainer.state_dict()
    folder = run / "checkpoints" / "step_2"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "scm.safetensors")
    (folder / "scm.json").write_text(json.dumps(facts))
    (folder / "progress.json").write_text("{}")
    for estimator in ("scm", "gradient", "scm+parser"):
        shown = coso(str(run), "--estimator", estimator)
        assert shown.exit_code == 0 and f"by {estimator}" in shown.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--estimator", "oracle"], "choose one of scm, parser"),
        (["--update", "7"], "no trajectories of update 7; it has 1 to 2"),
        (["--estimator", "scm"], "no checkpoint with an SCM"),
    ],
)
def test_what_cannot_be_shown_is_said(run: Path, words: list[str], message: str):
    shown = coso(str(run), *words)
    assert isinstance(shown.exception, CosoError) and message in str(shown.exception)


def test_a_run_that_measured_no_influence_or_has_no_trajectories_says_so(run: Path):
    log = TrajectoryLog(run / "trajectories")
    batch = log.read(2)
    column = batch.steps.schema.get_field_index("influence")
    import pyarrow as pa

    field = batch.steps.schema.field("influence")
    log.write(2, Batch(batch.steps.set_column(column, field, pa.nulls(len(batch), field.type)), batch.images))
    shown = coso(str(run))
    assert "has no influence" in str(shown.exception) and "--estimator parser" in str(shown.exception)
    for path in (run / "trajectories").iterdir():
        path.unlink()
    assert "has no trajectories yet" in str(coso(str(run)).exception)
