"""Estimators of influence, behind one interface: how much each token decided the action.

    scm         the published one: change of the SCM's probability of the action, with each window nulled
    parser      exact: the window is nulled in the text, and the text is parsed again; no model
    scm+parser  the parser where the text still parses, to the same action or to another; the SCM where it does not
    gradient    one backward pass through the SCM instead of n forward passes; an approximation
    uniform     1 for every token: naive soft RL

All but `uniform` compute effects at the positions that can count, and influence from these effects in the same way
(`scoring.effects.effects`). A score depends on its utterance, its action and the SCM's version, and on nothing else.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from scoring.effects.effects import influence_of, positions_that_change
from scoring.effects.parser_effects import Outcome, ParserInterventions
from scoring.effects.tokens import TokenFacts
from scoring.scm.encoder import CounterfactualEncoder
from scoring.scm.model import StructuralCausalModel, labels_log_probability
from scoring.settings import EstimatorName, ScoringSettings

T = TypeVar("T")

ESTIMATORS: tuple[str, ...] = get_args(EstimatorName)
WITHOUT_SCM = frozenset({"parser", "uniform"})
"""Estimators whose scores hold for every version of the SCM."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Influence of one utterance.

    values: B, float32 (n,), in [0, 1]. counterfactuals: number of windows that were nulled and evaluated.
    approximated: whether the utterance was too long for `scm`, so that `gradient` replaced it.
    """

    values: NDArray[np.float32]
    counterfactuals: int = 0
    approximated: bool = False


class Estimator(ABC):
    """Scores one utterance at a time."""

    @abstractmethod
    def score(self, ids: NDArray[np.integer], labels: NDArray[np.integer]) -> Scored:
        """Score an utterance, ids (n,) with n >= 0, against the action it led to, labels (K,)."""


class UniformEstimator(Estimator):
    """Every token has full influence, whether the utterance parsed or not."""

    def score(self, ids: NDArray[np.integer], labels: NDArray[np.integer]) -> Scored:
        return Scored(values=np.ones(len(ids), dtype=np.float32))


class EffectEstimator(Estimator):
    """Influence from an effect at every position that can count.

    tokens: facts of the tokenizer. settings: `window`, and what else an estimator reads of them.
    """

    def __init__(self, tokens: TokenFacts, settings: ScoringSettings) -> None:
        self._tokens = tokens
        self._window = settings.window

    def score(self, ids: NDArray[np.integer], labels: NDArray[np.integer]) -> Scored:
        countable = self._tokens.countable_by_id[ids]
        positions = positions_that_change(ids, countable, self._window, self._tokens.null_id)
        if not (labels >= 0).any():
            positions = positions[:0]
        if not len(positions):
            return Scored(values=influence_of(len(ids), positions, np.empty(0)))
        effects, approximated = self.effects(ids, positions, labels)
        return Scored(
            values=influence_of(len(ids), positions, effects),
            counterfactuals=0 if approximated else len(positions),
            approximated=approximated,
        )

    @abstractmethod
    def effects(
        self, ids: NDArray[np.integer], positions: NDArray[np.integer], labels: NDArray[np.integer]
    ) -> tuple[NDArray[np.float64], bool]:
        """Return the effects (m,) >= 0 at the positions (m,), m >= 1, and whether they are approximations."""


class GradientEstimator(EffectEstimator):
    """To first order, a window's effect is the gradient of log p(a | y) by the embeddings it changes, times the change.

    The gradient of p differs from that of log p by a factor, which does not matter: influence is relative.
    """

    def __init__(self, tokens: TokenFacts, settings: ScoringSettings, scm: StructuralCausalModel) -> None:
        super().__init__(tokens, settings)
        self._scm = scm

    def effects(
        self, ids: NDArray[np.integer], positions: NDArray[np.integer], labels: NDArray[np.integer]
    ) -> tuple[NDArray[np.float64], bool]:
        scm = self._scm
        device = scm.token_embedding.weight.device
        with torch.enable_grad():
            tokens = torch.from_numpy(ids.astype(np.int64)).to(device)
            embedded = scm.embed(tokens).detach().requires_grad_()
            logits = scm.read(embedded[None])
            wanted = torch.from_numpy(labels.astype(np.int64)).to(device)[None]
            (gradient,) = torch.autograd.grad(labels_log_probability(logits, wanted).sum(), embedded)
        with torch.no_grad():
            change = scm.token_embedding.weight[self._tokens.null_id] - scm.token_embedding(tokens)
            by_token = (gradient * change).sum(dim=1).to("cpu", torch.float64).numpy()
        until = np.concatenate([[0.0], np.cumsum(by_token)])
        ends = np.minimum(positions + self._window, len(ids))
        return np.abs(until[ends] - until[positions]), False


class ScmEstimator(EffectEstimator):
    """The published one. The cost of an utterance grows with the cube of its length, so `GradientEstimator` scores
    those of more than `longest_exact` tokens."""

    def __init__(self, tokens: TokenFacts, settings: ScoringSettings, scm: StructuralCausalModel) -> None:
        super().__init__(tokens, settings)
        self._encoder = CounterfactualEncoder(
            scm, window=settings.window, null_id=tokens.null_id, batch_tokens=settings.pass_tokens
        )
        self._gradient = GradientEstimator(tokens, settings, scm)
        self._longest = settings.longest_exact

    def effects(
        self, ids: NDArray[np.integer], positions: NDArray[np.integer], labels: NDArray[np.integer]
    ) -> tuple[NDArray[np.float64], bool]:
        if len(ids) > self._longest:
            return self._gradient.effects(ids, positions, labels)[0], True
        minus_one = self._encoder.probabilities_minus_one(ids, positions, labels)
        return np.abs(minus_one[1:] - minus_one[0]), False


class ParserEstimator(EffectEstimator):
    """Exact: 1 where the text without the window is another action or none, 0 where it is the same action."""

    def __init__(self, tokens: TokenFacts, settings: ScoringSettings, interventions: ParserInterventions) -> None:
        super().__init__(tokens, settings)
        self._interventions = interventions

    def effects(
        self, ids: NDArray[np.integer], positions: NDArray[np.integer], labels: NDArray[np.integer]
    ) -> tuple[NDArray[np.float64], bool]:
        return (self._interventions.outcomes(ids, positions) != Outcome.SAME).astype(np.float64), False


class ScmParserEstimator(EffectEstimator):
    """The parser where the text without the window parses: 0 for the same action, 1 for another one. Where it does not
    parse, no action can be compared, and the effect is the SCM's."""

    def __init__(
        self, tokens: TokenFacts, settings: ScoringSettings, interventions: ParserInterventions, scm: ScmEstimator
    ) -> None:
        super().__init__(tokens, settings)
        self._interventions = interventions
        self._scm = scm

    def effects(
        self, ids: NDArray[np.integer], positions: NDArray[np.integer], labels: NDArray[np.integer]
    ) -> tuple[NDArray[np.float64], bool]:
        outcomes = self._interventions.outcomes(ids, positions)
        effects = (outcomes == Outcome.OTHER).astype(np.float64)
        unparsed = outcomes == Outcome.NONE
        approximated = False
        if unparsed.any():
            effects[unparsed], approximated = self._scm.effects(ids, positions[unparsed], labels)
        return effects, approximated


def make_estimator(
    name: str,
    tokens: TokenFacts,
    settings: ScoringSettings,
    *,
    scm: StructuralCausalModel | None = None,
    interventions: ParserInterventions | None = None,
) -> Estimator:
    """Make the estimator `name`, which may be another one than `settings.estimator`.

    settings: `window`, `pass_tokens` and `longest_exact` are read.
    scm: for all but `parser` and `uniform`; in evaluation mode. interventions: for `parser` and `scm+parser`.
    Raises ValueError for an unknown name and where what the estimator needs is missing.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"there is no estimator {name!r}: choose one of {', '.join(ESTIMATORS)}")
    if name == "uniform":
        return UniformEstimator()
    if name == "parser":
        return ParserEstimator(tokens, settings, _given(interventions, name, "the environment's parser"))
    scm = _given(scm, name, "a structural causal model")
    if name == "gradient":
        return GradientEstimator(tokens, settings, scm)
    exact = ScmEstimator(tokens, settings, scm)
    if name == "scm":
        return exact
    return ScmParserEstimator(tokens, settings, _given(interventions, name, "the environment's parser"), exact)


def _given(value: T | None, name: str, what: str) -> T:
    if value is None:
        raise ValueError(f"the estimator {name!r} needs {what}")
    return value
