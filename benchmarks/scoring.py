"""Speed of the scoring pool and of the published procedure on the same weights and utterances, and their agreement.

    coso warmstart configs/numberline.yaml && coso train configs/numberline.yaml training.updates=12
    python -m benchmarks.scoring runs/numberline [--out benchmarks/results/scoring.json]

The published procedure, written directly, scores every call from scratch, at all positions, with whole forward passes
of the SCM over padded batches of 64 positions. Two readings of "padded" are measured. As published, every row is padded
to the call's longest utterance; the more favourable one pads the 64 rows of a batch to the longest of them. Both run in
this process, on one thread and on two, in evaluation mode without gradients, where torch uses its fused encoder layer.
The pool is the real one, with its processes and scorers of one thread each: one worker is compared with one thread, two
workers with two threads.

Utterances of 40 to 200 (and 1,000) tokens are the run's own answers, joined and cut, so the share of tokens that cannot
count is realistic. "every token counts" removes this advantage. The stream is what the learner of the recorded run
trained on, in the calls of the published code: every minibatch of every epoch.
The results hold wall and CPU seconds; on a shared machine, CPU seconds are the better measure.
Takes about eight minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from benchmarks.machine import machine_scaling, matmul_peak, timed
from benchmarks.published_scoring import POSITIONS_AT_ONCE, Ids, Published
from benchmarks.record import record
from scoring.effects.estimators import make_estimator
from scoring.effects.tokens import TokenFacts, token_facts
from scoring.pool.scoring_pool import ScoringContext, ScoringPool
from scoring.scm.encoder import in_precision
from scoring.scm.model import StructuralCausalModel
from scoring.scm.shape import ScmSizes
from scoring.scm.training import ScmTrainer
from scoring.settings import ScmEncoderSettings, ScmSettings, ScoringSettings

CALL = 64
LENGTHS = (40, 200)
DISTINCT = 24
#: Repetitions of each measurement; the best one counts.
REPEATS = 5
PUBLISHED_REPEATS = 2
#: No utterance here is scored by gradient, and a task may take long.
SETTINGS = ScoringSettings(precision="float32", longest_exact=1536, deadline_s=900.0)
#: Positions at which the published procedure is timed on an utterance of 1,000 tokens; the rest is extrapolated.
SAMPLED_POSITIONS = 128


def scoring_copy(trainer: ScmTrainer) -> StructuralCausalModel:
    """The trainer's SCM as in the pool's scorers, in float32; the published procedure uses the same."""
    return in_precision(copy.deepcopy(trainer.scm), "float32")


def fast_effects(scm: StructuralCausalModel, tokens: TokenFacts, ids: NDArray, labels: NDArray) -> NDArray[np.float64]:
    """The pool's effects of an utterance before normalisation; 0 for tokens that are not evaluated."""
    from scoring.effects.effects import positions_that_change
    from scoring.scm.encoder import CounterfactualEncoder

    encoder = CounterfactualEncoder(
        scm, window=SETTINGS.window, null_id=tokens.null_id, batch_tokens=SETTINGS.pass_tokens
    )
    positions = positions_that_change(ids, tokens.countable_by_id[ids], SETTINGS.window, tokens.null_id)
    minus_one = encoder.probabilities_minus_one(ids, positions, labels)
    effects = np.zeros(len(ids))
    effects[positions] = np.abs(minus_one[1:] - minus_one[0])
    return effects


def cpu_seconds(pool: ScoringPool) -> float:
    """CPU time of all scorers so far, seconds."""
    times = [psutil.Process(int(worker["pid"])).cpu_times() for worker in pool.check()]
    return sum(each.user + each.system for each in times)


def flops(shape: ScmEncoderSettings, length: int, rows: int) -> float:
    """Operations of the matrix products of `rows` whole forward passes of one utterance of that length."""
    d = shape.hidden
    per_token = shape.layers * (8 * d * d + 4 * d * shape.feedforward + 4 * length * d)
    return float(rows) * length * per_token


