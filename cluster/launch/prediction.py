"""What a plan will yield: steps per second, the stage that limits, and what one more of each actor would change.

A pure function of a config, a plan and measured `Rates`. Each stage alone could make so many steps a second:

    rollouts    N / (e + g)          N environments, each a step in e seconds and an answer in g
    scoring     S / max(w · S / scorers, t)     w seconds of a scorer a step, t seconds of training the SCM an update
    learner     S / (u · S / ranks + p)         u seconds of a rank a step, p seconds an update that ranks do not share
    cores       cores / Σ c          for each node: c core-seconds a step of the actors that run there

S is `training.steps_per_update`. A server that has k requests at once answers each in g = first + (k − 1) · further;
k = X · g / servers at X steps a second (Little's law), which with X = N / (e + g) gives g. In async mode the stages
overlap, and the slowest limits. In sync mode their times add up, and each has all cores while it runs. Evaluations and
checkpoints are not in it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import PositiveFloat, ValidationError

from cluster.config.files import validate
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.launch.placement import Kind, Node, Plan, needs_of, place, shortage
from cluster.replacing import replace_text
from envs.settings import NonNegative, Probability, Section

#: Kinds of actors whose work takes cores, as far as `coso plan --measure` measures them.
WORKING: tuple[Kind, ...] = ("rollout worker", "policy server", "scorer", "learner rank")
#: Emulators that the third change adds.
MORE_ENVIRONMENTS = 64
#: Two stages whose limits differ by less than this share limit together.
EQUAL_SHARE = 0.02


class Rates(Section):
    """Rates of a run, each measured while its stage ran alone. All in seconds."""

    environment_s: NonNegative  # of a step in an environment, resets included
    first_answer_s: PositiveFloat  # of an answer, when a server has one request
    further_answer_s: NonNegative  # that each further request of the same server adds
    lock_step: Probability = 1.0  # sync mode: rollouts in lock-step over rollouts that wait for nobody
    scorer_s: NonNegative = 0.0  # of one scorer, a step
    scm_training_s: NonNegative = 0.0  # an update
    rank_s: PositiveFloat  # of one rank, a step
    publish_s: NonNegative = 0.0  # an update: publishing the weights, checking them
    core_s: dict[Kind, NonNegative] = {}  # core-seconds a step, of all actors of a kind; none: not measured

    @classmethod
    def read(cls, path: Path) -> Rates:
        """What `write` wrote. Raises `CosoError`."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CosoError(f"{path} does not exist; `coso plan CONFIG --measure --rates {path}` writes it") from None
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            first = str(error).splitlines()
            raise CosoError(f"{path} holds no rates of `coso plan --measure`: {' '.join(first[:3])}") from None

    def write(self, path: Path) -> None:
        """Write the rates as JSON."""
        replace_text(path, json.dumps(self.model_dump(), indent=1) + "\n")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """steps_per_s: environment steps a second of the whole run. limits: stage -> steps a second that it could make
    alone, slowest first. mode: of the config."""

    steps_per_s: float
    limits: Mapping[str, float]
    mode: str

    @property
    def limiting(self) -> str:
        """The stages that limit, for instance `learner`; in sync mode the one that takes the most time."""
        slowest = min(self.limits.values())
        return " and ".join(name for name, rate in self.limits.items() if rate <= slowest * (1 + EQUAL_SHARE))


@dataclass(frozen=True, kw_only=True)
class Change:
    """A larger run: what it adds, and its prediction, or in one line why it cannot be."""

    what: str
    prediction: Prediction | None
    short: str = ""


def predict(config: RunConfig, plan: Plan, rates: Rates) -> Prediction:
    """Steps per second of a run that is placed as the plan says."""
    stages = list(_stages(config, rates))
    if config.mode == "sync":  # a stage has all cores while it runs
        limits = {name: min([rate, *_cores(plan, rates, kinds).values()]) for name, rate, kinds in stages}
        total = 1 / sum(1 / rate for rate in limits.values())
    else:
        limits = {name: rate for name, rate, _ in stages} | _cores(plan, rates, WORKING)
        total = min(limits.values())
    slowest_first = dict(sorted(limits.items(), key=lambda item: item[1]))
    return Prediction(steps_per_s=total, limits=slowest_first, mode=config.mode)


