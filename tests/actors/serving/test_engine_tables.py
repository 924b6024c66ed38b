"""What is read from vLLM's source, or told to it, is as vLLM itself has it: a new version that moves it is noticed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from actors.serving.engine_tables import adapter_targets, architectures, cpu_head_sizes

PROGRAM = """
import json, torch, transformers
from vllm.config.model import _get_head_dtype
from vllm.model_executor.models import ModelRegistry
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.model_executor.models.interfaces import supports_lora
from actors.serving.policy_engine import float32_head
heads = set()
for family in ("Idefics3", "Qwen2_5_VL", "LlavaNext", "Gemma3", "InternVL"):
    config = float32_head(getattr(transformers, family + "Config")())
    heads |= {_get_head_dtype(part, torch.bfloat16, "generate") for part in (config, config.get_text_config())}
assert torch.float32 in current_platform.supported_dtypes
adapted = {}
for name in NAMES:
    model = ModelRegistry.models[name].load_model_cls()
    adapted[name] = ["language_model"] * supports_lora(model) + ["all-linear"] * model.supports_tower_connector_lora
print(json.dumps([sorted(ModelRegistry.get_supported_archs()), CPUAttentionBackend.get_supported_head_sizes(),
    sorted(map(str, heads)), adapted]))
"""
#: Declared by the class itself, its base in another module, in a package, not at all; those that need no torchvision.
NAMES = [f"{name}ForConditionalGeneration" for name in ("Idefics3", "SmolVLM", "PaliGemma", "Emu3", "Aria")]


@pytest.mark.integration
def test_the_tables_are_those_of_the_installed_vllm() -> None:
    # In another process: importing vLLM changes the one it is imported into.
    done = subprocess.run(
        [sys.executable, "-c", f"NAMES = {NAMES}{PROGRAM}"], capture_output=True, text=True, timeout=240, check=True
    )
    served, head_sizes, head_dtypes, adapted = json.loads(done.stdout.splitlines()[-1])
    assert cpu_head_sizes() == head_sizes
    assert head_dtypes == ["torch.float32"]
    assert set(served) - (architectures() or set()) == set()
    assert "Idefics3ForConditionalGeneration" in served and "FooForBar" not in (architectures() or set())
    assert {name: adapter_targets(name) for name in NAMES} == {name: set(found) for name, found in adapted.items()}
    assert len({frozenset(found) for found in adapted.values()}) == 3