@contextmanager
def started_pool(trainer: ScmTrainer, tokens: TokenFacts, workers: int) -> Iterator[ScoringPool]:
    """A pool in float32 with the trainer's weights."""
    settings = SETTINGS.model_copy(update={"workers": workers, "scm": trainer.settings})
    context = ScoringContext(
        tokens=tokens, head_sizes=trainer.scm.sizes.head_sizes, seed=0, actor_cpus=0.5, max_failures=3
    )
    pool = ScoringPool(settings, context)
    pool.start()
    try:
        pool.load(*trainer.state_dict())
        yield pool
    finally:
        pool.close()


def fresh(pool: ScoringPool) -> None:
    """Load the same weights into the pool again, which empties its cache and makes its scorers fetch the weights."""
    pool.load(*pool.state())
    warm_up = [np.arange(5, 5 + 8, dtype=np.int32)] * 1
    pool.score(warm_up, np.zeros((1, len(pool.sizes.head_sizes)), np.int32))


def joined_answers(answers: Ids, lengths: Sequence[int], seed: int) -> Ids:
    """Utterances of these lengths: random answers joined, starting at a random token."""
    draw = np.random.default_rng(seed)
    made = []
    for length in lengths:
        pieces: list[NDArray[np.int32]] = []
        while sum(map(len, pieces)) < length + 60:
            pieces.append(answers[int(draw.integers(len(answers)))])
        start = int(draw.integers(40))
        made.append(np.concatenate(pieces)[start : start + length].astype(np.int32))
    return made


def agreement(
    found: Ids, expected: Ids, expected_effects: Sequence[NDArray], effects: Sequence[NDArray]
) -> dict[str, float]:
    difference = np.concatenate([np.abs(a - b) for a, b in zip(found, expected, strict=True)])
    of_effects = np.concatenate([np.abs(a - b) for a, b in zip(effects, expected_effects, strict=True)])
    return {
        "effects_max_difference": float(of_effects.max()),
        "influence_max_difference": float(difference.max()),
        "influence_share_within_1e-5": float((difference < 1e-5).mean()),
    }


def distinct_case(
    trainer: ScmTrainer, tokens: TokenFacts, utterances: Ids, labels: NDArray[np.int32], peak: float
) -> dict[str, Any]:
    """Distinct utterances: time of both readings of the published procedure and of the pool with one and two workers,
    and their agreement."""
    scm = scoring_copy(trainer)
    shape = scm.settings
    work = sum(flops(shape, len(ids), len(ids) + 1) for ids in utterances)
    countable = float(np.mean([tokens.countable_by_id[ids].mean() for ids in utterances]))
    case: dict[str, Any] = {"utterances": len(utterances), "tokens": sum(map(len, utterances)), "countable": countable}
    results: dict[str, Any] = {}
    published = {pad: Published(scm, tokens, SETTINGS.window, pad) for pad in ("call", "batch")}
    wall: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    with started_pool(trainer, tokens, 1) as one, started_pool(trainer, tokens, 2) as two:
        # In turn, and the best of each: on a machine that others use too, that is nearest to the machine's own time.
        for repeat in range(REPEATS):
            for (pad, procedure), threads in product(published.items(), (1, 2)):
                if repeat < PUBLISHED_REPEATS:
                    name = f"published_padded_by_{pad}" + ("_2_threads" if threads == 2 else "")
                    torch.set_num_threads(threads)
                    begun = time.process_time()
                    seconds, results[pad] = timed(lambda procedure=procedure: procedure.score(utterances, labels))
                    wall.setdefault(name, []).append(seconds)
                    cpu.setdefault(name, []).append(time.process_time() - begun)
            torch.set_num_threads(1)
            for pool, name in ((one, "pool_1_worker"), (two, "pool_2_workers")):
                fresh(pool)
                used = cpu_seconds(pool)
                seconds, (values, statistics) = timed(lambda pool=pool: pool.score(utterances, labels))
                wall.setdefault(name, []).append(seconds)
                cpu.setdefault(name, []).append(cpu_seconds(pool) - used)
            print("  seconds:", {name: round(found[-1], 2) for name, found in wall.items()}, flush=True)
    best = {name: min(found) for name, found in wall.items()}
    best_cpu = {name: min(found) for name, found in cpu.items()}
    done = sum(flops(shape, len(ids), 1 + int(tokens.countable_by_id[ids].sum())) for ids in utterances)
    evaluated = statistics["counterfactuals"] + len(utterances)
    case["evaluated_of_all"] = evaluated / sum(len(ids) + 1 for ids in utterances)
    case["wall_seconds"], case["cpu_seconds"] = wall, cpu
    case["share_of_peak_by_cpu_seconds"] = {
        name: (done if name.startswith("pool") else work) / seconds / peak for name, seconds in best_cpu.items()
    }
    for kind, of_kind in (("wall", best), ("cpu", best_cpu)):
        case[f"speedup_by_{kind}_seconds"] = {
            pad: of_kind[f"published_padded_by_{pad}"] / of_kind["pool_1_worker"] for pad in ("call", "batch")
        }
    case["speedup_on_2_cores_by_wall_seconds"] = {
        pad: best[f"published_padded_by_{pad}_2_threads"] / best["pool_2_workers"] for pad in ("call", "batch")
    }
    case["scaling_1_to_2_workers"] = {
        "by_wall_seconds": best["pool_1_worker"] / best["pool_2_workers"],
        "by_cpu_seconds_of_all_scorers": 2 * best_cpu["pool_1_worker"] / best_cpu["pool_2_workers"],
    }
    case["float32"] = agreement(
        values,
        *results["call"],
        [fast_effects(scm, tokens, ids, row) for ids, row in zip(utterances, labels, strict=True)],
    )
    return case


