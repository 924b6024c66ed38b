"""The pool scores everything once and loses no training, whichever of its processes dies or does not answer."""

import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch

from scoring.effects.effects import influence_statistics
from scoring.effects.estimators import make_estimator
from scoring.effects.parser_effects import ParserSource
from scoring.effects.tokens import TokenFacts
from scoring.pool.scorers import ScoringError
from scoring.pool.scoring_pool import ScoringContext, ScoringPool
from scoring.scm.shape import ScmSizes
from scoring.scm.training import ScmTrainer
from scoring.settings import ScmSettings, ScoringSettings
from tests.scoring.languages import FiveBeforeSix, word_tokenizer

SIZES = ScmSizes(vocab_size=30, head_sizes=(3, 2))
COUNTABLE = np.array([i % 4 != 0 for i in range(30)])
TOKENS = TokenFacts(vocab_size=30, countable_by_id=COUNTABLE, null_id=0)
PARSER = ParserSource(tokenizer=word_tokenizer([f"w{i}" for i in range(1, 30)]), parser=FiveBeforeSix())
CONTEXT = ScoringContext(
    tokens=TOKENS, head_sizes=SIZES.head_sizes, parser=PARSER, seed=1, actor_cpus=0.1, max_failures=3
)
SETTINGS = ScoringSettings(
    workers=2,
    window=2,
    batch_tokens=300,
    batch_utterances=4,
    start_deadline_s=90,
    deadline_s=60,
    scm=ScmSettings(
        hidden=16,
        layers=1,
        heads=2,
        feedforward=32,
        max_tokens=32,
        learning_rate=3e-3,
        rounds=2,
        round_utterances=40,
        minibatch=16,
    ),
)


pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def pool(ray_cluster):
    pool = ScoringPool(SETTINGS, CONTEXT)
    pool.start()
    yield pool
    pool.close()


def make_batch(seed, count=40):
    draw = np.random.default_rng(seed)
    utterances = [draw.integers(0, 30, draw.integers(1, 20)).astype(np.int32) for _ in range(count)]
    utterances[3] = utterances[0]
    labels = np.stack([draw.integers(0, 3, count), draw.integers(-1, 2, count)], axis=1).astype(np.int32)
    labels[3] = labels[0]
    labels[5] = -1
    return utterances, labels


def new_trainer() -> ScmTrainer:
    return ScmTrainer(SETTINGS.scm, SIZES, seed=CONTEXT.seed)


def twin_of(pool) -> ScmTrainer:
    """Build, in this process, the trainer that the pool's trainer should be."""
    twin = new_trainer()
    twin.load_state_dict(*pool.state())
    return twin


def assert_scores_are_those_of(twin, utterances, labels, values):
    scorer = make_estimator("scm", TOKENS, SETTINGS, scm=twin.scm.double().eval())
    expected = [scorer.score(ids, row) for ids, row in zip(utterances, labels, strict=True)]
    assert len(values) == len(utterances)
    for value, wanted in zip(values, expected, strict=True):
        np.testing.assert_array_equal(value, wanted.values)
    distinct = {
        (ids.tobytes(), row.tobytes()): scored for ids, row, scored in zip(utterances, labels, expected, strict=True)
    }
    return sum(scored.counterfactuals for scored in distinct.values())


def assert_states_equal(pool, twin):
    (tensors, facts), (expected, expected_facts) = pool.state(), twin.state_dict()
    assert facts == expected_facts
    for name, value in expected.items():
        torch.testing.assert_close(tensors[name], value, rtol=0, atol=0)


def wait_until_gone(pid, seconds=20):
    deadline = time.monotonic() + seconds
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def test_scores_and_training_are_those_of_one_process(pool):
    twin = new_trainer()
    utterances, labels = make_batch(0)
    before, _ = pool.score(utterances, labels)
    assert_scores_are_those_of(new_trainer(), utterances, labels, before)

    assert pool.train(utterances, labels) == twin.train(utterances, labels)
    assert pool.version == 1
    assert_states_equal(pool, twin)
    values, statistics = pool.score(utterances, labels)
    expected = assert_scores_are_those_of(twin, utterances, labels, values)
    assert max(np.abs(a - b).max() for a, b in zip(before, values, strict=True)) > 1e-3  # new weights were used
    assert statistics["utterances"] == 40 and statistics["distinct"] == 39
    assert statistics["counterfactuals"] == expected and statistics["version"] == 1
    assert statistics["cache_hits"] == 0 and statistics["hit_rate"] == pytest.approx(1 / 40)
    assert influence_statistics(values).items() <= statistics.items()
    workers = pool.check()
    assert [worker["version"] for worker in workers] == [1, 1]
    assert sum(worker["utterances"] for worker in workers) == 2 * 39


