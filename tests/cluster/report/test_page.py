"""The report: whole in one file, right in its numbers, safe with any text, and there for unfinished runs too."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from actors.chat import ChatProcessor
from actors.images import PngEncoder
from actors.trajectory import TrajectoryBatch, TrajectoryLog
from cluster.config.files import to_yaml, validate
from cluster.config.run_config import RunConfig
from cluster.report.figures import curve_figures, reliability_figures, time_figure, time_totals, wilson_interval
from cluster.report.page import evaluation, latest_model, write_report
from cluster.report.samples import PICTURE_SIDE, choose_episode, influence_profiles, picture_uri, sample_episodes
from scoring.calibration import of_probabilities, of_values
from scoring.profiles import position_profile
from tests.tiny_models import TEXTS, make_idefics3, picture

HOSTILE = '<script>alert("x")</script>&{{ 7*7 }}\x00\x1b[31m'


class Page(HTMLParser):
    """What a browser would make of the page: tags in order, attributes, text; unbalanced tags are an error."""

    VOID = frozenset({"meta", "img"})  # tags that HTML does not close

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def step(episode: str, number: int, image: str, **changes: Any) -> dict[str, Any]:
    ids = changes.pop("response_ids", [5, 6, 7])
    return {
        "run": "r", "episode": episode, "environment": "coso/NumberLine-v0", "step": number, "prompt": "Reach it.",
        "image": image, "prompt_ids": [1], "response_ids": ids, "behaviour_logprobs": [-0.1] * len(ids),
        "policy_versions": [{"version": 0, "start": 0}], "utterance": "add one", "action": "+", "action_labels": [1],
        "valid": True, "reward": 0.0, "terminated": False, "truncated": False, "success": False, "end_reason": "",
        **changes,
    }  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """A run of four updates, evaluated before, half-way and after."""
    made: list[dict[str, Any]] = [{"update": 0, "evaluation/success": 0.5, "evaluation/episodes": 200.0}]
    for update in (1, 2, 3, 4):
        row = {
            "update": update, "environment_steps": 100 * update, "rollout/success": 0.5 + 0.1 * update,
            "learner/entropy": 0.1 / update, "learner/mismatch_max": 0.0, "time/collect": 1.0, "time/update": 3.0,
            "recoveries": 2.0, "some/unknown": 1.0, "rollout/return": None,
        }  # fmt: skip
        evaluated = {"evaluation/success": 0.45 + 0.1 * update, "evaluation/episodes": 200} if update % 2 == 0 else {}
        made.append(row | evaluated)
    return made


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run of entropy mode counterfactual, without a model."""
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    config = validate({"name": "mine", "model": {"path": str(tmp_path / "gone")}, "training": {"updates": 4}})
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    summary = {
        "success_before": 0.5, "success_after": 0.85, "eval_episodes": 200, "env_steps": 400, "updates": 4,
        "wall_seconds": 754.0, "recoveries": 2, "recoveries_by_kind": {"scorer": 1, "learner": 1}, "seed": 1,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_log(run_folder: Path, update: int, steps: list[dict[str, Any]], influence: bool = True) -> None:
    """The batch of one update, all steps with the same picture."""
    key, png = PngEncoder().encode(picture(update))
    batch = TrajectoryBatch.from_rows([{**each, "image": key} for each in steps], {key: png})
    if influence:
        rng = np.random.default_rng(0)
        lengths = [len(ids) for ids in batch.ragged("response_ids", np.int32)]
        batch = batch.with_influence([rng.random(length).astype(np.float32) for length in lengths])
    TrajectoryLog(run_folder / "trajectories").write(update, batch)


def test_headline_curves_facts_and_time_are_there(run_folder: Path) -> None:
    page = Page(write_report(run_folder).read_text(encoding="utf-8"))
    low, high = wilson_interval(170, 200)
    for text in ("success before", "0.500", "success after", "0.850", f"{low:.3f} – {high:.3f}, 200 episodes"):
        assert text in page.text
    for text in ("4 of 4", "12 min 34 s", "2 (scorer 1, learner 1)", "counterfactual", "coso/NumberLine-v0", "400"):
        assert text in page.text
    assert "collect 4.0 s" in page.text and "update 12.0 s" in page.text
    assert page.tags.count("svg") == len(curve_figures(rows())) + 1


def test_calibration_shows_first_and_last_update_of_what_was_measured(run_folder: Path) -> None:
    measured = rows()
    measured[1] |= of_probabilities([0.9] * 4, [True, False, False, False]).metrics("policy/")
    for row, off in zip(measured[2:], (9.0, 5.0, 2.5), strict=True):
        row |= of_values(np.arange(20.0), np.arange(20.0) - off).metrics("learner/")
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in measured))
    text = Page(write_report(run_folder).read_text(encoding="utf-8")).text
    assert "update 1: error 0.65" in text and "update 2: error 9" in text and "update 4: error 2.5" in text
    assert "update 3: error" not in text and "Causal model: is it" not in text
    assert len(reliability_figures(measured)) == 2 and reliability_figures(rows()) == []