def changes(config: RunConfig, nodes: tuple[Node, ...], rates: Rates) -> Iterator[Change]:
    """What one more server, rank or scorer, or 64 more environments would change, on the same nodes."""
    workers = -(-MORE_ENVIRONMENTS // config.rollout.envs_per_worker)
    added = workers * config.rollout.envs_per_worker
    table = [
        ("one more policy server", "policy_server", "replicas", 1),
        ("one more learner rank", "learner", "ranks", 1),
        ("one more scorer", "scoring", "workers", 1),
        (f"{added} more environments ({_workers(workers)})", "rollout", "workers", workers),
    ]
    for what, section, key, more in table:
        if section == "scoring" and not config.entropy.needs_influence:
            continue
        values = config.model_dump()
        values[section][key] += more
        try:
            larger = validate(values)
        except CosoError as error:
            yield Change(what=what, prediction=None, short=str(error))
            continue
        plan = place(nodes, needs_of(larger))
        if plan.short:
            yield Change(what=what, prediction=None, short=f"no room: {shortage(plan)}")
        else:
            yield Change(what=what, prediction=predict(larger, plan, rates))


def _stages(config: RunConfig, rates: Rates) -> Iterator[tuple[str, float, tuple[Kind, ...]]]:
    """Each stage: its name, the steps a second that it makes alone, the kinds of actors whose cores it takes."""
    steps, sync = config.training.steps_per_update, config.mode == "sync"
    environments = config.rollout.workers * config.rollout.envs_per_worker
    asking = environments / config.policy_server.replicas
    # Whether more environments would make more steps, or more servers would.
    waits_longer = rates.environment_s + rates.first_answer_s >= rates.further_answer_s * asking
    yield (
        "environments" if waits_longer else "policy servers",
        environments / (rates.environment_s + _answer_s(asking, rates)) * (rates.lock_step if sync else 1.0),
        ("rollout worker", "policy server"),
    )
    yield "learner", steps / (rates.rank_s * steps / config.learner.ranks + rates.publish_s), ("learner rank",)
    if config.entropy.needs_influence:
        scoring_s, training_s = rates.scorer_s * steps / config.scoring.workers, rates.scm_training_s
        if seconds := scoring_s + training_s if sync else max(scoring_s, training_s):
            yield "scorers" if scoring_s >= training_s else "SCM trainer", steps / seconds, ("scorer",)


def _answer_s(requests: float, rates: Rates) -> float:
    """Seconds of an answer where `requests` environments ask each server.

    g = first + further · max(0, k − 1) with k = requests · g / (e + g): the root of a falling function, by bisection.
    """
    low, high = rates.first_answer_s, rates.first_answer_s + rates.further_answer_s * requests
    for _ in range(60):
        middle = (low + high) / 2
        at_once = requests * middle / (rates.environment_s + middle)
        if rates.first_answer_s + rates.further_answer_s * max(0.0, at_once - 1.0) > middle:
            low = middle
        else:
            high = middle
    return high


def _cores(plan: Plan, rates: Rates, kinds: tuple[Kind, ...]) -> dict[str, float]:
    """For each node, as a stage, the steps a second for which its cores suffice when actors of these kinds work."""
    totals = Counter(need.kind for need in plan.placed)
    limits = {}
    for node in plan.nodes:
        here = Counter(need.kind for need in plan.on(node))
        load = sum(rates.core_s.get(kind, 0.0) * here[kind] / totals[kind] for kind in kinds if here[kind])
        if node.cores and load:
            limits[f"cores of {node.address}"] = node.cores / load
    return limits


def _workers(count: int) -> str:
    return f"{count} rollout worker{'' if count == 1 else 's'}"