def policy_of_the_thread_at_work(pid, seconds=30):
    """The kernel's policy of the thread of a process that next uses 30 ms of CPU time."""

    def used():
        times = {}
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            times[int(thread)] = int(fields[11]) + int(fields[12])  # user and system time, ticks
        return times

    before, deadline = used(), time.monotonic() + seconds
    while time.monotonic() < deadline:
        for thread, ticks in used().items():
            if ticks - before.get(thread, 0) >= 0.03 * os.sysconf("SC_CLK_TCK"):
                return os.sched_getscheduler(thread)
        time.sleep(0.01)
    raise TimeoutError(f"no thread of process {pid} worked for {seconds} s")


def test_a_training_under_way_is_raised_when_somebody_begins_to_wait(pool):
    """It also takes longer than its deadline, which is one of silence."""
    utterances, labels = make_batch(90)
    twin, patient = twin_of(pool), pool.settings
    pool.settings = patient.model_copy(update={"deadline_s": 1.0})
    reports = []
    training = threading.Thread(target=lambda: reports.append(pool.train(utterances, labels, rounds=700)))
    try:
        begun = time.monotonic()
        training.start()
        assert policy_of_the_thread_at_work(pool.trainer_pid()) == os.SCHED_IDLE
        pool.waited_for = True
        assert policy_of_the_thread_at_work(pool.trainer_pid()) == os.SCHED_OTHER
        training.join(timeout=120)
    finally:
        pool.settings, pool.waited_for = patient, False
    assert time.monotonic() - begun > 1.0
    assert pool.recoveries["scm_trainer"] == 0
    assert reports == [twin.train(utterances, labels, rounds=700)]  # whichever thread trains, the result is the same


def test_nothing_to_score_is_no_error_and_bad_input_is_named_and_harmless(pool):
    values, statistics = pool.score([], np.empty((0, 2), np.int32))
    assert values == [] and statistics["utterances"] == 0 and statistics["influence_mean"] == 0
    with pytest.raises(ValueError, match="token ids from 30 to 30"):
        pool.score([np.array([30])], np.array([[0, 0]]))
    with pytest.raises(ValueError, match="label 3 for head 0"):
        pool.train([np.array([1])], np.array([[3, 0]]))
    tensors, facts = pool.state()
    with pytest.raises(ValueError, match="hidden = 32, this run has 16"):
        pool.load(tensors, {**facts, "settings": {**facts["settings"], "hidden": 32}})
    utterances, labels = make_batch(1)
    assert_scores_are_those_of(twin_of(pool), utterances, labels, pool.score(utterances, labels)[0])


def test_a_scorer_killed_in_the_middle_of_its_task_loses_nothing(pool):
    utterances, labels = make_batch(2)
    victim, other = pool.check()
    recovered = pool.recoveries["scorer"]
    os.kill(victim["pid"], signal.SIGSTOP)  # its task is certainly in progress when it dies
    results = []
    thread = threading.Thread(target=lambda: results.append(pool.score(utterances, labels)))
    thread.start()
    time.sleep(1.0)
    assert thread.is_alive()
    os.kill(victim["pid"], signal.SIGKILL)
    thread.join(timeout=60)
    values, statistics = results[0]
    expected = assert_scores_are_those_of(twin_of(pool), utterances, labels, values)
    assert statistics["counterfactuals"] == expected  # every utterance exactly once
    assert pool.recoveries["scorer"] == recovered + 1
    pids = [worker["pid"] for worker in pool.check()]
    assert len(set(pids)) == 2 and other["pid"] in pids and victim["pid"] not in pids
    # The replacement scores with the current weights.
    others, actions = make_batch(12)
    assert_scores_are_those_of(twin_of(pool), others, actions, pool.score(others, actions)[0])
    assert [worker["version"] for worker in pool.check()] == [pool.version] * 2


def test_an_idle_scorer_that_was_killed_is_replaced_by_a_check(pool):
    victim = pool.check()[1]["pid"]
    recovered = pool.recoveries["scorer"]
    os.kill(victim, signal.SIGKILL)
    wait_until_gone(victim)
    assert victim not in [worker["pid"] for worker in pool.check()]
    assert pool.recoveries["scorer"] == recovered + 1


def test_a_trainer_killed_between_or_during_calls_continues_from_its_state(pool):
    twin = twin_of(pool)
    recovered = pool.recoveries["scm_trainer"]
    victim = pool.trainer_pid()
    os.kill(victim, signal.SIGKILL)
    wait_until_gone(victim)
    assert pool.train(*make_batch(3)) == twin.train(*make_batch(3))
    assert pool.recoveries["scm_trainer"] == recovered + 1

    victim = pool.trainer_pid()
    os.kill(victim, signal.SIGSTOP)
    killer = threading.Timer(1.0, os.kill, (victim, signal.SIGKILL))
    killer.start()
    assert pool.train(*make_batch(4)) == twin.train(*make_batch(4))
    assert pool.recoveries["scm_trainer"] == recovered + 2
    assert_states_equal(pool, twin)