def test_the_file_needs_nothing_else(run_folder: Path) -> None:
    write_log(run_folder, 1, [step("a", 0, "", reward=1.0, end_reason="terminated")])
    text = write_report(run_folder).read_text(encoding="utf-8")
    page = Page(text)
    assert "http" not in text.replace("http-equiv", "") and "//" not in re.sub(r"base64,[A-Za-z0-9+/=]*", "", text)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    sources = [value or "" for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert sources and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)


def test_ids_of_the_figures_do_not_clash(run_folder: Path) -> None:
    ids = re.findall(r' id="([^"]*)"', write_report(run_folder).read_text(encoding="utf-8"))
    assert ids and len(ids) == len(set(ids))


def test_unfinished_run_without_anything_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: early\n")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "has not finished" in page.text and "No evaluation yet." in page.text
    assert not (tmp_path / "trajectories").exists()


def test_run_cut_off_half_way_shows_how_far_it_came(run_folder: Path) -> None:
    (run_folder / "summary.json").unlink()
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    (run_folder / "metrics.jsonl").write_text("\n".join(lines[:4]) + '\n{"update": 4, "rollo')
    page = Page(write_report(run_folder).read_text(encoding="utf-8"))
    assert "success so far" in page.text and "0.650" in page.text and "3 of 4" in page.text


def test_hostile_text_stays_text(run_folder: Path) -> None:
    config = (run_folder / "config.yaml").read_text().replace("name: mine", f"name: {json.dumps(HOSTILE)}")
    (run_folder / "config.yaml").write_text(config)
    hostile = {"prompt": HOSTILE, "utterance": HOSTILE, "action": HOSTILE, "end_reason": HOSTILE, "reward": 1.0}
    write_log(run_folder, 1, [step("a", 0, "", **hostile)], influence=False)
    text = write_report(run_folder).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "<script" not in text
    assert page.text.count('<script>alert("x")</script>&{{ 7*7 }}') >= 4
    assert not [name for name, _ in page.attributes if name.startswith("on")]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatProcessor:
    return make_idefics3(tmp_path_factory.mktemp("model") / "tiny").chat


def test_every_token_is_shaded_by_its_influence(run_folder: Path, chat: ChatProcessor) -> None:
    ids = chat.tokenizer(TEXTS[1], add_special_tokens=False)["input_ids"] + chat.eos_token_ids[:1]
    config = validate({"name": "mine", "model": {"path": chat.path}})
    (run_folder / "config.yaml").write_text(to_yaml(config))
    write_log(run_folder, 1, [step("a", 0, "", response_ids=ids, reward=1.0, end_reason="terminated")])
    text = write_report(run_folder).read_text(encoding="utf-8")
    page = Page(text)
    influence = TrajectoryLog(run_folder / "trajectories").read(1).ragged("influence", np.float32)[0]
    titles = [value for name, value in page.attributes if name == "title" and str(value).startswith("influence")]
    assert titles == [f"influence {value:.3f}" for value in influence]
    assert TEXTS[1] in page.text
    assert "influence of a token on the executed action" in page.text


def test_profiles_are_of_the_first_and_the_last_update_that_measured_influence(run_folder: Path) -> None:
    folder = run_folder / "trajectories"
    assert influence_profiles(folder) == {}
    write_log(run_folder, 1, [step("a", 0, ""), step("a", 1, "", response_ids=[5, 6])])
    write_log(run_folder, 2, [step("b", 0, "")])
    write_log(run_folder, 3, [step("c", 0, "")], influence=False)
    profiles = influence_profiles(folder)
    expected, _ = position_profile(TrajectoryLog(folder).read(1).ragged("influence", np.float32))
    assert list(profiles) == [1]
    np.testing.assert_allclose(profiles[1], expected)
    assert "Influence by position in the answer" in Page(write_report(run_folder).read_text(encoding="utf-8")).text
    pq.write_table(pa.table({"other": [1]}), folder / "batch_000001.parquet")
    assert influence_profiles(folder) == {}


