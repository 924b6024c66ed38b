"""What is read from vLLM's source is what vLLM itself says, so a new version that moves its tables is noticed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from actors.serving.engine_tables import adapter_targets, architectures, cpu_head_sizes

PROGRAM = """
import json
from vllm.model_executor.models import ModelRegistry
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.model_executor.models.interfaces import supports_lora
adapted = {}
for name in NAMES:
    model = ModelRegistry.models[name].load_model_cls()
    adapted[name] = ["language_model"] * supports_lora(model) + ["all-linear"] * model.supports_tower_connector_lora
served = sorted(ModelRegistry.get_supported_archs())
print(json.dumps([served, CPUAttentionBackend.get_supported_head_sizes(), adapted]))
"""
#: Declared by the class itself, by its bases in the same and in other modules, in a package, and not at all.
NAMES = [
    f"{name}ForConditionalGeneration" for name in ("Idefics3", "SmolVLM", "LlavaNext", "Emu3", "LlavaOnevision", "Aria")
]


@pytest.mark.integration
def test_the_tables_are_those_of_the_installed_vllm() -> None:
    # In another process: importing vLLM changes the one it is imported into.
    done = subprocess.run(
        [sys.executable, "-c", f"NAMES = {NAMES}{PROGRAM}"], capture_output=True, text=True, timeout=240, check=True
    )
    served, head_sizes, adapted = json.loads(done.stdout.splitlines()[-1])
    assert cpu_head_sizes() == head_sizes
    assert set(served) - (architectures() or set()) == set()
    assert "Idefics3ForConditionalGeneration" in served and "FooForBar" not in (architectures() or set())
    assert {name: adapter_targets(name) for name in NAMES} == {name: set(found) for name, found in adapted.items()}
    assert len({frozenset(found) for found in adapted.values()}) == 3
