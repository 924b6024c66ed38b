"""`coso influence RUN`: answers shaded by influence, before and after training, and the distribution of influence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from actors.chat import ChatProcessor, NotAVisionLanguageModel
from actors.trajectory import TrajectoryBatch, TrajectoryLog, UnreadableTrajectory
from cluster.config.run_config import RunConfig
from cluster.environments import require_environment
from cluster.errors import CosoError
from cluster.report.figures import profile_figure
from cluster.report.page import latest_model
from cluster.run.run_folder import RunFolder
from scoring.effects.estimators import WITHOUT_SCM
from scoring.pictures import shade_html, shade_picture
from scoring.profiles import influential_words, position_profile


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: its update, its action ("" if it did not parse), its tokens and their influence (n,)."""

    update: int
    action: str
    texts: list[str]
    values: np.ndarray

    @property
    def title(self) -> str:
        """The caption of the answer."""
        return f"update {self.update}: " + (f"action {self.action}" if self.action else "does not parse")


@dataclass(frozen=True, slots=True)
class InfluenceView:
    """answers: groups of answers to the same screen. profiles: update -> mean influence by position, (bins,).
    words: update -> (text, mean influence, occurrences). estimator: the estimator of the influence."""

    name: str
    estimator: str
    answers: list[list[Answer]]
    profiles: dict[int, np.ndarray]
    words: dict[int, list[tuple[str, float, int]]]


def influence_view(
    run: RunFolder, updates: Sequence[int], count: int, estimator: str | None, trusted: Sequence[str] = ()
) -> InfluenceView:
    """Choose and score the answers of a run that are shown.

    updates: the updates to compare; empty: the first and the last in the log. count: number of screens. A screen that
    occurs in all updates has one answer per update. estimator: score again with it, with the latest checkpoint's SCM;
    None: use the run's own scores. trusted: see `RunFolder.config`. Raises `CosoError` if the run has nothing to show.
    """
    config = run.config(trusted)
    chat = _chat(run, config)
    batches = _read(run, updates)
    chosen = _same_screens(batches, count)
    if estimator is None:
        for update, batch in batches.items():
            if batch.steps["influence"].null_count:
                raise CosoError(
                    f"update {update} of {run.path} has no influence (entropy.mode was {config.entropy.mode}): choose "
                    "an estimator to measure it now, for instance --estimator parser"
                )
        values = {update: batch.ragged("influence", np.float32) for update, batch in batches.items()}
    else:
        values = _score_again(run, config, chat, batches, estimator)
    answers = [
        [_answer(chat, update, batches[update], values[update], row) for update, row in group] for group in chosen
    ]
    return InfluenceView(
        name=config.name,
        estimator=estimator or config.scoring.estimator,
        answers=answers,
        profiles={update: position_profile(found)[0] for update, found in values.items()},
        words={update: influential_words(_token_values(chat, batches[update], values[update])) for update in batches},
    )