def test_samples_are_a_success_and_a_failure_of_first_and_last_update(run_folder: Path) -> None:
    for update in (1, 2, 3):
        good = [step("good", n, "", reward=float(n), end_reason="terminated" if n == 1 else "") for n in (0, 1)]
        bad = [step("bad", n, "", reward=-1.0, end_reason="truncated" if n == 11 else "") for n in range(12)]
        write_log(run_folder, update, [*good, *bad])
    page = Page(write_report(run_folder).read_text(encoding="utf-8"))
    headings = re.findall(r"(success|failure)update (\d+), (\d+) steps?, return (-?\d+), (\w+)", page.text)
    assert headings == [
        (outcome, update, *rest)
        for update in ("1", "3")
        for outcome, *rest in (("success", "2", "1", "terminated"), ("failure", "12", "-12", "truncated"))
    ]
    assert "… and 4 more." in page.text


def test_an_environment_that_died_is_no_example_of_failure() -> None:
    batch = TrajectoryBatch.from_rows([step("a", 0, "x", reward=-1.0, end_reason="environment_died")], {})
    assert choose_episode(batch, False) is None and choose_episode(batch, True) is None


def test_large_screenshots_are_made_smaller_and_small_ones_left() -> None:
    def size(uri: str) -> tuple[int, int]:
        return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))).size

    encoder = PngEncoder()
    _, small = encoder.encode(picture(1, 64, 80))
    _, large = encoder.encode(np.zeros((2400, 1080, 3), np.uint8))
    assert size(picture_uri(small)) == (80, 64)
    assert size(picture_uri(large)) == (216, PICTURE_SIDE)


def test_tokenizer_comes_from_the_latest_checkpoint_else_from_the_config(tmp_path: Path) -> None:
    config = RunConfig().model_dump(mode="json")
    assert latest_model(tmp_path, config) == "models/default"
    for update in (5, 10, 9):
        (tmp_path / f"checkpoints/step_{update}/learner/model").mkdir(parents=True)
    assert latest_model(tmp_path, config) == str(tmp_path / "checkpoints/step_10/learner/model")


def test_before_is_the_row_of_update_zero_and_after_the_last_one() -> None:
    before, after = evaluation(rows(), True), evaluation(rows(), False)
    assert before is not None and (before.share, before.episodes) == (0.5, 200)
    assert after is not None and after.share == pytest.approx(0.85)
    assert before.low < 0.5 < before.high
    assert evaluation(rows()[:2], False) is None


@settings(deadline=None)  # the machine may be busy
@given(st.integers(1, 5000), st.data())
def test_wilson_bounds_are_the_shares_at_distance_z(trials: int, data: st.DataObject) -> None:
    """Without the closed form: at a bound p, |successes/trials − p| = z √(p (1 − p) / trials); bisect for it."""
    successes = data.draw(st.integers(0, trials))
    z, share = 1.959964, successes / trials

    def outside(p: float) -> bool:
        return abs(share - p) > z * (p * (1 - p) / trials) ** 0.5

    def boundary(out: float, within: float) -> float:
        for _ in range(100):
            middle = (out + within) / 2
            out, within = (middle, within) if outside(middle) else (out, middle)
        return out

    low, high = wilson_interval(successes, trials)
    assert low == pytest.approx(boundary(0.0, share) if successes else 0.0, abs=1e-9)
    assert high == pytest.approx(boundary(1.0, share) if successes < trials else 1.0, abs=1e-9)


def test_wilson_interval_without_trials_knows_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_figures_of_nothing_are_none() -> None:
    assert curve_figures([]) == [] and time_figure([{"update": 1}]) is None and time_totals([]) == []


def test_figures_of_one_run_are_the_same_bytes_each_time() -> None:
    assert curve_figures(rows()) == curve_figures(rows())


def test_a_log_that_cannot_be_read_is_named_on_the_page(run_folder: Path) -> None:
    write_log(run_folder, 1, [step("a", 0, ""), step("a", 1, "", reward=1.0, end_reason="terminated")])
    write_log(run_folder, 2, [step("b", 0, "", end_reason="terminated")])
    folder = run_folder / "trajectories"
    table = pq.read_table(folder / "batch_000002.parquet")
    pq.write_table(table.replace_schema_metadata({"coso.schema_version": "99"}), folder / "batch_000002.parquet")
    text = Page(write_report(run_folder).read_text(encoding="utf-8")).text
    assert "No sample episodes are shown of a file" in text and "trajectory schema 99" in text
    assert "Sample episodes" in text  # of update 1
    images = pq.read_table(folder / "images_000001.parquet")
    broken = images.set_column(1, "png", pa.array([b"\x89PNG no picture"]))
    pq.write_table(broken, folder / "images_000001.parquet")
    samples, unread = sample_episodes(folder, None)
    assert samples and {each.picture for sample in samples for each in sample.steps} == {None} and len(unread) == 1
    (folder / "images_000001.parquet").write_bytes(b"PAR1")
    samples, (reason,) = sample_episodes(folder, None)
    assert samples == [] and "images_000001.parquet is damaged" in reason and influence_profiles(folder) == {}
