"""An update of the learner against a bare loop, and the memory of log-probabilities and entropy at a large vocabulary.

    python -m benchmarks.learner MODEL [--steps 192] [--repeats 15] [--out benchmarks/results/learner.json]

MODEL is the folder that `coso warmstart configs/numberline.yaml` wrote. In one process, with one number of threads, two
learners take turns to make the same update: `LearnerRank.update`, and Hugging Face's model in a loop of plain torch
over tensors that were built beforehand, with the same minibatches, micro-batches and loss. Both must end at the same
weights, else the benchmark fails. `times_as_fast` compares CPU time, which other programs on the machine disturb least.
Not counted on either side: the processor's work on pictures. Answers stay the same from update to update, so
the learner finds their action parts in its cache. The learner runs a prompt once for all steps of a micro-batch that
have it, so the update is measured twice: with the pictures that the environment showed, of which many come again, and
with a picture of its own for every step.

Memory: a process each makes log-probabilities and entropies of 512 tokens over 150,000 and differentiates them, by the
learner's head and by `log_softmax` of all logits. What counts is how far resident memory rises meanwhile.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lone_rank import started_alone
from benchmarks.machine import timed
from benchmarks.record import record

TOKENS, WIDTH, VOCABULARY, CHUNK = 512, 64, 150_000, 64
#: How far the weights of the two may lie apart after one update. Rounding alone: AdamW's ε is 1e-2.
WEIGHT_TOLERANCE = 1e-5


# --- speed


class BareLoop:
    """What a user would write by hand: `transformers`, a value head, AdamW and PPO's loss."""

    def __init__(self, rank: Any) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        from actors.chat import ChatProcessor
        from learner.algorithms.entropy import EntropyBonus
        from learner.algorithms.ppo import Ppo
        from learner.policy.batch import BatchBuilder

        self.setup = rank.setup
        learner = self.setup.learner
        self.vlm = AutoModelForImageTextToText.from_pretrained(self.setup.model.path, dtype=torch.float32).eval()
        self.head = copy.deepcopy(rank.model.value_head)
        options = {"lr": learner.learning_rate, "betas": learner.betas, "eps": learner.epsilon, "weight_decay": 0.0}
        self.optimizers = [
            torch.optim.AdamW(self.vlm.parameters(), **options),
            torch.optim.AdamW(
                self.head.parameters(), lr=learner.value_learning_rate or learner.learning_rate, weight_decay=0.0
            ),
        ]
        self.algorithm = Ppo(self.setup.algorithm, EntropyBonus(self.setup.entropy))
        chat = ChatProcessor(self.setup.model.path)
        self.banned, self.builder = chat.banned_token_ids, BatchBuilder(chat)

    def tensors(self, trajectories: Any, update_index: int) -> tuple[list, list]:
        """(whole batch, then minibatches of micro-batches): what `update` takes as given."""
        from learner.division import divide
        from learner.passes import FORWARD_ONLY_FACTOR
        from learner.plan import plan_update, step_lengths

        plan, lengths = plan_update(trajectories, self.setup, update_index, 1), step_lengths(trajectories)

        def built(rows: np.ndarray, factor: int = 1) -> list:
            parts = divide(rows, lengths, self.setup.learner.micro_batch * factor, plan.owners, 0)
            return [(part.indices, self.builder.build(trajectories, part.indices)) for part in parts]

        whole = built(np.arange(len(trajectories)), FORWARD_ONLY_FACTOR)
        return whole, [built(chosen) for chosen in plan.minibatches]

    def forward(self, batch: Any, with_entropy: bool) -> Any:
        import torch

        from learner.policy.model import PolicyOutput

        output = self.vlm(**batch.model_inputs, use_cache=False, output_hidden_states=True)
        rows = torch.arange(len(batch))
        values = self.head(output.hidden_states[-1].detach(), batch.prompt_lengths)
        width = batch.response_ids.shape[1]
        before = (batch.prompt_lengths[:, None] - 1 + torch.arange(width)).clamp(max=output.logits.shape[1] - 1)
        logits = output.logits[rows[:, None], before].float() / self.setup.temperature
        logits[..., self.banned] = -1e30
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, batch.response_ids[..., None])[..., 0]
        entropy = -(logprobs.exp() * logprobs).sum(-1) if with_entropy else torch.zeros_like(chosen)
        return PolicyOutput(chosen, entropy, values)

    def update(self, trajectories: Any, whole: list, minibatches: list) -> None:
        import torch

        from learner.algorithms.base import Evaluation
        from learner.policy.batch import target_columns

        count = len(trajectories)
        logprobs: list[Any] = [None] * count
        values = np.zeros(count, np.float32)
        with torch.no_grad():
            for indices, batch in whole:
                output = self.forward(batch, with_entropy=False)
                values[indices] = output.values.numpy()
                for index, row, length in zip(
                    indices, output.logprobs.numpy(), batch.response_lengths.tolist(), strict=True
                ):
                    logprobs[index] = row[:length]
        nothing = np.full(count, np.nan, np.float32)
        targets = self.algorithm.targets(
            trajectories, Evaluation(logprobs, values, final_values=nothing, trained=np.ones(count, bool))
        )
        for parts in minibatches:
            steps = sum(len(indices) for indices, _ in parts)
            for indices, batch in parts:
                batch.targets = target_columns(targets, indices, "cpu")
                losses, _ = self.algorithm.loss(self.forward(batch, with_entropy=True), batch)
                (torch.stack(list(losses.values())).sum() / steps).backward()
            for module, optimizer in zip((self.vlm, self.head), self.optimizers, strict=True):
                torch.nn.utils.clip_grad_norm_(module.parameters(), self.setup.learner.gradient_clip)
                optimizer.step()
                optimizer.zero_grad()


