"""Policy servers and learner taking turns on one GPU: what is called in which order.

vLLM's engines on CPUs cannot sleep, so a stub stands for the engine; policy servers and system are the real ones. That
the memory comes free shows on a GPU only.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from actors.serving.policy_engine import PolicyServerLaunch
from actors.serving.policy_server import PolicyServer
from actors.serving.weight_transfer import WeightUpdate
from actors.settings import ModelSettings
from cluster.config.files import validate
from cluster.errors import CosoError
from cluster.run.system import System

SHARED: dict[str, Any] = {
    "mode": "sync",
    "policy_server": {"device": "cuda", "gpu_share": 0.5, "sleep": True},
    "learner": {"device": "cuda", "gpu_share": 0.5},
}


class Engine:
    """A stub of vLLM's engine that notes what it is asked for."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def __getattr__(self, method: str) -> Any:
        async def call(*arguments: Any, **named: Any) -> Any:
            self.events.append(method)
            if method == "sleep":
                assert named == {"level": 1, "mode": "wait"}
            return [None]

        return call

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> Any:
        self.events.append(method)
        return [({"w": 1}, 1, [])]


def started_server(events: list[str], monkeypatch: pytest.MonkeyPatch) -> PolicyServer:
    config = validate(SHARED)

    async def start(self: PolicyServer) -> None:
        self._engine = Engine(events)
        self._adapter = "an adapter"  # its updates do not need vLLM, whose import takes long
        self._current.set()

    monkeypatch.setattr(PolicyServer, "_start", start)
    return PolicyServer(
        ModelSettings(), config.policy_server, PolicyServerLaunch(index=0, run_seed=0, temp_folder="unused")
    )


def test_the_servers_sleep_while_the_learner_has_its_turn_and_load_when_they_are_awake(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    events: list[str] = []
    (tmp_path / "w").touch()
    update = WeightUpdate(version=1, transport="shared_memory", path=str(tmp_path / "w"), checksums={"w": 1})

    async def turn() -> None:
        server = started_server(events, monkeypatch)
        system = System.__new__(System)
        system.config = validate(SHARED)
        methods = {name: SimpleNamespace(remote=getattr(server, name)) for name in ("sleep", "wake")}
        system.servers = {"policy server 0": SimpleNamespace(**methods)}
        running = asyncio.Event()

        async def request(name: str) -> None:
            async with server._answering(name), server._gate.shared():
                events.append(f"{name} begins")
                await running.wait()
                events.append(f"{name} ends")

        early = asyncio.create_task(request("request"))
        await asyncio.sleep(0)
        learning = asyncio.create_task(system.in_learners_turn(lambda: events.append("update") or "trained"))
        await asyncio.sleep(0.05)  # it waits for the request
        late = asyncio.create_task(request("late request"))
        await asyncio.sleep(0.05)
        running.set()
        assert await learning == "trained"
        await asyncio.gather(early, late)
        report = await server.load(update)
        assert report.version == 1
        with pytest.raises(ZeroDivisionError):
            await system.in_learners_turn(lambda: 1 // 0)
        await server.sleep()
        await server.sleep()
        await server.load(update)  # never into memory that is given back

    asyncio.run(turn())
    load = ["pause_generation", "reset_prefix_cache", "reset_encoder_cache", "load_adapter", "update_weight_version",
            "resume_generation"]  # fmt: skip
    assert events == [
        "request begins", "request ends", "sleep", "update", "wake_up", "late request begins", "late request ends",
        *load, "sleep", "wake_up", "sleep", "wake_up", *load,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "async"}, "policy_server.sleep needs mode sync"),
        ({"policy_server": {"device": "cpu", "sleep": True}}, "policy_server.sleep needs policy_server.device cuda"),
        (
            {"policy_server": {"device": "cuda", "gpu_share": 0.5}},
            r"policy_server.gpu_memory_utilization 0.85 is more than policy_server.gpu_share 0.5: lower it",
        ),
        ({"weight_sync": {"transport": "nccl"}}, "nccl needs a GPU for each process"),
    ],
)
def test_what_cannot_share_a_gpu_is_refused(changes: dict[str, Any], said: str) -> None:
    validate(SHARED)
    with pytest.raises(CosoError, match=said):
        validate(SHARED | changes)
