"""One episode recorded: rows that say what happened, whichever way it ended, and seeds that can be had again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import envs  # noqa: F401  (registers coso/...)
from actors.generation import Generation
from actors.images import PngEncoder, decode_png, image_hash
from actors.rollouts.episode import EVALUATION_SEED_BASE, EpisodeRecorder, EpisodeSpec, training_seed
from actors.trajectory import REFUSAL_END_REASONS


def recorder(seed: int = 7, run_seed: int = 1, name: str = "e", **changes: Any) -> EpisodeRecorder:
    options: dict[str, Any] = {
        "run": "r",
        "run_seed": run_seed,
        "environment": "test",
        "worker": 2,
        "slot": 3,
        "max_new_tokens": 11,
    }
    return EpisodeRecorder(EpisodeSpec(name, seed, 0.5), **options | changes)


def answer(text: str = "u", versions: tuple[tuple[int, int], ...] = ((4, 0),)) -> Generation:
    ids = np.arange(3, dtype=np.int32)
    logprobs = np.array([-0.5, -1.0, -0.25], np.float32)
    return Generation(np.array([1, 2], np.int32), ids, logprobs, list(versions), "stop", text, 0.25)


def picture(number: int) -> np.ndarray:
    return np.full((4, 5, 3), number, np.uint8)


def hosted(observation: dict[str, Any]) -> dict[str, Any]:
    """An environment's observation as the host gives it."""
    return observation | {"image": PngEncoder().encode(observation["image"])}


def seen(number: int) -> dict[str, Any]:
    return hosted({"prompt": f"prompt {number}", "image": picture(number)})


def outcome(number: int, reward: float = 0.0, terminated: bool = False, truncated: bool = False) -> Any:
    info = {"action": "+", "action_labels": np.array([1], np.int32), "valid": True, "success": terminated}
    return seen(number), reward, terminated, truncated, info


def key(number: int) -> str:
    return image_hash(picture(number))


def two_steps(**last: Any) -> EpisodeRecorder:
    record = recorder()
    record.begin(seen(0))
    record.record(answer("first", ((4, 0), (5, 2))), outcome(1, -1.0), 0.5)
    record.record(answer("second"), outcome(2, 1.0, **last), 0.75)
    return record


def test_every_row_says_what_was_seen_said_and_got() -> None:
    record = two_steps(terminated=True)
    assert record.over and not record.failed and len(record) == 2
    first, second = record.batch().steps.to_pylist()
    expected = {
        "run": "r",
        "episode": "e",
        "environment": "test",
        "worker": 2,
        "slot": 3,
        "step": 0,
        "seed": 7,
        "prompt": "prompt 0",
        "image": key(0),
        "prompt_ids": [1, 2],
        "response_ids": [0, 1, 2],
        "behaviour_logprobs": [-0.5, -1.0, -0.25],
        "policy_versions": [{"version": 4, "start": 0}, {"version": 5, "start": 2}],
        "finish_reason": "stop",
        "utterance": "first",
        "action": "+",
        "action_labels": [1],
        "action_start": None,
        "valid": True,
        "reward": -1.0,
        "terminated": False,
        "truncated": False,
        "success": False,
        "end_reason": "",
        "final_prompt": None,
        "final_prompt_ids": None,
        "final_image": None,
        "generate_seconds": 0.25,
        "environment_seconds": 0.5,
        "influence": None,
    }
    assert first == expected
    assert second == expected | {
        "step": 1,
        "prompt": "prompt 1",
        "image": key(1),
        "policy_versions": [{"version": 4, "start": 0}],
        "utterance": "second",
        "reward": 1.0,
        "terminated": True,
        "success": True,
        "end_reason": "terminated",
        "environment_seconds": 0.75,
    }


def test_the_images_of_a_batch_are_those_its_rows_show() -> None:
    images = two_steps(terminated=True).batch().images
    assert set(images) == {key(0), key(1)}  # nobody looks past the end
    assert np.array_equal(np.asarray(decode_png(images[key(1)])), picture(1))


def test_a_truncated_episode_keeps_the_observation_that_its_value_is_asked_of() -> None:
    batch = two_steps(truncated=True).batch()
    first, last = batch.steps.to_pylist()
    assert (last["truncated"], last["terminated"], last["end_reason"]) == (True, False, "truncated")
    assert (last["final_prompt"], last["final_image"]) == ("prompt 2", key(2))
    assert first["final_prompt"] is None and first["final_image"] is None
    assert set(batch.images) == {key(0), key(1), key(2)}


def test_an_episode_that_ends_both_ways_terminated() -> None:
    last = two_steps(terminated=True, truncated=True).batch().steps.to_pylist()[-1]
    assert last["end_reason"] == "terminated" and last["final_image"] is None