def precision_case(
    trainer: ScmTrainer, tokens: TokenFacts, utterances: Ids, labels: NDArray[np.int32]
) -> dict[str, Any]:
    """Both procedures in float32 and float64 against the published one in float64, and what else a score depends on."""
    double = ScmTrainer(trainer.settings, trainer.scm.sizes)
    double.scm.load_state_dict(trainer.scm.state_dict())
    exact, exact_effects = Published(double.scm.double(), tokens, SETTINGS.window, "call").score(utterances, labels)
    result: dict[str, Any] = {}
    for name, scm in (("float32", scoring_copy(trainer)), ("float64", double.scm.eval())):
        estimator = make_estimator("scm", tokens, SETTINGS, scm=scm)
        values = [estimator.score(ids, row).values for ids, row in zip(utterances, labels, strict=True)]
        effects = [fast_effects(scm, tokens, ids, row) for ids, row in zip(utterances, labels, strict=True)]
        result[f"pool_{name}_against_published_float64"] = agreement(values, exact, exact_effects, effects)
        if name == "float32":
            published, published_effects = Published(scm, tokens, SETTINGS.window, "call").score(utterances, labels)
            result["published_float32_against_published_float64"] = agreement(
                published, exact, exact_effects, published_effects
            )
            alone = Published(scm, tokens, SETTINGS.window, "call")
            shifted = [alone.score([ids], labels[i : i + 1])[0][0] for i, ids in enumerate(utterances)]
            company = np.concatenate([np.abs(a - b) for a, b in zip(shifted, published, strict=True)]).max()
            result["published_float32_alone_or_in_company"] = float(company)
            order = np.random.default_rng(0).permutation(len(utterances))
            again = {int(i): estimator.score(utterances[i], labels[i]).values for i in order}
            result["pool_float32_shuffled"] = float(max(np.abs(again[i] - values[i]).max() for i in again))
            other = make_estimator("scm", tokens, SETTINGS.model_copy(update={"batch_tokens": 4096}), scm=scm)
            result["pool_float32_batch_tokens_4096"] = float(
                max(
                    np.abs(other.score(ids, row).values - value).max()
                    for ids, row, value in zip(utterances, labels, values, strict=True)
                )
            )
    gradient = make_estimator("gradient", tokens, SETTINGS, scm=trainer.scm)
    from scoring.fidelity import agreement as ranks_agreement

    result["gradient_against_scm"] = ranks_agreement(
        [gradient.score(ids, row).values for ids, row in zip(utterances, labels, strict=True)],
        exact,
        [tokens.countable_by_id[ids] for ids in utterances],
    )
    return result


