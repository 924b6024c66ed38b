"""Influence of the tokens of some answers: the published procedure and the pool's scorer, on a CPU and on CUDA.

    python -m benchmarks.gpu.scorer [--answers 8]

Answers of 100 to 300 random tokens of which every one counts; an SCM of the published size. The published procedure
makes a whole forward pass for each position (`benchmarks/published_scoring.py`). `apart` is the largest difference of
an influence from the published procedure's on one CPU thread in float32.
"""

from __future__ import annotations

import os
from typing import Any

from benchmarks.gpu.card import arguments, finish, print_table, seconds

VOCABULARY = 32_000
BATCH_TOKENS = (1_536, 16_384, 100_000, 400_000)


class OnDevice:
    """An SCM elsewhere, asked by the published procedure, whose tensors are the CPU's."""

    def __init__(self, scm: Any, device: str) -> None:
        self.scm, self.device = scm, device

    def eval(self) -> OnDevice:
        self.scm.eval()
        return self

    def action_log_probability(self, *values: Any) -> Any:
        return self.scm.action_log_probability(*(value.to(self.device) for value in values)).cpu()


def main() -> None:
    settings = arguments(__doc__, answers=8)
    device = settings.device
    import numpy as np
    import torch

    from benchmarks.published_scoring import Published
    from scoring.effects.estimators import make_estimator
    from scoring.effects.tokens import TokenFacts
    from scoring.scm.encoder import in_precision
    from scoring.scm.model import StructuralCausalModel
    from scoring.scm.shape import ScmSizes
    from scoring.settings import ScmSettings, ScoringSettings

    torch.manual_seed(0)
    sizes = ScmSizes(vocab_size=VOCABULARY, head_sizes=(7,))
    weights = StructuralCausalModel(ScmSettings(), sizes).state_dict()

    def scm(place: str, precision: str = "float32") -> StructuralCausalModel:
        made = StructuralCausalModel(ScmSettings(), sizes)
        made.load_state_dict(weights)
        return in_precision(made.to(place), precision)

    rng = np.random.default_rng(0)
    lengths = rng.integers(100, 301, settings.answers)
    ids = [rng.integers(5, VOCABULARY, int(length)).astype(np.int32) for length in lengths]
    labels = rng.integers(0, 7, (settings.answers, 1)).astype(np.int32)
    facts = TokenFacts(vocab_size=VOCABULARY, countable_by_id=np.ones(VOCABULARY, bool), null_id=0)
    rows: list[dict[str, Any]] = []
    reference: list[Any] = []

    def add(name: str, place: str, score: Any) -> None:
        score(1)
        values: list[Any] = []
        spent = seconds(place, lambda: values.extend(score(settings.answers)))
        if not reference:
            reference.extend(values)
        apart = max(float(np.abs(one - other).max()) for one, other in zip(values, reference, strict=True))
        rows.append({"way": name, "seconds": spent, "tokens_per_s": sum(lengths) / spent, "apart": apart})

    def published(place: str) -> Any:
        of_call = Published(scm("cpu") if place == "cpu" else OnDevice(scm(place), place), facts, 4, "call")  # type: ignore[arg-type]
        return lambda count: of_call.score(ids[:count], labels[:count])[0]

    def pools(place: str, precision: str, tokens: int) -> Any:
        scorer = make_estimator(
            "scm",
            facts,
            ScoringSettings(window=4, batch_tokens=tokens, longest_exact=1024, precision=precision),
            scm=scm(place, precision),
        )
        return lambda count: [
            scorer.score(one, action).values for one, action in zip(ids[:count], labels[:count], strict=True)
        ]

    cores = len(os.sched_getaffinity(0))
    for threads in sorted({1, cores}):
        torch.set_num_threads(threads)
        add(f"published, CPU, {threads} threads", "cpu", published("cpu"))
        add(f"pool's scorer, CPU, {threads} threads, 1,536 tokens", "cpu", pools("cpu", "float32", 1_536))
    if device == "cuda":
        torch.set_num_threads(1)
        add("published, CUDA", "cuda", published("cuda"))
        for precision in ("float32", "bfloat16"):
            for tokens in BATCH_TOKENS:
                add(f"pool's scorer, CUDA, {precision}, {tokens:,} tokens", "cuda", pools("cuda", precision, tokens))
    for row in rows:
        row["times_published_on_one_thread"] = rows[0]["seconds"] / row["seconds"]
    print_table("scoring", rows)
    finish("scorer", settings, {"answers": settings.answers, "tokens": int(sum(lengths)), "ways": rows})


if __name__ == "__main__":
    main()
