"""What the settings of the actors say of themselves."""

from __future__ import annotations

import pytest

from actors.settings import PolicyServerSettings, WeightSyncSettings


@pytest.mark.parametrize(
    ("configured", "on_gpus", "nodes", "transport"),
    [
        ("auto", True, 1, "nccl"),
        ("auto", True, 4, "nccl"),
        ("auto", False, 1, "shared_memory"),
        ("auto", False, 2, "object_store"),
        ("gloo", False, 2, "gloo"),
        ("object_store", True, 1, "object_store"),
    ],
)
def test_auto_chooses_the_transport_by_devices_and_nodes(
    configured: str, on_gpus: bool, nodes: int, transport: str
) -> None:
    settings = WeightSyncSettings.model_validate({"transport": configured})
    assert settings.transport_for(on_gpus=on_gpus, nodes=nodes) == transport


def test_an_answer_may_wait_for_a_restart_of_its_server() -> None:
    assert PolicyServerSettings(start_deadline_s=7.0, generate_deadline_s=2.0).answer_deadline_s == 9.0
