"""Influence without a pool: one call, in this process. `scoring.influence` is the function to use.

import scoring
chat = ChatProcessor("runs/numberline/checkpoints/step_24/learner/model")
parser = gymnasium.make("coso/NumberLine-v0").unwrapped.parser
settings = scoring.ScoringSettings(estimator="parser")
values = scoring.influence(texts, labels, settings, tokenizer=chat.tokenizer, parser=parser)

scm = scoring.load_scm("runs/numberline/checkpoints/step_24")
values = scoring.influence(texts, labels, tokenizer=chat.tokenizer, scm=scm)
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.parsing import Parser
from scoring.effects.estimators import make_estimator
from scoring.effects.parser_effects import ParserInterventions, ParserSource
from scoring.effects.tokens import token_facts
from scoring.scm.encoder import in_precision
from scoring.scm.model import StructuralCausalModel
from scoring.scm.shape import read_shape
from scoring.settings import ScoringSettings
from scoring.utterances import check_utterances, distinct_pairs


def influence(
    utterances: Sequence[str] | Sequence[NDArray[np.integer]],
    actions: NDArray[np.integer] | Sequence[Any],
    settings: ScoringSettings | None = None,
    *,
    tokenizer: Any,
    scm: StructuralCausalModel | None = None,
    parser: Parser | None = None,
) -> list[NDArray[np.float32]]:
    """Return the influence of every token on the action its utterance led to: B float32 arrays (n_b,), in [0, 1].

    utterances: B texts, or B integer arrays of token ids (n_b,). Ids are better: several token sequences have the same
        text, and the tokenizer knows only one of them.
    actions: integer labels (B, K), -1 where a head does not apply; or B parsed actions, as `env.parse` gives them.
    settings: `estimator`, `window`, `null_token`, `batch_tokens` and `longest_exact` are read (see docs/config.md);
        the defaults where not given.
    tokenizer: a Hugging Face tokenizer, the policy's.
    scm: for all estimators but `parser` and `uniform`; it scores in its own precision, on its own device.
    parser: `env.parser`, for `parser` and `scm+parser`.
    Raises ValueError where the estimator needs something that is missing, and where ids or labels do not fit the SCM.
    """
    settings = settings or ScoringSettings()
    if not len(utterances):
        return []
    labels = np.array([getattr(action, "labels", action) for action in actions], dtype=np.int32)
    if labels.ndim != 2 or len(labels) != len(utterances):
        raise ValueError(f"give one row of labels per utterance: {len(utterances)} utterances, labels {labels.shape}")
    ids = [
        np.asarray(tokenizer(each, add_special_tokens=False)["input_ids"] if isinstance(each, str) else each, np.int32)
        for each in utterances
    ]
    tokens = token_facts(tokenizer, None if scm is None else scm.sizes.vocab_size, settings.null_token)
    heads = None if scm is None else scm.sizes.head_sizes
    check_utterances(ids, labels, vocab_size=tokens.vocab_size, head_sizes=heads)
    interventions = None
    if parser is not None:
        source = ParserSource(tokenizer=tokenizer, parser=parser)
        interventions = ParserInterventions(source, window=settings.window, null_id=tokens.null_id)
    scorer = make_estimator(
        settings.estimator,
        tokens,
        settings,
        scm=None if scm is None else scm.eval(),
        interventions=interventions,
    )
    first, which = distinct_pairs(ids, labels)
    scores = [scorer.score(ids[row], labels[row]).values for row in first]
    return [scores[pair].copy() for pair in which]


def load_scm(checkpoint: str | Path, settings: ScoringSettings | None = None) -> StructuralCausalModel:
    """Return the SCM of a run's checkpoint, `RUN/checkpoints/step_N`, in evaluation mode.

    settings: `precision` is read; the default where not given.
    Raises FileNotFoundError where the folder holds no SCM, ValueError where other code saved it in another form.
    """
    from safetensors.torch import load_file

    folder = Path(checkpoint)
    facts = json.loads((folder / "scm.json").read_text(encoding="utf-8"))
    scm = StructuralCausalModel(*read_shape(facts["settings"]))
    tensors = load_file(folder / "scm.safetensors")
    scm.load_state_dict(
        {name.removeprefix("scm."): value for name, value in tensors.items() if name.startswith("scm.")}
    )
    return in_precision(scm, (settings or ScoringSettings()).precision)
