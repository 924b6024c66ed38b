"""Each rank gets the images of its own steps, and all ranks together make the gradient that one makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actors.settings import ModelSettings
from actors.trajectory import TrajectoryBatch
from learner.algorithms.base import Evaluation
from learner.algorithms.entropy import EntropyBonus
from learner.algorithms.ppo import Ppo, PpoSettings
from learner.division import divide
from learner.plan import UpdatePlan, final_rows, images_of_rank, plan_update, step_lengths
from learner.policy.batch import BatchBuilder, target_columns
from learner.policy.model import build_policy
from learner.settings import EntropySettings, LearnerSettings
from learner.setup import LearnerSetup
from tests.learner.sample_trajectories import sample_trajectories
from tests.tiny_models import make_idefics3

MICRO_BATCH = 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    return make_idefics3(tmp_path_factory.mktemp("idefics3"))


@pytest.fixture(scope="module")
def trajectories(tiny) -> TrajectoryBatch:
    return sample_trajectories(tiny.chat, 23)


def planned(trajectories: TrajectoryBatch, ranks: int) -> UpdatePlan:
    setup = LearnerSetup(
        model=ModelSettings(path="unused"),
        learner=LearnerSettings(minibatch=8),
        algorithm=PpoSettings(epochs=2),
        entropy=EntropySettings(),
        temperature=1.0,
        total_updates=1,
        max_policy_lag=None,
        seed=1,
    )
    return plan_update(trajectories, setup, 0, ranks)


def cut(trajectories: TrajectoryBatch, plan: UpdatePlan, rank: int) -> TrajectoryBatch:
    return TrajectoryBatch(trajectories.steps, images_of_rank(trajectories, plan, rank))


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_gradient_of_every_minibatch_is_that_of_one_rank(tiny, trajectories, ranks):
    policy = build_policy(
        tiny.model, lora=None, value_hidden=(8,), gradient_checkpointing=False, value_gradient=True, seed=1
    ).eval()
    algorithm = Ppo(PpoSettings(), EntropyBonus(EntropySettings(coefficient=0.5)))
    count = len(trajectories)
    logprobs = trajectories.ragged("behaviour_logprobs", np.float32)
    zeros = np.zeros(count, np.float32)
    targets = algorithm.targets(trajectories, Evaluation(logprobs, zeros, zeros, trained=np.ones(count, bool)))
    lengths = step_lengths(trajectories)
    parameters = [*policy.parameters(), *policy.value_head.parameters()]

    def gradient(plan: UpdatePlan, rows: np.ndarray, world_size: int) -> list[torch.Tensor]:
        for parameter in parameters:
            parameter.grad = None
        for rank in range(world_size):
            own, builder = cut(trajectories, plan, rank), BatchBuilder(tiny.chat)
            for part in divide(rows, lengths, MICRO_BATCH, plan.owners, rank):
                batch = builder.build(own, part.indices)
                if part.filler:
                    batch.sample_weight.zero_()
                batch.targets = target_columns(targets, part.indices, "cpu")
                output = policy(batch, temperature=1.0, banned_token_ids=tiny.chat.banned_token_ids, token_chunk=64)
                parts, _ = algorithm.loss(output, batch)
                (sum(parts.values()) * batch.sample_weight / len(rows)).sum().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]

    one, several = planned(trajectories, 1), planned(trajectories, ranks)
    for rows, same in zip(one.minibatches, several.minibatches, strict=True):
        np.testing.assert_array_equal(rows, same)
        for ours, theirs in zip(gradient(several, rows, ranks), gradient(one, rows, 1), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("ranks", [1, 2, 3, 40])
def test_a_rank_gets_the_images_of_its_steps_and_of_what_it_runs_to_stay_in_step(tiny, trajectories, ranks):
    plan, lengths, final = planned(trajectories, ranks), step_lengths(trajectories), final_rows(trajectories)
    shown = trajectories.column("image")
    for rank in range(ranks):
        own, builder = cut(trajectories, plan, rank), BatchBuilder(tiny.chat)
        for rows in (np.arange(len(trajectories)), *plan.minibatches):
            for part in divide(rows, lengths, MICRO_BATCH, plan.owners, rank):
                builder.build(own, part.indices)
        for part in divide(final, lengths, MICRO_BATCH, plan.owners, rank):
            builder.build_final(own, part.indices)
        assert set(shown[plan.owners == rank]) <= own.images.keys()
    assert ranks > 1 or len(own.images) == len(trajectories.images)


def test_steps_with_pictures_of_their_own_are_sent_to_one_rank_each(tiny):
    rows = sample_trajectories(tiny.chat, 40).steps.to_pylist()
    for number, row in enumerate(rows):
        row |= {"image": f"picture {number}", "final_image": None, "final_prompt": None, "final_prompt_ids": None}
    images = {row["image"]: b"" for row in rows}
    trajectories = TrajectoryBatch.from_rows(rows, images)
    plan = planned(trajectories, 2)
    sent = [images_of_rank(trajectories, plan, rank) for rank in range(2)]
    assert sent[0].keys() | sent[1].keys() == images.keys() and not sent[0].keys() & sent[1].keys()
    assert {len(of_rank) for of_rank in sent} <= {19, 20, 21}
