"""PPO against plain loops over floats, one step and one token at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.trajectory import END_ENVIRONMENT_DIED, TrajectoryBatch
from learner.algorithms.base import Evaluation
from learner.algorithms.entropy import EntropyBonus
from learner.algorithms.ppo import Ppo, PpoSettings
from learner.algorithms.returns import ReturnScale
from learner.policy.batch import TokenBatch
from learner.policy.model import PolicyOutput
from learner.settings import EntropySettings

SETTINGS = PpoSettings(thought_weight=0.3, clip=0.2, value_coefficient=0.7, value_clip=0.25, importance_limit=1.3)
ENTROPY = EntropySettings(coefficient=0.05)


def ppo(settings: PpoSettings = SETTINGS, entropy: EntropySettings = ENTROPY) -> Ppo:
    return Ppo(settings, EntropyBonus(entropy))


def total(found, batch):
    """The loss of a micro-batch as the rank sums it up."""
    parts, _ = found
    return sum((part * batch.sample_weight).sum() for part in parts.values())


def _problem(lengths, seed, spread=0.3):
    """Random steps with padding full of numbers that must not count."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(*shape, generator=generator)

    rows, width = len(lengths), max(lengths) + 2
    lengths = torch.tensor(lengths)
    positions = torch.arange(width)
    mask = positions < lengths[:, None]
    behaviour = -random(rows, width)
    batch = TokenBatch(
        model_inputs={},
        prompt_lengths=torch.ones(rows, dtype=torch.int64),
        response_lengths=lengths,
        response_ids=torch.zeros(rows, width, dtype=torch.int64),
        response_mask=mask,
        action_mask=mask & (positions >= (random(rows, 1) * (lengths[:, None] + 1)).long()),
        behaviour_logprobs=behaviour,
        influence=random(rows, width),
        sample_weight=(random(rows) > 0.2).float(),
        targets={name: random(rows) * 4 - 2 for name in ("advantages", "returns", "old_values")}
        | {"proximal_logprobs": behaviour + (random(rows, width) - 0.5) * spread},
    )
    logprobs = (behaviour + (random(rows, width) - 0.5) * 2 * spread).requires_grad_()
    entropy = (random(rows, width) * 3).requires_grad_()
    values = (batch.targets["old_values"] + random(rows) - 0.5).requires_grad_()
    return batch, PolicyOutput(logprobs, entropy, values)


def _slow_surrogate(ratio, weight, advantage, settings):
    clipped = min(max(ratio, 1 - settings.clip), 1 + settings.clip) * advantage
    surrogate = clipped if ratio > settings.ratio_limit else min(ratio * advantage, clipped)
    if not settings.decoupled or settings.importance == "none":
        return surrogate, 1.0
    if weight > settings.importance_limit:
        weight = settings.importance_limit if settings.importance == "truncated" else 0.0
    return weight * surrogate, weight


