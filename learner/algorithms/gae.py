"""Generalised advantage estimation (Schulman et al., arXiv 1506.02438), one episode at a time."""

from __future__ import annotations

import numpy as np


def gae(rewards: np.ndarray, values: np.ndarray, bootstrap: float, discount: float, gae_lambda: float) -> np.ndarray:
    """Advantages float64 (T,) of an episode's T steps, in units of reward.

    rewards (T,); values (T,): V of the state before each step; bootstrap: V of the state after the last step, 0 where
    the episode terminated there. A_t = Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γ V_{t+1} − V_t. Add `values` for the
    returns that the value head is to predict.
    """
    rewards, values = np.asarray(rewards, np.float64), np.asarray(values, np.float64)
    following = np.append(values[1:], bootstrap)
    surprise = rewards + discount * following - values
    advantages = np.zeros(len(rewards))
    running = 0.0
    for step in reversed(range(len(rewards))):
        running = surprise[step] + discount * gae_lambda * running
        advantages[step] = running
    return advantages