def page(view: InfluenceView) -> str:
    """The view as one self-contained HTML page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    groups = [
        [(answer.title, Markup(shade_html(answer.texts, answer.values))) for answer in group] for group in view.answers
    ]
    return environment.get_template("influence.html.jinja").render(
        name=view.name,
        estimator=view.estimator,
        groups=groups,
        profile=Markup(profile_figure(view.profiles)),
        words=view.words,
    )


def picture(view: InfluenceView) -> Image.Image:
    """All answers of the view as a picture, one below the other."""
    return shade_picture([(answer.title, answer.texts, answer.values) for group in view.answers for answer in group])


def _chat(run: RunFolder, config: RunConfig) -> ChatProcessor:
    path = latest_model(run.path, config.model_dump())
    try:
        return ChatProcessor(path or "")
    except NotAVisionLanguageModel as error:
        raise CosoError(f"the run's tokenizer is missing: {error}") from None


def _read(run: RunFolder, updates: Sequence[int]) -> dict[int, TrajectoryBatch]:
    try:
        return _read_log(run, updates)
    except UnreadableTrajectory as error:
        raise CosoError(str(error)) from None


def _read_log(run: RunFolder, updates: Sequence[int]) -> dict[int, TrajectoryBatch]:
    log = TrajectoryLog(run.trajectories)
    logged = log.updates()
    if not logged:
        raise CosoError(f"{run.path} has no trajectories yet: wait for its first update")
    wanted = sorted(set(updates)) or sorted({logged[0], logged[-1]})
    if missing := [update for update in wanted if update not in logged]:
        raise CosoError(f"{run.path} has no trajectories of update {missing[0]}; it has {logged[0]} to {logged[-1]}")
    return {update: log.read(update) for update in wanted}


def _same_screens(batches: dict[int, TrajectoryBatch], count: int) -> list[list[tuple[int, int]]]:
    """Groups of (update, row): first screens that occur in every update, then others."""
    first_row: dict[int, dict[str, int]] = {update: {} for update in batches}
    for update, batch in batches.items():
        for row, key in enumerate(batch.steps["image"].to_pylist()):
            first_row[update].setdefault(key, row)
    common = [key for key in next(iter(first_row.values())) if all(key in rows for rows in first_row.values())]

    def actions(key: str) -> int:
        return len({batches[update].steps["action"][rows[key]].as_py() for update, rows in first_row.items()})

    common.sort(key=actions, reverse=True)  # first where training changed the action
    groups = [[(update, rows[key]) for update, rows in first_row.items()] for key in common[:count]]
    if not groups:
        groups = [[(update, row)] for update, batch in batches.items() for row in range(min(count, len(batch)))]
    return groups


def _score_again(
    run: RunFolder, config: RunConfig, chat: ChatProcessor, batches: dict[int, TrajectoryBatch], estimator: str
) -> dict[int, list[np.ndarray]]:
    import scoring
    from envs.action_parser import NoParser, action_parser

    scm = parser = None
    if estimator not in WITHOUT_SCM:
        checkpoints = run.checkpoint_updates()
        if not checkpoints or not (run.checkpoint_path(checkpoints[-1]) / "scm.json").exists():
            raise CosoError(f"{run.path} has no checkpoint with an SCM, which --estimator {estimator} asks: use parser")
        try:
            scm = scoring.load_scm(run.checkpoint_path(checkpoints[-1]), config.scoring)
        except ValueError as error:  # another version of the code saved it
            raise CosoError(str(error)) from None
    if "parser" in estimator:
        require_environment(config.environment.id)
        try:
            parser = action_parser(config.environment.id, config.environment.kwargs)
        except NoParser as error:
            raise CosoError(str(error)) from None
    return {
        update: scoring.influence(
            batch.ragged("response_ids", np.int32),
            batch.ragged("action_labels", np.int32),
            config.scoring.model_copy(update={"estimator": estimator}),
            tokenizer=chat.tokenizer,
            scm=scm,
            parser=parser,
        )
        for update, batch in batches.items()
    }


def _answer(chat: ChatProcessor, update: int, batch: TrajectoryBatch, values: Sequence[np.ndarray], row: int) -> Answer:
    step: dict[str, Any] = batch.steps.slice(row, 1).to_pylist()[0]
    return Answer(update, step["action"] or "", chat.token_texts(step["response_ids"]), np.clip(values[row], 0.0, 1.0))


def _token_values(
    chat: ChatProcessor, batch: TrajectoryBatch, values: Sequence[np.ndarray]
) -> list[tuple[list[str], np.ndarray]]:
    """The text of each token and its influence."""
    ids = batch.ragged("response_ids", np.int32)
    known = np.unique(np.concatenate([np.empty(0, np.int32), *ids]))
    text = dict(zip(known.tolist(), chat.tokenizer.batch_decode([[int(each)] for each in known]), strict=True))
    return [([text[int(each)] for each in row], found) for row, found in zip(ids, values, strict=True)]
