"""What rollout workers make of nonsense from environments and of refused requests: data, up to a limit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.chat import ChatProcessor
from actors.generation import GenerationRequest, Refusal
from actors.images import image_hash
from actors.rollouts.episode import EVALUATION_SEED_BASE
from actors.rollouts.failed_episodes import TooManyFailedEpisodes
from actors.rollouts.stream import TrajectoryStream
from actors.rollouts.worker import RolloutWorker
from actors.serving.prompt_renderer import PromptRenderer
from actors.trajectory import TrajectoryBatch
from learner.policy.batch import BatchBuilder
from tests.actors.rollouts.test_worker import Server, by_chance, check_whole, ends, received, run, until
from tests.envs_for_tests import MISSING, ODD, WIDE
from tests.tiny_models import make_qwen2_5_vl

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward": float("nan")}, "reward = nan .*expected a finite real number"),
        ({"reward": None}, "reward = None"),
        ({"image": np.zeros((4, 4, 3), np.float32) + np.float32(0.5)}, "image.*float32.*expected uint8"),
        ({"success": MISSING}, "info without 'success'"),
        ({"action": 3}, "action.*expected text"),
    ],
)
def test_nonsense_from_an_environment_ends_its_episode_with_a_reason_and_no_reward(
    changes: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(worker: RolloutWorker) -> Any:
        return await worker.collect(1, 4), await worker.status()

    kwargs = {"changes": changes, "after": 3, "max_position": 5}
    batch, status = run(scenario, [Server(by_chance)], id=ODD, kwargs=kwargs)
    check_whole(batch)
    assert len(batch) >= 4 and np.isfinite(batch.column("reward")).all()
    assert "environment_error" in ends(batch) and status["failures"]["error"] >= ends(batch).count("environment_error")
    assert re.search(f"coso-test/Odd-v0.*{words}", caplog.text)


def test_what_says_the_same_in_another_form_changes_nothing() -> None:
    async def scenario(worker: RolloutWorker) -> Any:
        return await worker.collect(1, 6)

    forms = {"reward": np.array([-1.0]), "truncated": np.array([1]), "image": np.zeros((8, 8, 1), np.int64)}
    batch = run(scenario, [Server(by_chance)], id=ODD, kwargs={"changes": forms})
    check_whole(batch)
    assert "environment_error" not in ends(batch) and set(batch.column("reward")) == {-1.0}
    assert image_hash(np.zeros((8, 8, 3), np.uint8)) in set(batch.column("image"))


# ---------------------------------------------------------------- refused requests

TOO_LONG = Refusal("prompt_too_long", "the prompt has 700 tokens")


def refused_at_times(request: GenerationRequest) -> str | Refusal:
    assert request.seed is not None
    return TOO_LONG if request.seed % 4 == 0 else by_chance(request)


def test_a_refused_request_ends_its_episode_and_no_other() -> None:
    async def scenario(worker: RolloutWorker) -> Any:
        return await worker.collect(1, 40), await worker.status()

    batch, status = run(scenario, [Server(refused_at_times)])
    check_whole(batch)
    assert len(batch) >= 40 and {"prompt_too_long", "terminated"} <= set(ends(batch))
    assert status["failures"]["prompt_too_long"] >= ends(batch).count("prompt_too_long")
    assert status["restarts"] == 0  # the environment did nothing wrong


def test_free_running_environments_go_on_after_a_refused_request() -> None:
    stream = TrajectoryStream(1 << 30, 1000)
    asked = 0

    def policy(request: GenerationRequest) -> str | Refusal:
        nonlocal asked
        asked += 1
        return TOO_LONG if asked % 5 == 0 else by_chance(request)

    async def scenario(worker: RolloutWorker) -> list[TrajectoryBatch]:
        await worker.start(0)
        batches = await received(stream, 20)
        await worker.status()
        return batches

    batch = TrajectoryBatch.concatenate(run(scenario, [Server(policy)], stream))
    check_whole(batch)
    assert {"prompt_too_long", "terminated"} <= set(ends(batch))


class Renders(Server):
    """A server that refuses as the real one does: with the renderer of prompts, around a model's own processor."""

    def __init__(self, chat: ChatProcessor) -> None:
        super().__init__(by_chance)
        self._renderer = PromptRenderer(chat, None, 256)  # type: ignore[arg-type]  # there is no engine to ask

    async def _refusal(self, request: GenerationRequest) -> Refusal | None:
        parts = await self._renderer.parts(request)
        return parts if isinstance(parts, Refusal) else None


@pytest.mark.parametrize("free", [False, True], ids=["lock_step", "free_running"])
def test_an_episode_cut_off_at_a_picture_that_the_processor_refuses_can_be_trained_on(
    tmp_path: Path, free: bool
) -> None:
    chat = make_qwen2_5_vl(tmp_path).chat
    stream = TrajectoryStream(1 << 30, 1000)

    async def scenario(worker: RolloutWorker) -> Any:
        if not free:
            return await worker.collect(1, 20), await worker.status()
        await worker.start(0)
        return TrajectoryBatch.concatenate(await received(stream, 20)), await worker.status()

    batch, status = run(scenario, [Renders(chat)], stream if free else None, id=WIDE)
    check_whole(batch)
    refused = ends(batch).count("image_refused")
    assert refused and {*ends(batch)} <= {"image_refused", "terminated"}
    assert status["failures"]["image_refused"] >= refused
    final = [row for row, image in enumerate(batch.column("final_image")) if image is not None]
    assert len(final) == refused
    BatchBuilder(chat).build_final(batch, final)


def test_the_figures_of_an_evaluation_need_no_value_of_what_it_was_cut_off_at(tmp_path: Path) -> None:
    async def scenario(worker: RolloutWorker) -> Any:
        return await worker.evaluate_batch(range(EVALUATION_SEED_BASE, EVALUATION_SEED_BASE + 3), 0.0)

    result = run(scenario, [Renders(make_qwen2_5_vl(tmp_path).chat)], id=WIDE)
    assert result.failed == 0 and "truncated" in ends(result.episodes)


def test_too_many_refused_requests_end_the_run_and_name_environment_and_episode() -> None:
    stream = TrajectoryStream(1 << 30, 1000)
    words = r"50 of the latest 50 episodes of coso/NumberLine-v0 failed \(prompt_too_long 50\).*episode .*700 tokens"

    async def scenario(worker: RolloutWorker) -> None:
        with pytest.raises(TooManyFailedEpisodes, match=words):
            await worker.collect(1, 4)

    async def free_running(worker: RolloutWorker) -> None:
        await worker.start(0)
        await until(lambda: any(task.done() for task in worker._slot_tasks), "a loop to end")
        with pytest.raises(TooManyFailedEpisodes, match=words):
            await worker.status()

    run(scenario, [Server(lambda _: TOO_LONG)])
    run(free_running, [Server(lambda _: TOO_LONG)], stream)
