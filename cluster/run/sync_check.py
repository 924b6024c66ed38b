"""Does a live engine serve the learner's weights? A comparison of their log-probabilities that can fail.

Most tokens of an answer are certain: any version of the policy gives them a probability near 1. So the check looks at
uncertain tokens only. The engine answers the prompts of the last batch whose answers were least certain, and the
learner gives its own log-probabilities of these tokens. After a good load the two differ by rounding. The engine also
answers the prompts of the check before once more: if the weights have moved since, its new answers must fit the learner
better than the ones it gave then. An engine that skipped a load gives the same answers as before, and fits no better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from actors.generation import Generation, GenerationRequest
from actors.trajectory import TrajectoryBatch
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError

#: Prompts that one check takes from a batch.
PROMPTS = 4
#: Tokens with at least this probability say nothing about the weights.
CERTAIN = 0.9
#: Tokens that are judged at least, the least probable first: no single token decides.
LEAST_TOKENS = 16
#: By precision: tolerance where the config has none, see `agree`. Rounding is far below it: 1e-6 in float32, and in
#: bfloat16 0.004 for a small model with logits of about 20 (0.04 where the output heads are bfloat16 too, as they are
#: not). A stale head is 0.8 away. A load that was skipped may be nearer: for that there is the other comparison.
TOLERANCES = {"float32": 0.02, "bfloat16": 0.1}
#: The weights have moved if the answers of the version before differ by more than this share of the tolerance, and by
#: more than so many times the rounding, which is the smallest mean difference of a check so far.
MOVED_SHARE = 0.25
MOVED_ROUNDINGS = 4.0
#: A fit that is at least this share of the version before's is not better.
NO_BETTER = 0.8


class SyncCheck:
    """The prompts and answers of one check, and those of the check before.

    `choose` prompts from a batch, let an engine answer all `requests`, let the learner judge the `rows`, then `judge`.
    """

    def __init__(self, config: RunConfig) -> None:
        self._temperature = config.rollout.temperature
        self._max_new_tokens = config.rollout.max_new_tokens
        self._tolerance = tolerance(config)
        self._before: list[GenerationRequest] = []
        self._answers_before: list[Generation] = []  # to `_before`, in the check before; [] after a resume
        self._chosen: list[GenerationRequest] = []
        self._rounding = np.inf  # nats

    def choose(self, batch: TrajectoryBatch) -> None:
        """Take the prompts of the batch's least certain answers; those that were chosen last become the earlier ones.
        The answers to them are those of the last `judge`, if there was one in between."""
        self._before = self._chosen
        surprise = [-float(logprobs.sum()) for logprobs in batch.ragged("behaviour_logprobs", np.float32)]
        prompts, images = batch.column("prompt"), batch.column("image")
        rows: dict[tuple[str, str], int] = {}
        for row in sorted(range(len(batch)), key=lambda row: -surprise[row]):
            rows.setdefault((prompts[row], images[row]), row)
        self._chosen = [
            GenerationRequest(prompt, image, batch.images[image], self._temperature, self._max_new_tokens, seed)
            for seed, (prompt, image) in enumerate(list(rows)[:PROMPTS])
        ]

    @property
    def requests(self) -> list[GenerationRequest]:
        """What the engine is to answer: the earlier prompts, then the new ones."""
        return [*self._before, *self._chosen]

    def rows(self, answers: Sequence[Generation]) -> TrajectoryBatch:
        """The engine's answers to `requests`, then its earlier answers to the earlier prompts, for the learner."""
        asked = [*self.requests, *self._before[: len(self._answers_before)]]
        return answered(asked, [*answers, *self._answers_before])

    def judge(
        self, server: str, version: int, answers: Sequence[Generation], logprobs: Sequence[np.ndarray]
    ) -> dict[str, float]:
        """Metrics of the check. Raises `CosoError` if the engine's weights or caches are stale.

        answers: the engine's to `requests`. logprobs: the learner's for the tokens of `rows`, float32 (n,) per row.
        """
        engine = [answer.logprobs for answer in (*answers, *self._answers_before)]
        if not all(np.isfinite(values).all() for values in (*engine, *logprobs)):
            raise CosoError(
                f"the log-probabilities of {server} or of the learner are not finite (version {version}): the weights "
                "are broken. Resume from the last checkpoint."
            )
        again, new = len(self._before), len(answers)
        present = fit(engine[:new], logprobs[:new])
        if not agree(present, self._temperature, self._tolerance):
            raise CosoError(
                f"{server} gives log-probabilities {present['mean_difference']:.3f} away from the learner's in the "
                f"mean, KL {present['kl']:.3f}, under the same weights (version {version}): its weights or caches are "
                f"stale. The tolerance is {self._tolerance:g}, see weight_sync.check_tolerance."
            )
        if self._answers_before:
            before = fit(engine[new:], logprobs[new:])["mean_difference"]
            now = fit(engine[:again], logprobs[:again])["mean_difference"]
            floor = max(MOVED_SHARE * self._tolerance / self._temperature, MOVED_ROUNDINGS * self._rounding)
            if before > floor and now >= NO_BETTER * before:
                raise CosoError(
                    f"{server} fits weights version {version} no better than its answers of the check before do: its "
                    f"log-probabilities are {now:.4f} away from the learner's in the mean, the earlier ones "
                    f"{before:.4f}. It has not loaded the new weights."
                )
            present["previous_difference"] = before
        self._rounding = min(self._rounding, present["mean_difference"])
        self._answers_before = list(answers[again:])
        return {f"sync_check/{name}": value for name, value in present.items()}


def fit(engine: Sequence[np.ndarray], learner: Sequence[np.ndarray]) -> dict[str, float]:
    """How far the learner's log-probabilities are from the engine's at uncertain tokens, nats; float32 (n,) each."""
    sampled = np.concatenate(engine).astype(np.float64)
    order = np.argsort(sampled, kind="stable")
    judged = order[: max(int((sampled < np.log(CERTAIN)).sum()), LEAST_TOKENS)]
    log_ratio = np.concatenate(learner).astype(np.float64)[judged] - sampled[judged]
    differences = np.abs(log_ratio)
    return {
        "max_difference": float(differences.max()),
        "mean_difference": float(differences.mean()),
        # Schulman's k3 estimator of KL(engine || learner), never below 0.
        "kl": float(np.mean(np.expm1(log_ratio) - log_ratio)),
        "tokens": float(len(judged)),
    }


def agree(found: Mapping[str, float], temperature: float, tolerance: float) -> bool:
    """Whether a `fit` is one of the same weights, by its mean and its KL, whatever a single token does.

    Rounding is of logits, and log-probabilities are of logits / temperature. So the mean is scaled by the temperature,
    and the KL, which grows with the square of small differences, by its square.
    """
    return found["mean_difference"] * temperature <= tolerance and found["kl"] * temperature**2 <= tolerance


def tolerance(config: RunConfig) -> float:
    """For `agree`."""
    return config.weight_sync.check_tolerance or TOLERANCES[config.model.dtype]


def answered(asked: Sequence[GenerationRequest], answers: Sequence[Generation]) -> TrajectoryBatch:
    """Requests and the engine's answers to them, as steps that a learner can judge."""
    return TrajectoryBatch.from_rows(
        [
            {
                "prompt": request.prompt,
                "image": request.image,
                "prompt_ids": answer.prompt_ids,
                "response_ids": answer.response_ids,
                "behaviour_logprobs": answer.logprobs,
            }
            for request, answer in zip(asked, answers, strict=True)
        ],
        {request.image: request.png for request in asked},
    )