def sample(model: str, rank: Any, steps: int, distinct: bool) -> Any:
    """Demonstrations of the environment as if the model had just sampled them. distinct: no picture comes twice."""
    import pyarrow as pa

    from actors.chat import ChatProcessor
    from actors.images import decode_png, encode_png, image_hash
    from actors.trajectory import STEP_SCHEMA, TrajectoryBatch, TrajectoryLog

    chat = ChatProcessor(model)
    shown = TrajectoryLog(Path(model) / "demonstrations").read(0)
    rows = shown.steps.slice(0, steps).to_pylist()
    rows[-1]["terminated"] = True  # of the episode that is cut here
    images = {row["image"]: shown.images[row["image"]] for row in rows}
    if distinct:
        pictures = [np.array(decode_png(images[row["image"]])) for row in rows]
        for number, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
            picture[0, 0] = number % 256, number // 256, 0
            row["image"] = image_hash(picture)
        images = {image_hash(picture): encode_png(picture) for picture in pictures}
    ids = {
        key: chat.encode_prompt(rows[0]["prompt"], decode_png(png))["input_ids"][0].tolist()
        for key, png in images.items()
    }
    random = np.random.default_rng(0)
    for row in rows:
        row["prompt_ids"] = ids[row["image"]]
        row["policy_versions"] = [{"version": 0, "start": 0}]
        row["influence"] = random.random(len(row["response_ids"]), np.float32).tolist()
    batch = TrajectoryBatch.from_rows(rows, images)
    sampled = pa.array([array.tolist() for array in rank.token_logprobs(batch)], pa.list_(pa.float32()))
    position = STEP_SCHEMA.get_field_index("behaviour_logprobs")
    return TrajectoryBatch(batch.steps.set_column(position, STEP_SCHEMA.field("behaviour_logprobs"), sampled), images)


def started_rank(model: str) -> Any:
    """The learner of `configs/numberline.yaml`, alone in this process."""
    from cluster.config.files import load_config
    from learner.setup import LearnerSetup

    config = load_config(["configs/numberline.yaml"], [f"model.path={model}"])
    setup = LearnerSetup(
        model=config.model,
        learner=config.learner,
        algorithm=config.algorithm,
        entropy=config.entropy,
        temperature=config.rollout.temperature,
        total_updates=config.training.updates,
        max_policy_lag=config.max_policy_lag,
        seed=config.seed,
    )
    return started_alone(setup)


def largest_difference(rank: Any, bare: BareLoop) -> float:
    """Between the two learners' weights."""
    ours = [*rank.model.vlm.parameters(), *rank.model.value_head.parameters()]
    theirs = [*bare.vlm.parameters(), *bare.head.parameters()]
    return max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """(of CPU time of this process, of wall-clock time)."""
    before = time.process_time()
    wall, _ = timed(work)
    return time.process_time() - before, wall


