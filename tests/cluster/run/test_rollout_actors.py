"""What a user is told while policy servers start, which takes minutes on a GPU. Stubs stand for servers' handles."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config.run_config import RunConfig
from cluster.run import rollout_actors


def handle(ready: asyncio.Event, status: Callable[[], Any]) -> Any:
    return SimpleNamespace(ready=SimpleNamespace(remote=ready.wait), status=SimpleNamespace(remote=status))


def test_what_servers_that_start_are_doing_is_reported_until_they_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_actors, "START_REPORT_S", 0.05)
    monkeypatch.setattr(rollout_actors, "STATUS_DEADLINE_S", 0.05)
    asyncio.run(asyncio.wait_for(_wait_and_compare(), 30))


async def _wait_and_compare() -> None:
    ready = asyncio.Event()
    said: list[str] = []

    async def status(number: int, starting: str | None) -> dict[str, Any]:
        return {"name": f"policy server {number}", "starting": starting}

    servers = [
        handle(ready, lambda: status(0, "Capturing CUDA graphs: 12%")),
        handle(ready, lambda: status(1, "")),
        handle(ready, lambda: status(2, None)),  # serves
        handle(ready, lambda: asyncio.sleep(60)),  # Ray has no GPU for it yet
    ]

    def report(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            ready.set()

    await rollout_actors.wait_for_servers(RunConfig(), servers, report)
    assert said == [
        "1 of 4 policy servers have no process yet after 0 s",
        "policy server 0 has been starting for 0 s: Capturing CUDA graphs: 12%",
        "policy server 1 has been starting for 0 s: its log is empty",
    ]