def _slow(batch, output, settings, entropy_settings):
    """The loss of every step, and some of its metrics, in Python floats."""
    losses, metrics = [], []
    for b in range(len(batch)):
        n, advantage = int(batch.response_lengths[b]), float(batch.targets["advantages"][b])
        steps, bonus = [], 0.0
        for i in range(n):
            token_weight = 1.0 if batch.action_mask[b, i] else settings.thought_weight
            now = float(output.logprobs[b, i])
            then, proximal = float(batch.behaviour_logprobs[b, i]), float(batch.targets["proximal_logprobs"][b, i])
            change = now - (proximal if settings.decoupled else then)
            steps.append((token_weight, change, proximal - then))
            influence = {"none": 0.0, "uniform": 1.0, "counterfactual": float(batch.influence[b, i])}
            bonus += influence[entropy_settings.mode] * float(output.entropy[b, i]) / n
        if settings.ratio_level == "step":
            change, correction = (sum(step[0] * step[k] for step in steps) for k in (1, 2))
            steps = [(1.0, change, correction)]
        surrogate, ratios, weights = 0.0, [], []
        for token_weight, change, correction in steps:
            found, weight = _slow_surrogate(math.exp(change), math.exp(correction), advantage, settings)
            surrogate += token_weight * found
            ratios.append(math.exp(change))
            weights.append(weight)
        value, old, target = (
            float(x[b]) for x in (output.values, batch.targets["old_values"], batch.targets["returns"])
        )
        error = (value - target) ** 2
        if settings.value_clip is not None:
            near = old + min(max(value - old, -settings.value_clip), settings.value_clip)
            error = max(error, (near - target) ** 2)
        losses.append(-surrogate + settings.value_coefficient * 0.5 * error - entropy_settings.coefficient * bonus)
        metrics.append(
            {
                "policy_loss": -surrogate,
                "value_loss": 0.5 * error,
                "weighted_entropy": bonus,
                "entropy_bonus": entropy_settings.coefficient * bonus,
                "clip_fraction": sum(abs(ratio - 1) > settings.clip for ratio in ratios) / len(ratios),
                "importance_weight": sum(weights) / len(weights),
                "ratio_max": max(ratios),
            }
        )
    return losses, metrics


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    seed=st.integers(0, 999),
    mode=st.sampled_from(["none", "uniform", "counterfactual"]),
    spread=st.sampled_from([0.05, 0.5, 3.0]),
    choice=st.fixed_dictionaries(
        {
            "decoupled": st.booleans(),
            "importance": st.sampled_from(["none", "truncated", "masked"]),
            "ratio_level": st.sampled_from(["step", "token"]),
            "value_clip": st.sampled_from([None, 0.25]),
        }
    ),
)
def test_loss_and_metrics_equal_plain_loops(lengths, seed, mode, spread, choice):
    batch, output = _problem(lengths, seed, spread)
    chosen = SETTINGS.model_copy(update=choice)
    entropy = ENTROPY.model_copy(update={"mode": mode})
    with torch.no_grad():
        parts, metrics = ppo(chosen, entropy).loss(output, batch)
        expected_losses, expected_metrics = _slow(batch, output, chosen, entropy)
    assert sum(parts.values()).tolist() == pytest.approx(expected_losses, abs=1e-5, rel=1e-5)
    for name in expected_metrics[0]:
        expected = [row[name] for row in expected_metrics]
        assert metrics[name].tolist() == pytest.approx(expected, abs=1e-5, rel=1e-4), name


@pytest.mark.parametrize("level", ["step", "token"])
def test_on_policy_all_variants_have_one_gradient(level):
    """Where behaviour, proximal and current policy are one, every ratio is 1: the gradient is A · λ per token."""
    batch, output = _problem([3, 5], 2)
    batch.sample_weight[:] = 1
    batch.targets["proximal_logprobs"] = batch.behaviour_logprobs
    expected = ppo().token_factors(batch) * batch.targets["advantages"][:, None]
    for decoupled in (True, False):
        logprobs = batch.behaviour_logprobs.clone().requires_grad_()
        variant = ppo(SETTINGS.model_copy(update={"decoupled": decoupled, "ratio_level": level}))
        parts, metrics = variant.loss(PolicyOutput(logprobs, output.entropy, output.values), batch)
        gradient = torch.autograd.grad(-parts["policy"].sum(), logprobs)[0]
        torch.testing.assert_close(gradient, expected)
        assert not metrics["clip_fraction"].any() and not metrics["importance_beyond_limit"].any()


def test_an_old_policys_data_is_corrected_and_not_clipped_away():
    """Behaviour far from proximal, current = proximal: the plain clip leaves a third of the gradient out, the
    decoupled one keeps all of it, weighted by at most the limit."""
    batch, output = _problem([6] * 40, 5, spread=1.5)
    batch.sample_weight[:] = 1
    gradients = {}
    for decoupled in (True, False):
        logprobs = batch.targets["proximal_logprobs"].clone().requires_grad_()
        variant = ppo(SETTINGS.model_copy(update={"decoupled": decoupled}))
        parts, metrics = variant.loss(PolicyOutput(logprobs, output.entropy, output.values), batch)
        gradients[decoupled] = torch.autograd.grad(parts["policy"].sum(), logprobs)[0].abs().sum(-1)
        assert (metrics["clip_fraction"].mean() > 0.3) is not decoupled
    assert (gradients[True] > 0).all()
    assert (gradients[False] == 0).float().mean() > 0.15