@pytest.mark.parametrize("reason", ["environment_died", "environment_timeout", "environment_error"])
def test_a_failure_ends_the_episode_at_its_last_whole_step_and_changes_no_reward(reason: str) -> None:
    record = two_steps()
    assert not record.over
    record.request()  # an answer was under way when it happened
    record.fail(reason)
    assert record.over and record.failed and len(record) == 2
    first, last = record.batch().steps.to_pylist()
    assert [first["reward"], last["reward"]] == [-1.0, 1.0]
    assert (last["end_reason"], last["terminated"], last["truncated"]) == (reason, False, True)
    assert first["end_reason"] == "" and not first["truncated"]
    # What the policy saw next is known, so the value of what was cut off can be asked.
    assert last["final_prompt"] == "prompt 2" and last["final_image"] in record.batch().images


def test_a_failure_before_the_first_whole_step_leaves_no_rows() -> None:
    for begun in (False, True):
        record = recorder()
        if begun:
            record.begin(seen(0))
        record.fail("environment_timeout")
        assert record.over and record.failed and len(record) == 0
        batch = record.batch()
        assert len(batch) == 0 and not batch.images


@pytest.mark.parametrize("reason", sorted(REFUSAL_END_REASONS))
def test_a_refused_request_ends_the_episode_before_the_step_that_led_to_it(reason: Any) -> None:
    record = two_steps()
    record.refuse(reason)  # of what was seen after the second step: the learner could take no value of it either
    assert record.over and record.failed and len(record) == 1
    (row,) = record.batch().steps.to_pylist()
    assert (row["end_reason"], row["terminated"], row["truncated"]) == (reason, False, True)
    assert (row["final_prompt"], row["final_image"]) == ("prompt 1", key(1))
    assert set(record.batch().images) == {key(0), key(1)}


def test_a_refusal_at_the_first_step_leaves_no_rows() -> None:
    record = recorder()
    record.begin(seen(0))
    record.refuse("prompt_too_long")
    assert record.over and record.failed and len(record) == 0 and not record.batch().images


def test_a_request_asks_for_what_is_seen_now() -> None:
    record = recorder()
    record.begin(seen(0))
    first = record.request()
    assert (first.prompt, first.image, first.temperature, first.max_new_tokens) == ("prompt 0", key(0), 0.5, 11)
    assert np.array_equal(np.asarray(decode_png(first.png)), picture(0))
    assert record.request() == first
    assert record.request(seeded=False).seed is None
    record.record(answer(), outcome(1), 0.0)
    assert (record.request().prompt, record.request().image) == ("prompt 1", key(1))


def request_seeds(steps: int, **options: Any) -> list[int]:
    record = recorder(**options)
    record.begin(seen(0))
    seeds = []
    for number in range(steps):
        seeds.append(record.request().seed)
        record.record(answer(), outcome(number + 1), 0.0)
    return seeds


def test_the_seed_of_an_answer_depends_on_run_episode_and_step_alone() -> None:
    seeds = request_seeds(5)
    assert len(set(seeds)) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    # Neither on who plays the episode, nor where, nor what it is called.
    assert request_seeds(5, worker=0, slot=9, name="other", run="other") == seeds
    assert not set(request_seeds(5, seed=8)) & set(seeds)
    assert not set(request_seeds(5, run_seed=2)) & set(seeds)


def test_seeds_are_the_same_in_another_process() -> None:
    program = "from actors.rollouts.episode import training_seed; print(training_seed(1, 2, 3, 4))"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=root)
    assert done.stdout.strip() == str(training_seed(1, 2, 3, 4)), done.stderr


@given(run_seed=st.integers(0, 2**64), position=st.lists(st.integers(0, 2**40), max_size=5))
def test_training_never_sees_a_held_out_seed(run_seed: int, position: list[int]) -> None:
    seed = training_seed(run_seed, *position)
    assert 0 <= seed < EVALUATION_SEED_BASE
    assert training_seed(run_seed, *position) == seed


def test_training_seeds_differ_by_run_update_worker_and_episode() -> None:
    seeds = {
        training_seed(run, update, worker, n)
        for run in (1, 2)
        for update in range(20)
        for worker in (0, 1)
        for n in range(20)
    }
    assert len(seeds) == 2 * 20 * 2 * 20


def test_rows_of_a_real_environment_fit_the_schema() -> None:
    env = gymnasium.make("coso/NumberLine-v0")
    record = recorder()
    record.begin(hosted(env.reset(seed=7)[0]))
    rng = np.random.default_rng(0)
    while not record.over:
        utterance = env.unwrapped.expert_utterance(rng, noise=0.9, habit="-")
        observation, *rest = env.step(utterance)
        record.record(answer(utterance), (hosted(observation), *rest), 0.0)
    batch = record.batch()
    assert set(batch.column("image")) <= set(batch.images)
    assert batch.column("end_reason")[-1] in ("terminated", "truncated")