def long_case(
    trainer: ScmTrainer, tokens: TokenFacts, ids: NDArray[np.int32], labels: NDArray[np.int32], peak: float
) -> dict[str, Any]:
    """One utterance of 1,000 tokens; the published procedure is timed on some of its positions."""
    scm = scoring_copy(trainer)
    rows = np.tile(ids.astype(np.int64), (SAMPLED_POSITIONS, 1))
    for row in range(SAMPLED_POSITIONS):
        rows[row, row : row + SETTINGS.window] = tokens.null_id
    wanted = torch.from_numpy(np.tile(labels.astype(np.int64), (POSITIONS_AT_ONCE, 1)))
    lengths = torch.full((POSITIONS_AT_ONCE,), len(ids))

    @torch.no_grad()
    def published() -> NDArray[np.float64]:
        parts = torch.from_numpy(rows).split(POSITIONS_AT_ONCE)
        return np.concatenate(
            [torch.expm1(scm.action_log_probability(part, lengths, wanted)).double().numpy() for part in parts]
        )

    seconds, expected = timed(published)
    whole = seconds / SAMPLED_POSITIONS * (len(ids) + 1)
    estimator = make_estimator("scm", tokens, SETTINGS, scm=scm)
    fast_seconds, scored = timed(lambda: estimator.score(ids, labels))
    effects = fast_effects(scm, tokens, ids, labels)[:SAMPLED_POSITIONS]
    with torch.no_grad():
        whole_row = torch.from_numpy(ids[None].astype(np.int64))
        factual = float(torch.expm1(scm.action_log_probability(whole_row, lengths[:1], wanted[:1])))
    counts = tokens.countable_by_id[ids[:SAMPLED_POSITIONS]]
    print(f"  1,000 tokens: published {whole:.0f} s, pool {fast_seconds:.1f} s", flush=True)
    return {
        "tokens": len(ids),
        "published_seconds_from_sampled_positions": whole,
        "pool_seconds": fast_seconds,
        "speedup": whole / fast_seconds,
        "share_of_peak": flops(scm.settings, len(ids), scored.counterfactuals + 1) / fast_seconds / peak,
        "effects_max_difference_on_sampled": float(np.abs(np.abs(expected - factual) - effects)[counts].max()),
    }


