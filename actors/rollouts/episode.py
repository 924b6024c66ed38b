"""Recording one episode as rows of the trajectory schema: what the policy saw, its answers and the outcomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.generation import Generation, GenerationRequest, RefusalReason
from actors.images import EncodedImage
from actors.trajectory import TrajectoryBatch, outcome_columns

#: Evaluation seeds start here and training seeds stay below, so no episode is used for both.
EVALUATION_SEED_BASE = 2**30


@dataclass(frozen=True)
class EpisodeSpec:
    """Which episode to run. `seed` goes to the environment's reset, and the sampling is seeded with it too."""

    name: str
    seed: int
    temperature: float


def training_seed(run_seed: int, *position: int) -> int:
    """A seed below `EVALUATION_SEED_BASE`, derived from the run's seed and a position (update, worker, slot, count)."""
    sequence = np.random.SeedSequence([run_seed, *position])
    return int(sequence.generate_state(1)[0]) % EVALUATION_SEED_BASE


class EpisodeRecorder:
    """Builds the requests of one episode and collects its rows.

    Call order: `begin(observation)`, then `request()` and `record(...)` for each step. The episode is `over` when an
    outcome ends it, after `fail(reason)` for an environment that died, hung or failed, or after `refuse(reason)`.
    """

    def __init__(
        self,
        spec: EpisodeSpec,
        *,
        run: str,
        run_seed: int,
        environment: str,
        worker: int,
        slot: int,
        max_new_tokens: int,
    ) -> None:
        self.spec = spec
        self._identity = {
            "run": run,
            "episode": spec.name,
            "environment": environment,
            "worker": worker,
            "slot": slot,
            "seed": spec.seed,
        }
        self._run_seed = run_seed
        self._max_new_tokens = max_new_tokens
        self._rows: list[dict[str, Any]] = []
        self._images: dict[str, bytes] = {}
        self.over = False
        self.cut_off = False  # over, though the environment would have gone on from the present observation
        self.failed = False

    def begin(self, observation: dict[str, Any]) -> None:
        """Take the first observation, as `EnvironmentHost.reset` returned it."""
        self._see(observation)

    def request(self, seeded: bool = True) -> GenerationRequest:
        """The request for the next step. seeded: with a seed that depends only on run, episode and step. Without one,
        the engine samples from its own random numbers, which is faster."""
        sequence = np.random.SeedSequence([self._run_seed, self.spec.seed, len(self._rows)])
        return GenerationRequest(
            prompt=self._prompt,
            image=self._image,
            png=self._images[self._image],
            temperature=self.spec.temperature,
            max_new_tokens=self._max_new_tokens,
            seed=int(sequence.generate_state(1)[0]) >> 1 if seeded else None,
        )

    def record(
        self,
        generation: Generation,
        outcome: tuple[dict[str, Any], float, bool, bool, dict[str, Any]],
        environment_seconds: float,
    ) -> None:
        """Add one step: the answer, and what `EnvironmentHost.step` returned for its text."""
        observation, reward, terminated, truncated, info = outcome
        self.over = terminated or truncated
        self._rows.append(
            {
                **self._identity,
                "step": len(self._rows),
                "prompt": self._prompt,
                "image": self._image,
                "prompt_ids": generation.prompt_ids,
                "response_ids": generation.response_ids,
                "behaviour_logprobs": generation.logprobs,
                "policy_versions": [{"version": v, "start": s} for v, s in generation.version_spans],
                "finish_reason": generation.finish_reason,
                "utterance": generation.text,
                **outcome_columns(reward, terminated, truncated, info),
                "generate_seconds": generation.seconds,
                "environment_seconds": environment_seconds,
            }
        )
        self._see(observation)
        self.cut_off = self.over and not terminated
        if self.cut_off:
            self._note_final_observation()

    def fail(self, reason: str) -> None:
        """The episode ends at its last complete step, with this reason and no reward for what failed."""
        self.over = True
        self.failed = True
        if self._rows:
            self._rows[-1].update(truncated=True, end_reason=reason)
            self._note_final_observation()

    def refuse(self, reason: RefusalReason) -> None:
        """There can be neither an answer to the present observation nor a value of it, also where an episode was cut
        off at it. So the episode ends with the step before, whose observation stands for what would have followed."""
        if self._rows:
            refused_after = self._rows.pop()
            self._prompt, self._image = refused_after["prompt"], refused_after["image"]
        self.fail(reason)

    def batch(self) -> TrajectoryBatch:
        """The rows so far; empty when the episode failed before a step of it could be kept."""
        used = {row["image"] for row in self._rows} | {row.get("final_image") for row in self._rows}
        return TrajectoryBatch.from_rows(self._rows, {key: png for key, png in self._images.items() if key in used})

    def __len__(self) -> int:
        return len(self._rows)

    def _see(self, observation: dict[str, Any]) -> None:
        self._prompt = observation["prompt"]
        image: EncodedImage = observation["image"]
        self._image = image.key
        self._images[image.key] = image.png

    def _note_final_observation(self) -> None:
        self._rows[-1].update(final_prompt=self._prompt, final_image=self._image)
