"""Online training of the SCM of CoSo (arXiv 2505.03792) on (utterance, parsed action) pairs.

The loss is the cross-entropy, summed over the heads that apply. Utterances that did not parse are left out.
The published schedule is 500 rounds on offline data, where there is any, then 2 rounds of 1,024 sampled
utterances per iteration, with Adam at 1e-5.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scoring.calibration import of_probabilities
from scoring.scm.model import StructuralCausalModel, labels_loss
from scoring.scm.shape import ScmSizes, check_shape, saved_shape
from scoring.scm.temperature import FEWEST_HELD_OUT, fit_temperature, is_held_out
from scoring.settings import ScmSettings
from scoring.utterances import check_utterances, distinct_pairs, flatten, padded, split

Pair = tuple[NDArray[np.int32], NDArray[np.int32]]
"""One utterance's ids (n,) and its action labels (K,)."""


def run_here(piece: Callable[..., Any], *arguments: Any) -> Any:
    """Return `piece(*arguments)`."""
    return piece(*arguments)


@dataclass(frozen=True, kw_only=True)
class ScmTrainingReport:
    """What one call of `ScmTrainer.train` did.

    metrics: always `version`, `buffer` (utterances in it), `new` (new utterances that parsed), `steps`.
        After at least one step, `loss` (mean over the sampled utterances, nats).
        With new utterances, measured on them before training on them: `new_loss` (nats), `accuracy` (share whose
        applicable labels are all right), `confidence` (mean probability of the predicted labels of those heads), `ece`
        (expected calibration error of that confidence), `reliability_*` (the curve behind it, see
        `scoring.calibration`), and `unseen` (number of new utterances that are not in the buffer: never trained on,
        unless the buffer dropped them since). With unseen ones, `unseen_accuracy` and `unseen_ece` on these.
        With `temperature_scaling`, `temperature` (of the new weights), `held_out` (utterances it was fitted on), and
        with new utterances `unscaled_ece`. All else of the new utterances is at the temperature before.
    """

    metrics: dict[str, float]