def test_a_checkpoint_restores_weights_and_version(pool):
    utterances, labels = make_batch(5)
    state = pool.state()
    version, before = pool.version, pool.score(utterances, labels)[0]
    first = pool.train(utterances, labels)
    pool.load(*state)
    assert pool.version == version
    for value, again in zip(before, pool.score(utterances, labels)[0], strict=True):
        np.testing.assert_array_equal(value, again)
    assert pool.train(utterances, labels) == first


def test_identical_answers_are_scored_once_per_version_and_once_in_all_without_an_scm(pool):
    utterances, labels = make_batch(6)
    first, _ = pool.score(utterances, labels)
    busy = sum(worker["utterances"] for worker in pool.check())
    again, statistics = pool.score(utterances[::-1], labels[::-1])
    assert statistics["cache_hits"] == 39 and statistics["hit_rate"] == 1 and statistics["counterfactuals"] == 0
    assert sum(worker["utterances"] for worker in pool.check()) == busy
    for value, same in zip(first, again[::-1], strict=True):
        np.testing.assert_array_equal(value, same)
    again[0][:] = -1  # a caller's array is its own
    np.testing.assert_array_equal(pool.score(utterances, labels)[0][-1], first[-1])

    pool.score(utterances, labels, "parser")
    pool.train(utterances, labels)
    assert pool.score(utterances, labels)[1]["cache_hits"] == 0
    assert pool.score(utterances, labels, "parser")[1]["cache_hits"] == 39


def test_scoring_keeps_its_weights_while_new_ones_arrive(pool):
    utterances, labels = make_batch(7)
    before, weights = twin_of(pool), pool.weights
    pids = [worker["pid"] for worker in pool.check()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # so that the tasks are certainly in progress when the next version comes
    results = []
    thread = threading.Thread(target=lambda: results.append(pool.score(utterances, labels)))
    thread.start()
    time.sleep(0.5)
    pool.train(utterances, labels)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    thread.join(timeout=60)
    values, statistics = results[0]
    assert statistics["version"] == weights[0] == pool.version - 1
    assert_scores_are_those_of(before, utterances, labels, values)
    later, statistics = pool.score(utterances, labels)
    assert statistics["version"] == pool.version
    assert_scores_are_those_of(twin_of(pool), utterances, labels, later)
    # Asked for by name, the former version is still there; no process was replaced.
    for value, same in zip(values, pool.score(utterances, labels, weights=weights)[0], strict=True):
        np.testing.assert_array_equal(value, same)
    assert [worker["pid"] for worker in pool.check()] == pids


def test_scorers_parse(pool):
    ids = np.array([8, 9, 5, 10, 6, 11], np.int32)  # the parser below wants 5 before 6
    values, statistics = pool.score([ids], np.array([[1, -1]]), "parser")
    assert values[0].tolist() == [0, 1, 1, 1, 1, 0]  # windows of two tokens, of which 8 does not count
    assert statistics["counterfactuals"] == 5


def test_actors_that_cannot_be_placed_are_an_error_and_none_is_left():
    settings = SETTINGS.model_copy(update={"start_deadline_s": 1.0})
    pool = ScoringPool(settings, replace(CONTEXT, actor_cpus=64.0))
    with pytest.raises(ScoringError, match="did not start within 1 s"):
        pool.start()
    with pytest.raises(ScoringError, match="not running"):
        pool.score([np.array([1])], np.array([[0, 0]]))


def test_a_context_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="scoring.device is cuda, but actor_gpus is 0"):
        ScoringPool(ScoringSettings(device="cuda"), CONTEXT)
    with pytest.raises(ValueError, match="max_failures is 0"):
        replace(CONTEXT, max_failures=0)


def test_a_trainer_that_dies_twice_in_the_same_way_is_not_started_a_third_time(pool, monkeypatch):
    utterances, labels = make_batch(91)
    pool.train(utterances, labels)
    replaced = pool.recoveries["scm_trainer"]
    context = pool.context
    pool.context = replace(context, max_failures=21)
    made = pool._make_trainer

    def dying():
        trainer = made()
        os.kill(ray.get(trainer.pid.remote(), timeout=60), signal.SIGKILL)
        return trainer

    os.kill(pool.trainer_pid(), signal.SIGKILL)
    monkeypatch.setattr(pool, "_make_trainer", dying)
    try:
        with pytest.raises(ScoringError, match="the SCM's trainer failed twice in the same way.*died"):
            pool.train(utterances, labels)
        assert pool.recoveries["scm_trainer"] == replaced + 1
    finally:
        monkeypatch.undo()
        pool.context = context
    version = pool.version
    pool.train(utterances, labels)  # what was learned before is there
    assert pool.version == version + 1
