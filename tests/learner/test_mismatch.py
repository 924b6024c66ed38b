"""The metric that shows how far the learner's log-probabilities are from the engine's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.trajectory import TrajectoryBatch
from learner.mismatch import mismatch_metrics, token_versions

STEP = st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0), st.integers(0, 2)), min_size=0, max_size=6)


@given(st.lists(STEP, max_size=5))
def test_equals_a_token_by_token_count(steps):
    columns = [[[token[part] for token in step] for step in steps] for part in range(3)]
    metrics = mismatch_metrics(*columns, version=2)
    tokens = [token for step in steps for token in step]
    for name, chosen in (("mismatch", [t for t in tokens if t[2] == 2]), ("drift", tokens)):
        if not chosen:
            assert f"{name}_mean" not in metrics
            continue
        differences = [current - behaviour for current, behaviour, _ in chosen]
        assert metrics[f"{name}_mean"] == pytest.approx(sum(map(abs, differences)) / len(chosen))
        assert metrics[f"{name}_max"] == pytest.approx(max(map(abs, differences)))
        kl = sum(math.exp(d) - 1 - d for d in differences) / len(chosen)
        assert metrics[f"{name}_kl"] == pytest.approx(kl, rel=1e-6, abs=1e-9)
    assert metrics["mismatch_tokens"] == sum(t[2] == 2 for t in tokens)


def test_the_kl_estimate_is_unbiased():
    rng = np.random.default_rng(0)
    behaviour, current = rng.dirichlet(np.ones(8)), rng.dirichlet(np.ones(8))
    exact = float((behaviour * np.log(behaviour / current)).sum())
    tokens = rng.choice(8, size=400_000, p=behaviour)
    metrics = mismatch_metrics([np.log(current)[tokens]], [np.log(behaviour)[tokens]], [np.zeros(len(tokens))], 0)
    assert metrics["mismatch_kl"] == pytest.approx(exact, rel=0.05)


def test_versions_change_within_a_response():
    batch = TrajectoryBatch.from_rows(
        [
            {"response_ids": [1, 2, 3, 4], "policy_versions": [{"version": 3, "start": 0}, {"version": 4, "start": 3}]},
            {"response_ids": [5, 6], "policy_versions": [{"version": 4, "start": 0}]},
        ],
        {},
    )
    assert [versions.tolist() for versions in token_versions(batch)] == [[3, 3, 3, 4], [4, 4]]