def test_cutting_a_minibatch_does_not_change_its_gradient():
    batch, output = _problem([3, 5, 2, 6], 1)
    gradient = torch.autograd.grad(total(ppo().loss(output, batch), batch), output.logprobs)[0]
    for rows in ([0, 2], [1, 3]):
        columns = {name: value[rows] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        targets = {name: column[rows] for name, column in batch.targets.items()}
        part = TokenBatch(**columns, model_inputs={}, targets=targets)
        logprobs = output.logprobs.detach()[rows].requires_grad_()
        found = ppo().loss(PolicyOutput(logprobs, output.entropy[rows], output.values[rows]), part)
        torch.testing.assert_close(torch.autograd.grad(total(found, part), logprobs)[0], gradient[rows])


@pytest.mark.parametrize("level", ["step", "token"])
def test_a_step_far_off_policy_neither_dominates_nor_breaks_the_gradient(level):
    batch, output = _problem([4, 4], 0)
    batch.sample_weight[:] = 1
    batch.targets["advantages"][:] = -1.0
    logprobs = batch.targets["proximal_logprobs"].clone()
    logprobs[0, :4] += 500  # e^500 is infinite in float32
    logprobs.requires_grad_()
    found = ppo(SETTINGS.model_copy(update={"ratio_level": level})).loss(
        PolicyOutput(logprobs, output.entropy, output.values), batch
    )
    loss = total(found, batch)
    gradient = torch.autograd.grad(loss, logprobs)[0]
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    assert not gradient[0].any() and gradient[1].any()
    assert found[1]["ratio_max"].max() > 1e8


def test_an_utterance_without_an_action_part_is_all_thoughts():
    batch, _ = _problem([5], 3)
    batch.action_mask[:] = False
    torch.testing.assert_close(ppo().token_factors(batch), 0.3 * batch.response_mask.float())


def _episodes(*episodes):
    """Each a list of rewards and how it ended."""
    rows = [
        {
            "episode": f"e{number}",
            "step": step,
            "reward": reward,
            "terminated": ending == "terminated" and step == len(rewards) - 1,
            "truncated": ending == "truncated" and step == len(rewards) - 1,
            "end_reason": ending if step == len(rewards) - 1 else "",
        }
        for number, (rewards, ending) in enumerate(episodes)
        for step, reward in enumerate(rewards)
    ]
    return TrajectoryBatch.from_rows(rows, {})


PLAIN = PpoSettings(discount=0.5, gae_lambda=0.5, normalize_advantages=False, normalize_returns=False)


def _evaluation(values, final_values, trained=None):
    logprobs = [np.zeros(1, np.float32)] * len(values)
    return Evaluation(logprobs, values, final_values, np.ones(len(values), bool) if trained is None else trained)


def test_what_follows_the_last_step_depends_on_how_the_episode_ended():
    trajectories = _episodes(([0.0, 1.0], "terminated"), ([0.0, 1.0], "truncated"), ([0.0, 0.0], END_ENVIRONMENT_DIED))
    values = np.array([1.0, 2.0] * 3, np.float32)
    final_values = np.array([np.nan, np.nan, np.nan, 4.0, np.nan, np.nan], np.float32)
    targets = ppo(PLAIN).targets(trajectories, _evaluation(values, final_values))
    # δ of the first step: 0 + 0.5 · 2 − 1 = 0; of the last: 1 − 2, then 1 + 0.5 · 4 − 2, then unknown.
    np.testing.assert_allclose(targets.per_step["advantages"], [-0.25, -1.0, 0.25, 1.0, 0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(targets.per_step["returns"], [0.75, 1.0, 1.25, 3.0, 1.0, 2.0], atol=1e-6)


def test_a_failed_environment_is_not_a_reward_of_zero():
    values = np.array([0.5, 0.8], np.float32)
    nothing = np.full(2, np.nan)
    died = ppo(PLAIN).targets(_episodes(([0.0, 0.0], END_ENVIRONMENT_DIED)), _evaluation(values, nothing))
    lost = ppo(PLAIN).targets(_episodes(([0.0, 0.0], "terminated")), _evaluation(values, nothing))
    assert died.per_step["advantages"][1] == 0 and died.per_step["returns"][1] == pytest.approx(0.8)
    assert lost.per_step["advantages"][1] < 0 and lost.per_step["advantages"][0] < died.per_step["advantages"][0]


def test_normalised_advantages_leave_unknown_outcomes_at_zero_and_out_of_the_statistics():
    trajectories = _episodes(([1.0, -1.0, 3.0], "terminated"), ([5.0, 9.0], END_ENVIRONMENT_DIED))
    values = np.linspace(-1, 1, 5).astype(np.float32)
    nothing = np.full(5, np.nan)
    plain = ppo(PLAIN).targets(trajectories, _evaluation(values, nothing))
    normal = ppo(PLAIN.model_copy(update={"normalize_advantages": True})).targets(
        trajectories, _evaluation(values, nothing)
    )
    known = plain.per_step["advantages"][:4]
    np.testing.assert_allclose(normal.per_step["advantages"][:4], (known - known.mean()) / known.std(), atol=1e-5)
    assert normal.per_step["advantages"][4] == 0
    np.testing.assert_array_equal(normal.per_step["returns"], plain.per_step["returns"])


def test_explained_variance_is_one_for_a_perfect_critic():
    trajectories = _episodes(([0.0, 0.0, 1.0], "terminated"))
    perfect = np.array([0.25, 0.5, 1.0], np.float32)
    nothing = np.full(3, np.nan)
    assert ppo(PLAIN).targets(trajectories, _evaluation(perfect, nothing)).metrics[
        "explained_variance"
    ] == pytest.approx(1.0)
    assert (
        ppo(PLAIN).targets(trajectories, _evaluation(np.zeros(3, np.float32), nothing)).metrics["explained_variance"]
        < 0.5
    )


@given(
    rewards=st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=6), min_size=1, max_size=8),
    endings=st.lists(st.sampled_from(["terminated", "truncated", END_ENVIRONMENT_DIED]), min_size=8, max_size=8),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_calibration_compares_values_with_what_followed(rewards, endings, seed):
    """γ = 0.5: the return is the discounted sum of rewards, and beyond a cut the critic's value; λ plays no part."""
    trajectories = _episodes(*zip(rewards, endings, strict=False))
    count = len(trajectories)
    values, final = np.random.default_rng(seed).normal(size=(2, count))
    final[~trajectories.column("truncated")] = np.nan
    pairs, start = [], 0
    for of_episode, ending in zip(rewards, endings, strict=False):
        stop = start + len(of_episode)
        last = stop if ending in ("terminated", "truncated") else stop - 1
        for step in range(start, last):
            beyond = {"terminated": 0.0, "truncated": final[stop - 1]}.get(ending, values[stop - 1])
            following = sum(0.5 ** (k - step) * of_episode[k - start] for k in range(step, last))
            pairs.append((values[step], following + 0.5 ** (last - step) * beyond))
        start = stop
    metrics = ppo(PLAIN).targets(trajectories, _evaluation(values, final)).metrics
    if not pairs:
        assert "value_calibration_error" not in metrics
        return
    pairs = sorted(pairs)
    upper = [-(-len(pairs) * i // 10) for i in range(11)]
    bins = [pairs[low:high] for low, high in zip(upper[:-1], upper[1:], strict=True)]
    error = sum(abs(sum(v - r for v, r in each)) for each in bins) / len(pairs)
    assert metrics["value_calibration_error"] == pytest.approx(error, abs=1e-6)
    assert sum(value for name, value in metrics.items() if name.endswith("_count")) == len(pairs)
    if (deviation := np.std([r for _, r in pairs])) > 1e-3:
        assert metrics["value_calibration_deviations"] == pytest.approx(error / deviation, rel=1e-4, abs=1e-6)


def test_steps_that_are_not_trained_on_give_context_only():
    """Advantages look forward: those of the fresh steps are what they are without the old ones before them."""
    trajectories = _episodes(([0.0, 1.0, 2.0, 3.0], "terminated"), ([5.0, 1.0], "terminated"))
    values = np.arange(6, dtype=np.float32)
    nothing = np.full(6, np.nan)
    trained = np.array([False, False, True, True, True, True])
    masked = ppo(SETTINGS).targets(trajectories, _evaluation(values, nothing, trained))
    suffixes = _episodes(([2.0, 3.0], "terminated"), ([5.0, 1.0], "terminated"))
    alone = ppo(SETTINGS).targets(suffixes, _evaluation(values[2:], nothing[2:]))
    for name, column in alone.per_step.items():
        np.testing.assert_allclose(masked.per_step[name][2:], column, rtol=1e-6, err_msg=name)


def test_a_constant_return_of_fifty_is_learnt_at_once():
    """Values are in deviations from the running mean: before an update V is 0, after it 50."""
    trajectories = _episodes(*[([50.0], "terminated")] * 8)
    algorithm = ppo(PLAIN.model_copy(update={"normalize_returns": True}))
    says_nothing, nothing = np.zeros(8, np.float32), np.full(8, np.nan)
    first = algorithm.targets(trajectories, _evaluation(says_nothing, nothing))
    assert first.metrics["value_mean"] == 0.0 and np.abs(first.per_step["returns"]).max() < 1e-3
    second = algorithm.targets(trajectories, _evaluation(says_nothing, nothing))
    assert second.metrics["value_mean"] == pytest.approx(50.0) and abs(second.per_step["advantages"]).max() < 1e-3


@given(seed=st.integers(0, 99), updates=st.integers(1, 6), mean=st.floats(-50, 50), deviation=st.floats(0.1, 30.0))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_return_scale_is_the_weighted_mean_of_what_it_saw(seed, updates, mean, deviation):
    random = np.random.default_rng(seed)
    batches = [random.normal(mean, deviation, 50) for _ in range(updates)]
    scale = ReturnScale()
    for batch in batches:
        scale.update(batch)
    weights = np.array([0.9 ** (updates - 1 - k) for k in range(updates)])
    expected = sum(w * b.mean() for w, b in zip(weights, batches, strict=True)) / weights.sum()
    square = sum(w * (b**2).mean() for w, b in zip(weights, batches, strict=True)) / weights.sum()
    assert scale.mean == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert scale.deviation == pytest.approx(np.sqrt(square - expected**2), rel=1e-4)
    np.testing.assert_allclose(scale.restored(scale.normalised(batches[0])), batches[0], rtol=1e-6)
    again = ReturnScale()
    again.load(scale.state())
    assert (again.mean, again.deviation) == (scale.mean, scale.deviation)


@given(seed=st.integers(0, 99), reward=st.floats(-20, 20), spread=st.floats(0.1, 10))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_new_unit_leaves_what_the_values_say_as_it_is(seed, reward, spread):
    random = np.random.default_rng(seed)
    algorithm = ppo(PLAIN.model_copy(update={"normalize_returns": True}))
    said, nothing = random.normal(size=8).astype(np.float32), np.full(8, np.nan)
    episodes = [
        _episodes(*[([mean + spread * float(random.normal())], "terminated") for _ in range(8)])
        for mean in (0.0, reward)
    ]
    first = algorithm.targets(episodes[0], _evaluation(said, nothing))
    assert (first.value_gain, first.value_shift) == (1.0, 0.0)
    before = algorithm.scale.restored(said)
    second = algorithm.targets(episodes[1], _evaluation(said, nothing))
    np.testing.assert_allclose(second.per_step["old_values"], second.value_gain * said + second.value_shift, rtol=1e-5)
    np.testing.assert_allclose(algorithm.scale.restored(second.per_step["old_values"]), before, rtol=1e-4, atol=1e-4)


def test_what_is_left_when_all_succeed_is_not_blown_up():
    """After batches of mixed outcomes, one where every episode goes alike: small differences stay small."""
    random = np.random.default_rng(3)
    mixed = _episodes(*[([float(random.integers(2))], "terminated") for _ in range(64)])
    alike = _episodes(*[([1.0 + 0.01 * random.normal()], "terminated") for _ in range(64)])
    says_nothing, nothing = np.zeros(64, np.float32), np.full(64, np.nan)
    algorithm = ppo(PLAIN.model_copy(update={"normalize_returns": True, "normalize_advantages": True}))
    first = algorithm.targets(mixed, _evaluation(says_nothing, nothing)).per_step["advantages"]
    assert first.std() == pytest.approx(1.0, abs=0.01)
    assert algorithm.targets(alike, _evaluation(says_nothing, nothing)).per_step["advantages"].std() < 0.1
    batch_only = ppo(PLAIN.model_copy(update={"normalize_advantages": True}))
    batch_only.targets(mixed, _evaluation(says_nothing, nothing))
    blown_up = batch_only.targets(alike, _evaluation(says_nothing, nothing)).per_step["advantages"]
    assert blown_up.std() == pytest.approx(1.0, abs=0.01)