def stream_case(
    trainer: ScmTrainer, tokens: TokenFacts, updates: Sequence[tuple[Ids, NDArray[np.int32]]], epochs: int
) -> dict[str, Any]:
    """The recorded stream in the calls of the published code: for each update, the minibatches of every epoch."""
    draw = np.random.default_rng(0)
    calls: list[list[tuple[Ids, NDArray[np.int32]]]] = []
    for utterances, labels in updates:
        calls.append([])
        for _ in range(epochs):
            order = draw.permutation(len(utterances))
            for start in range(0, len(order), CALL):
                rows = order[start : start + CALL]
                calls[-1].append(([utterances[row] for row in rows], labels[rows]))
    published = Published(scoring_copy(trainer), tokens, SETTINGS.window, "call")
    seconds, expected = timed(lambda: [published.score(*call)[0] for of_update in calls for call in of_update])
    print(f"  published on the stream: {seconds:.1f} s", flush=True)
    result: dict[str, Any] = {
        "updates": len(updates),
        "utterances": sum(len(utterances) for utterances, _ in updates),
        "distinct": sum(len({ids.tobytes() for ids in utterances}) for utterances, _ in updates),
        "epochs": epochs,
        "published_seconds": seconds,
        "published_seconds_one_epoch": seconds / epochs,
    }
    with started_pool(trainer, tokens, 1) as pool:
        found, pool_seconds = [], 0.0
        for of_update in calls:  # each update has a new SCM, so nothing is cached from the previous one
            fresh(pool)
            passed, values = timed(lambda of_update=of_update: [pool.score(*call)[0] for call in of_update])
            pool_seconds += passed
            found += values
        once = 0.0
        for utterances, labels in updates:
            fresh(pool)
            once += timed(lambda u=utterances, y=labels: pool.score(u, y))[0]
    difference = max(
        np.abs(a - b).max() for f, e in zip(found, expected, strict=True) for a, b in zip(f, e, strict=True)
    )
    print(f"  pool on the stream: {pool_seconds:.2f} s; each update once: {once:.2f} s", flush=True)
    return result | {
        "pool_seconds_same_calls": pool_seconds,
        "pool_seconds_one_call_an_update": once,
        "speedup_same_calls": seconds / pool_seconds,
        "speedup_as_the_loop_calls_it": seconds / once,
        "speedup_without_repeated_epochs": seconds / epochs / once,
        "influence_max_difference": float(difference),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with recorded trajectories")
    parser.add_argument("--stream-updates", type=int, default=1, help="number of updates of the stream to replay")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scoring.json"))
    arguments = parser.parse_args()

    import ray

    from actors.chat import ChatProcessor
    from actors.trajectory import TrajectoryLog
    from cluster.config.files import load_config
    from cluster.report.page import latest_model

    torch.set_num_threads(1)
    config = load_config([arguments.run / "config.yaml"])
    chat = ChatProcessor(latest_model(arguments.run, config.model_dump()) or "")
    tokens = token_facts(chat.tokenizer)
    log = TrajectoryLog(arguments.run / "trajectories")
    batches = [log.read(update) for update in log.updates()]
    updates = [(b.ragged("response_ids", np.int32), np.stack(b.ragged("action_labels", np.int32))) for b in batches]
    answers = [ids for utterances, _ in updates for ids in utterances]
    actions = np.concatenate([labels for _, labels in updates])

    sizes = ScmSizes(vocab_size=tokens.vocab_size, head_sizes=(int(actions.max()) + 1,))
    trainer = ScmTrainer(ScmSettings(learning_rate=1e-4, round_utterances=512), sizes)
    print("training an SCM of the published shape on the recorded answers", flush=True)
    trainer.train(answers, actions, rounds=8)
    report = trainer.train(answers[:200], actions[:200], rounds=0)
    peak = matmul_peak()
    draw = np.random.default_rng(1)
    lengths = draw.integers(LENGTHS[0], LENGTHS[1] + 1, DISTINCT).tolist()
    utterances = joined_answers(answers, lengths, seed=2)
    labels = draw.integers(0, sizes.head_sizes[0], (DISTINCT, 1)).astype(np.int32)
    all_count = replace(tokens, countable_by_id=np.ones(tokens.vocab_size, bool))
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, object_store_memory=200 * 2**20, logging_level="error"
    )
    shape = {"shape": "published (128 wide, 3 layers)", "window": SETTINGS.window}
    result: dict[str, Any] = {
        "scm": shape | {"accuracy": report.metrics["accuracy"]},
        "matmul_peak_gflops_one_thread": peak / 1e9,
        "matmul_scaling_1_to_2_processes": machine_scaling(),
    }
    print("distinct utterances", flush=True)
    result["distinct"] = distinct_case(trainer, tokens, utterances, labels, peak)
    print("distinct utterances, every token counts", flush=True)
    result["distinct_every_token_counts"] = distinct_case(trainer, all_count, utterances[:8], labels[:8], peak)
    print("the recorded stream", flush=True)
    some = updates[: arguments.stream_updates]
    result["stream"] = stream_case(trainer, tokens, some, config.algorithm.epochs)
    print("precision", flush=True)
    result["precision"] = precision_case(trainer, tokens, utterances[:8], labels[:8])
    print("an utterance of 1,000 tokens", flush=True)
    (long,) = joined_answers(answers, [1000], seed=3)
    result["thousand_tokens"] = long_case(trainer, tokens, long, labels[0], peak)
    ray.shutdown()
    print(json.dumps(record(arguments.out, result), indent=1))


if __name__ == "__main__":
    main()
