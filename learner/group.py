"""The learner as the driver sees it: R ranks as Ray actors, every wait with a deadline, every failure with a name."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.addresses import address_for
from actors.trajectory import TrajectoryBatch
from learner.checkpoints.format import CheckpointMismatch, CheckpointWriteFailed
from learner.finite import NotFinite
from learner.plan import images_of_rank, plan_update
from learner.rank import LearnerRank
from learner.settings import WarmStartSettings
from learner.setup import LearnerSetup

if TYPE_CHECKING:
    from actors.serving.weight_transfer import CollectiveGroup, WeightUpdate

#: After one rank's failure, how long to look whether another's death is behind it, seconds.
BLAME_WINDOW_S = 3.0

#: While a call is under way, how often to ask the ranks whether they come further, at most, seconds.
PROGRESS_POLL_S = 5.0


class LearnerFailed(RuntimeError):
    """A rank died, failed or did not answer in time. The ranks are of no use any more until `LearnerGroup.restart`."""


@dataclass(frozen=True, kw_only=True)
class RankResources:
    """What Ray reserves for each rank."""

    cpus: float
    gpus: float
    placement_group: Any | None = None  # one bundle per rank


@dataclass(frozen=True)
class _PreparedImages:
    """The images of one update, as each rank gets them."""

    keys: list[list[str]]  # per rank
    references: list[Any]  # per rank: ObjectRef of key -> PNG bytes


class LearnerGroup:
    """R ranks. Methods block until all ranks have answered. Trajectories are put into the object store once; in an
    update each rank gets the images of its own steps only. Calls may come from several threads.

    Failures of ranks are raised as `LearnerFailed`; errors about the input (`CheckpointMismatch`,
    `CheckpointWriteFailed`, `NotFinite`, `NotAVisionLanguageModel`, other `ValueError`s) are raised as they are.
    """

    def __init__(self, setup: LearnerSetup, resources: RankResources) -> None:
        """Start the ranks and load the model. Raises `LearnerFailed`, naming ranks that could not be placed."""
        self.setup = setup
        self.ranks = setup.learner.ranks
        self.resources = resources
        self._actors: list[Any] = []
        self._prepared: _PreparedImages | None = None
        # A call is a collective of all ranks, so the calls of two threads must reach every rank in the same order.
        self._calling = threading.Lock()
        self._start()

    # --- life and death

    def restart(self, checkpoint: Path | None) -> dict[str, int]:
        """End all ranks, start new ones, go on from `checkpoint` (None: from the model folder); `update`, `version`."""
        self.close()
        self._start()
        return {"update": 0, "version": 0} if checkpoint is None else self.load_checkpoint(checkpoint)

    def close(self) -> None:
        """End the ranks' processes."""
        import ray

        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._actors = []

    def ping(self, deadline_s: float = 30.0) -> list[dict[str, int]]:
        """Of every rank: `pid`, `update`, `version`, `passes` (forward passes done), `rss` (bytes). Answered during an
        update, too."""
        return self._wait(self._pings(), "ping", deadline_s)

    # --- work

    def update(self, trajectories: TrajectoryBatch, update_index: int) -> dict[str, float]:
        """`LearnerRank.update`."""
        prepared = self.prepare(trajectories, update_index)
        steps = self._put(TrajectoryBatch(trajectories.steps))
        metrics = self._on_all("update", steps, update_index, of_each_rank=prepared.references)[0]
        if self._prepared is prepared:
            self._prepared = None
        return metrics

    def prepare(self, trajectories: TrajectoryBatch, update_index: int) -> _PreparedImages:
        """Send each rank the images of its steps of a coming update, and let it process them beside what it does now.

        Returns at once. A rank does the same as part of `update` for images that this has not come to, so a rank that
        fails here is not reported.
        """
        import ray

        plan = plan_update(trajectories, self.setup, update_index, self.ranks)
        images = [images_of_rank(trajectories, plan, rank) for rank in range(self.ranks)]
        keys = [list(of_rank) for of_rank in images]
        prepared = self._prepared
        if prepared is None or prepared.keys != keys:
            self._prepared = prepared = _PreparedImages(keys, [ray.put(of_rank) for of_rank in images])
            for actor, reference in zip(self._actors, prepared.references, strict=False):
                actor.prepare.options(concurrency_group="ahead").remote(reference)
        return prepared

    def token_logprobs(self, trajectories: TrajectoryBatch) -> list[Any]:
        """`LearnerRank.token_logprobs`: float32 (n,) per step."""
        return self._on_all("token_logprobs", self._put(trajectories))[0]

    def begin_supervised(self, demonstrations: TrajectoryBatch, settings: WarmStartSettings) -> None:
        """`LearnerRank.begin_supervised`."""
        self._on_all("begin_supervised", self._put(demonstrations), settings)

    def supervised_steps(self, count: int) -> list[dict[str, float]]:
        """`LearnerRank.supervised_steps`; call it for a few steps at a time to show progress."""
        return self._on_all("supervised_steps", count)[0]

    # --- weights

    def publish(self, version: int) -> WeightUpdate:
        """`LearnerRank.publish`."""
        return self._on_all("publish", version)[0]

    def open_sync(
        self, servers: Sequence[str], workers_per_engine: int, deadline_s: float
    ) -> tuple[CollectiveGroup, Any]:
        """For transports that broadcast: (the group that servers are to join, ObjectRef of the learner joining it).

        servers: the address of each server's node.
        """
        writer, address = self._actors[0], address_for(self.addresses[0], servers)
        (group,) = self._wait(
            [writer.open_sync.remote(len(servers), workers_per_engine, address, deadline_s)], "open_sync", deadline_s
        )
        return group, writer.connect_sync.remote()

    def send(self) -> list[Any]:
        """For transports that broadcast: ObjectRefs, by rank, of the broadcast of what was published, now under way."""
        with self._calling:
            return [actor.send.remote() for actor in self._actors]

    def save_checkpoint(self, folder: Path) -> None:
        """`LearnerRank.save_checkpoint`."""
        self._on_all("save_checkpoint", folder.absolute())

    def save_model(self, folder: Path) -> None:
        """`LearnerRank.save_model`."""
        self._on_all("save_model", folder.absolute())

    def load_checkpoint(self, folder: Path) -> dict[str, int]:
        """`LearnerRank.load_checkpoint`."""
        return self._on_all("load_checkpoint", folder.absolute())[0]

    # --- parts

    def _start(self) -> None:
        import ray

        # `ping` gets a thread of its own, so that it is answered during an update, and `prepare` another.
        in_ray: Any = ray.remote
        actor_class = in_ray(concurrency_groups={"watch": 1, "ahead": 1})(LearnerRank)
        for rank in range(self.ranks):
            placing: dict[str, Any] = {}
            if self.resources.placement_group is not None:
                from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

                placing["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                    self.resources.placement_group, placement_group_bundle_index=rank
                )
            options = actor_class.options(num_cpus=self.resources.cpus, num_gpus=self.resources.gpus, **placing)
            self._actors.append(options.remote(self.setup, rank, self.ranks))
        started = time.monotonic()
        deadline_s = self.setup.learner.start_deadline_s
        try:
            places = self._wait([actor.rendezvous.remote() for actor in self._actors], "starting", deadline_s)
            self.addresses = [address for address, _ in places]  # of each rank's node
            rendezvous, port = address_for(self.addresses[0], self.addresses), places[0][1]
            left = max(1.0, deadline_s - (time.monotonic() - started))
            self._wait([actor.start.remote(rendezvous, port) for actor in self._actors], "loading the model", left)
        except BaseException:
            self.close()
            raise

    def _put(self, trajectories: TrajectoryBatch) -> Any:
        import ray

        return ray.put(trajectories)

    def _on_all(self, method: str, *arguments: Any, of_each_rank: Sequence[Any] | None = None) -> list[Any]:
        """of_each_rank: one more argument for each rank."""
        with self._calling:
            more = [()] * self.ranks if of_each_rank is None else [(argument,) for argument in of_each_rank]
            references = [
                getattr(actor, method).remote(*arguments, *own) for actor, own in zip(self._actors, more, strict=False)
            ]
        return self._wait(references, method.replace("_", " "), self.setup.learner.update_deadline_s, working=True)

    def _wait(self, references: Sequence[Any], operation: str, deadline_s: float, working: bool = False) -> list[Any]:
        """All answers, in order of rank. Raises as the class says, as soon as one rank fails. The deadline is of
        silence: an answer starts it again, and so does a forward pass of ranks that are `working`."""
        import ray

        if not references:
            raise LearnerFailed(f"{operation}: the learner has no ranks; restart it first")
        last = time.monotonic()
        passes: dict[int, int] = {}  # that each rank had done when it was last asked
        poll_s = min(PROGRESS_POLL_S, deadline_s / 4)
        pending = list(references)
        while pending:
            left = last + deadline_s - time.monotonic()
            done, pending = ray.wait(pending, timeout=min(max(0.0, left), poll_s))
            if not done and left <= 0:
                late = ", ".join(str(references.index(reference)) for reference in pending)
                raise LearnerFailed(
                    f"{operation}: learner rank {late} did not finish within {deadline_s:.0f} s of the last progress"
                )
            if not done and working:
                asked, now = time.monotonic(), self._passes(poll_s)
                if any(done_so_far > passes.get(rank, done_so_far) for rank, done_so_far in now.items()):
                    last = asked
                passes |= now
            for reference in done:
                last = time.monotonic()
                if self._failure_of(reference) is not None:
                    self._raise_failure(references, operation)
        return ray.get(list(references))

    def _pings(self) -> list[Any]:
        return [actor.ping.options(concurrency_group="watch").remote() for actor in self._actors]

    def _passes(self, limit_s: float) -> dict[int, int]:
        """Forward passes that each rank has done, of those that answer within the limit."""
        import ray

        answered, _ = ray.wait(asked := self._pings(), num_returns=self.ranks, timeout=limit_s)
        alive = {rank: ping for rank, ping in enumerate(asked) if ping in answered and self._failure_of(ping) is None}
        return {rank: ray.get(ping)["passes"] for rank, ping in alive.items()}

    def _raise_failure(self, references: Sequence[Any], operation: str) -> None:
        """Name the failure that is behind the others: input that is wrong, else a rank that died, else the first."""
        import ray
        from ray.exceptions import RayActorError

        # A death shows in the other ranks first, as a broken connection; so give the cause a moment to be known.
        ray.wait(list(references), num_returns=len(references), timeout=BLAME_WINDOW_S)
        done, _ = ray.wait(list(references), num_returns=len(references), timeout=0)
        failures = {
            rank: failure
            for rank, reference in enumerate(references)
            if reference in done and (failure := self._failure_of(reference)) is not None
        }
        dead = [rank for rank, failure in failures.items() if isinstance(failure, RayActorError)]
        if dead:
            reason = _last_line(failures[dead[0]])
            raise LearnerFailed(f"{operation}: learner rank {', '.join(map(str, dead))} died ({reason})")
        for failure in failures.values():
            cause = getattr(failure, "cause", None)
            if isinstance(cause, (ValueError, NotFinite, CheckpointMismatch, CheckpointWriteFailed)):
                raise cause
        rank, failure = next(iter(failures.items()))
        raise LearnerFailed(f"{operation}: learner rank {rank} failed: {_last_line(failure)}") from failure

    @staticmethod
    def _failure_of(reference: Any) -> BaseException | None:
        """What a finished call raised."""
        import ray

        try:
            ray.get(reference)
        except Exception as error:
            return error
        return None


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