def speed(model: str, steps: int, repeats: int, distinct: bool) -> dict[str, Any]:
    import torch

    rank = started_rank(model)
    trajectories = sample(model, rank, steps, distinct)
    bare = BareLoop(rank)
    whole, minibatches = bare.tensors(trajectories, 0)
    rank.update(trajectories, 0)
    bare.update(trajectories, whole, minibatches)
    apart = largest_difference(rank, bare)
    if apart > WEIGHT_TOLERANCE:
        raise SystemExit(f"the two learners' weights differ by {apart:.2g} after one update: they do not do the same")
    ours, theirs = [], []
    for repeat in range(repeats):
        index = 1 + repeat % 4  # not a multiple of entropy.gradient_every, whose updates do more than train
        whole, minibatches = bare.tensors(trajectories, index)
        theirs.append(seconds(partial(bare.update, trajectories, whole, minibatches)))
        ours.append(seconds(partial(rank.update, trajectories, index)))
        print(f"bare loop {theirs[-1][0]:.2f} s of CPU, update {ours[-1][0]:.2f} s", flush=True)
    cpu, wall = ([bare[part] / mine[part] for bare, mine in zip(theirs, ours, strict=True)] for part in (0, 1))
    return {
        "steps": steps,
        "pictures": len(set(trajectories.steps["image"].to_pylist())),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "weights_apart_after_one_update": apart,
        "update_cpu_s": statistics.median(cpu_s for cpu_s, _ in ours),
        "bare_loop_cpu_s": statistics.median(cpu_s for cpu_s, _ in theirs),
        "times_as_fast": statistics.median(cpu),
        "times_as_fast_quartiles": statistics.quantiles(cpu, n=4)[::2],
        "times_as_fast_by_wall_clock": statistics.median(wall),
    }


# --- memory


@dataclass(frozen=True)
class Rise:
    """Of a process's resident memory above what it held before, bytes."""

    peak: int
    logprob_sum: float
    entropy_sum: float
    gradient_sum: float


def memory_rise(way: str) -> Rise:
    """Log-probabilities and entropies of `TOKENS` tokens and their gradient; way: "ours" or "naive"."""
    import torch

    from learner.policy.token_logprobs import LogitTransform, SamplingDistribution, TokenHead

    torch.manual_seed(0)
    head = TokenHead.adopt(torch.nn.Linear(WIDTH, VOCABULARY, bias=False), LogitTransform())
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    head.weight.grad = torch.zeros_like(head.weight)  # both need it; it is no part of the rise
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if way == "ours":
        logprobs, entropy = head(hidden, targets, SamplingDistribution(1.0, [], CHUNK))
    else:
        every = head(hidden).log_softmax(-1)
        logprobs = every.gather(-1, targets[:, None])[:, 0]
        entropy = -(every.exp() * every).sum(-1)
    (logprobs.sum() + entropy.sum()).backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return Rise(peak, float(logprobs.detach().sum()), float(entropy.detach().sum()), float(hidden.grad.abs().sum()))


def memory() -> dict[str, Any]:
    rises = {way: in_process(memory_rise, way) for way in ("ours", "naive")}
    ours, naive = rises["ours"], rises["naive"]
    for name in ("logprob_sum", "entropy_sum", "gradient_sum"):
        np.testing.assert_allclose(getattr(ours, name), getattr(naive, name), rtol=1e-3, err_msg=name)
    return {
        "tokens": TOKENS,
        "vocabulary": VOCABULARY,
        "token_chunk": CHUNK,
        "peak_bytes": ours.peak,
        "naive_peak_bytes": naive.peak,
        "share_of_naive": ours.peak / naive.peak,
    }


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="warm-started model folder with its demonstrations")
    parser.add_argument("--steps", type=int, default=192, help="environment steps of an update (default 192)")
    parser.add_argument("--repeats", type=int, default=15, help="updates of each learner (default 15)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/learner.json"))
    arguments = parser.parse_args()
    result = {
        "memory": memory(),
        "update": in_process(speed, arguments.model, arguments.steps, arguments.repeats, False),
        "update_of_distinct_pictures": in_process(speed, arguments.model, arguments.steps, arguments.repeats, True),
    }
    print(json.dumps(record(arguments.out, result), indent=1))


if __name__ == "__main__":
    main()
