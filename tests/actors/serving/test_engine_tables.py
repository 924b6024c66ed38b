"""What is read from vLLM's source is what vLLM itself says, so a new version that moves its tables is noticed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from actors.serving.engine_tables import architectures, cpu_head_sizes

PROGRAM = """
import json
from vllm.model_executor.models import ModelRegistry
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
print(json.dumps([sorted(ModelRegistry.get_supported_archs()), CPUAttentionBackend.get_supported_head_sizes()]))
"""


@pytest.mark.integration
def test_the_tables_are_those_of_the_installed_vllm() -> None:
    # In another process: importing vLLM changes the one it is imported into.
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240, check=True)
    served, head_sizes = json.loads(done.stdout.splitlines()[-1])
    assert cpu_head_sizes() == head_sizes
    assert set(served) - (architectures() or set()) == set()
    assert "Idefics3ForConditionalGeneration" in served and "FooForBar" not in (architectures() or set())