class ScmTrainer:
    """An SCM with its optimiser, its buffer of past utterances and its own random generator.

    With `temperature_scaling`, a tenth of the utterances is not trained on; after every training a temperature is
    fitted on those in the buffer. Training itself goes on with unscaled logits: `scm.temperature` stays 1.

    Two trainers with equal settings, sizes and seed, given the same calls, have equal weights. Saving and loading one
    of them between two calls changes nothing.

    seed: of the first weights and of the sampling. last_batch: number of the last batch that it learned, 0 at first.
    temperature: of the weights that scorers use. done: minibatches trained or measured on so far.
    """

    def __init__(
        self,
        settings: ScmSettings,
        sizes: ScmSizes,
        *,
        seed: int = 0,
        device: str = "cpu",
        run: Callable[..., Any] = run_here,
    ) -> None:
        """run: calls a function with arguments, perhaps in another thread; everything on a minibatch goes through
        it."""
        self.settings = settings
        self.device = torch.device(device)
        self.version = 0
        self.temperature = 1.0
        self.last_batch = 0
        self.done = 0
        self._run = run
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.scm = StructuralCausalModel(settings, sizes).to(self.device)
        self._optimiser = torch.optim.Adam(self.scm.parameters(), lr=settings.learning_rate, fused=True)
        self._generator = torch.Generator().manual_seed(seed)
        self._buffer: deque[Pair] = deque(maxlen=settings.buffer_utterances)

    def train(
        self,
        utterances: Sequence[NDArray[np.integer]],
        labels: NDArray[np.integer],
        rounds: int | None = None,
        batch: int = 0,
    ) -> ScmTrainingReport:
        """Measure the SCM on new utterances, add them to the buffer, train on samples of it; version + 1.

        Pre-training is a call with the offline data and its own number of rounds.

        utterances: B integer arrays (n_b,), n_b >= 0. labels: (B, K), -1 where a head does not apply.
        Utterances that did not parse (all labels -1) and empty ones are left out.
        rounds: of this call, at least 0; by default those of the settings. batch: the batch's number, 0 for
        utterances that are no batch of a run.
        Raises ValueError, and changes nothing, when shapes, ids or labels do not fit the SCM.
        """
        sizes = self.scm.sizes
        check_utterances(utterances, labels, vocab_size=sizes.vocab_size, head_sizes=sizes.head_sizes)
        new: list[Pair] = [
            (ids.astype(np.int32), row.astype(np.int32))
            for ids, row in zip(utterances, labels, strict=True)
            if len(ids) and (row >= 0).any()
        ]
        seen = {ids.tobytes() for ids, _ in self._buffer}
        unseen = np.array([ids.tobytes() not in seen for ids, _ in new], dtype=bool)
        measured = self._measure(new, unseen)
        self._buffer.extend(new)
        trained = self._train(self.settings.rounds if rounds is None else rounds)
        if self.settings.temperature_scaling:
            trained |= self._fit_temperature()
        self.version += 1
        self.last_batch = max(self.last_batch, batch)
        metrics = {
            "version": self.version,
            "buffer": len(self._buffer),
            "new": len(new),
            **trained,
            **measured,
        }
        return ScmTrainingReport(metrics=metrics)

    def weights(self) -> dict[str, Tensor]:
        """Return the SCM's parameters and its temperature by name: copies, on the CPU."""
        weights = {name: value.detach().cpu().clone() for name, value in self.scm.state_dict().items()}
        return weights | {"temperature": torch.tensor(self.temperature, dtype=torch.float64)}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that training needs to continue: (tensors by flat name, facts of JSON types).

        All are copies, on the CPU. The tensors are weights, Adam's moments, the buffer and the generator's state; the
        facts are the version, the last batch and the SCM's shape (`scoring.scm.shape`).
        """
        tensors = {f"scm.{name}": value for name, value in self.weights().items()}
        for index, moments in self._optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value.detach().cpu().clone() for name, value in moments.items()}
        ids, lengths = flatten([ids for ids, _ in self._buffer])
        labels = np.array([row for _, row in self._buffer], dtype=np.int32)
        tensors |= {
            "buffer.ids": torch.from_numpy(ids),
            "buffer.lengths": torch.from_numpy(lengths),
            "buffer.labels": torch.from_numpy(labels.reshape(len(lengths), len(self.scm.sizes.head_sizes))),
            "generator": self._generator.get_state(),
        }
        return tensors, {
            "version": self.version,
            "last_batch": self.last_batch,
            "settings": saved_shape(self.settings, self.scm.sizes),
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        The training settings stay this trainer's own: a changed learning rate applies from now on, and a smaller
        buffer keeps the latest utterances. Raises ValueError when the state is of an SCM of another shape.
        """
        check_shape(facts["settings"], self.settings, self.scm.sizes)
        self.scm.load_state_dict(
            {name.removeprefix("scm."): value for name, value in tensors.items() if name.startswith("scm.")}
        )
        self.temperature = float(self.scm.temperature) if self.settings.temperature_scaling else 1.0
        self.scm.temperature.fill_(1.0)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = value.clone()
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": moments, "param_groups": groups})
        ids = split(tensors["buffer.ids"].numpy().copy(), tensors["buffer.lengths"].numpy())
        labels = tensors["buffer.labels"].numpy().copy()
        self._buffer = deque(zip(ids, labels, strict=True), maxlen=self.settings.buffer_utterances)
        self._generator.set_state(tensors["generator"].clone())
        self.version = int(facts["version"])
        self.last_batch = int(facts.get("last_batch", 0))  # states of before have none

    def _train(self, rounds: int) -> dict[str, float]:
        self.scm.train()
        total, seen, steps = torch.zeros((), dtype=torch.float64, device=self.device), 0, 0
        pairs = list(self._buffer)
        if self.settings.temperature_scaling:
            pairs = [pair for pair in pairs if not is_held_out(pair[0])] or pairs
        for _ in range(rounds):
            order = torch.randperm(len(pairs), generator=self._generator)
            for chosen in order[: self.settings.round_utterances].split(self.settings.minibatch):
                if not len(chosen):
                    continue
                total += self._run(self._step, [pairs[i] for i in chosen.tolist()])
                self.done += 1
                seen += len(chosen)
                steps += 1
        return {"steps": steps} | ({"loss": float(total) / seen} if seen else {})

    def _step(self, pairs: Sequence[Pair]) -> Tensor:
        """One step of the optimizer; returns the sum of the utterances' losses."""
        distinct, which = self._distinct(pairs)
        ids, lengths, labels = self._tensors(distinct)
        losses = labels_loss(self.scm(ids, lengths), labels)[which]
        self._optimiser.zero_grad()
        losses.mean().backward()
        self._optimiser.step()
        return losses.detach().sum()

    @torch.inference_mode()
    def _fit_temperature(self) -> dict[str, float]:
        """Fit the temperature on the latest held-out utterances, at most as many as a round trains on."""
        held_out = [pair for pair in self._buffer if is_held_out(pair[0])][-self.settings.round_utterances :]
        distinct, which = self._distinct(held_out) if held_out else ([], None)
        if len(distinct) >= FEWEST_HELD_OUT:
            logits, labels = self._logits(distinct)
            self.temperature = fit_temperature([each[which] for each in logits], labels[which])
        return {"temperature": self.temperature, "held_out": len(held_out)}

    @torch.inference_mode()
    def _measure(self, pairs: Sequence[Pair], unseen: NDArray[np.bool_]) -> dict[str, float]:
        if not pairs:
            return {}
        distinct, which = self._distinct(pairs)
        logits, labels = self._logits(distinct)
        scaled = [each / self.temperature for each in logits]
        rows = which.cpu().numpy()  # a tensor of one element would be taken for a number
        confidence, correct = (of_distinct[rows] for of_distinct in _predictions(scaled, labels))
        curve = of_probabilities(confidence, correct)
        metrics = {
            "new_loss": float(labels_loss(scaled, labels)[which].mean()),
            "accuracy": float(correct.mean()),
            "confidence": float(confidence.mean(dtype=np.float64)),
            "ece": curve.error,
            **curve.metrics(),
            "unseen": int(unseen.sum()),
        }
        if unseen.any():
            metrics["unseen_accuracy"] = float(correct[unseen].mean())
            metrics["unseen_ece"] = of_probabilities(confidence[unseen], correct[unseen]).error
        if self.settings.temperature_scaling:
            metrics["unscaled_ece"] = of_probabilities(_predictions(logits, labels)[0][rows], correct).error
        return metrics

    def _logits(self, pairs: Sequence[Pair]) -> tuple[list[Tensor], Tensor]:
        """Return the unscaled logits of each head, K tensors (B, size_k), and the labels (B, K) int64."""
        self.scm.eval()
        by_batch, all_labels = [], []
        for start in range(0, len(pairs), self.settings.minibatch):
            logits, labels = self._run(self._forward, pairs[start : start + self.settings.minibatch])
            by_batch.append(logits)
            all_labels.append(labels)
            self.done += 1
        return [torch.cat(of_head) for of_head in zip(*by_batch, strict=True)], torch.cat(all_labels)

    @torch.inference_mode()
    def _forward(self, pairs: Sequence[Pair]) -> tuple[list[Tensor], Tensor]:
        ids, lengths, labels = self._tensors(pairs)
        return self.scm(ids, lengths), labels

    def _distinct(self, pairs: Sequence[Pair]) -> tuple[list[Pair], Tensor]:
        """Return the distinct pairs, and the index of each pair among them, (B,) int64. Agents repeat themselves, so
        equal pairs are computed once."""
        first, which = distinct_pairs([ids for ids, _ in pairs], np.array([row for _, row in pairs]))
        return [pairs[row] for row in first], torch.from_numpy(which).to(self.device)

    def _tensors(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
        """Return (ids (B, T), lengths (B,), labels (B, K)), all int64, on the trainer's device."""
        ids, lengths = padded([ids for ids, _ in pairs], self.device)
        labels = torch.from_numpy(np.array([row for _, row in pairs], dtype=np.int64)).to(self.device)
        return ids, lengths, labels


def _predictions(logits: Sequence[Tensor], labels: Tensor) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the probability of the predicted labels of the heads that apply, float32 (B,) in [0, 1], and whether these
    labels are all right, bool (B,)."""
    confidence = torch.ones(len(labels), device=labels.device)
    correct = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    for head, head_logits in enumerate(logits):
        probability, predicted = head_logits.softmax(dim=-1).max(dim=-1)
        applies = labels[:, head] >= 0
        confidence *= torch.where(applies, probability, 1.0)
        correct &= ~applies | (predicted == labels[:, head])
    # Rounding can bring a float32 softmax above 1.
    return confidence.clamp(max=1.0).cpu().numpy(), correct.cpu().numpy()
