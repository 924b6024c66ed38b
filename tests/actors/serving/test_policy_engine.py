"""How an engine is started: its seed, another one for every server and after every restart, and never too large for
vLLM; its logits; what is told of its start."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from transformers import LlavaConfig

from actors.serving.policy_engine import PolicyServerLaunch, engine_arguments
from actors.settings import ModelSettings, PolicyServerSettings

LAUNCH = PolicyServerLaunch(index=0, run_seed=1, temp_folder="/tmp")


def seed_of(launch: PolicyServerLaunch, incarnation: int = 0) -> int:
    return engine_arguments(ModelSettings(), PolicyServerSettings(), launch, incarnation)["seed"]


def test_servers_of_a_run_and_starts_of_a_server_have_seeds_of_their_own_that_a_run_repeats() -> None:
    cases = [(server, incarnation) for server in range(8) for incarnation in range(4)]
    seeds = [seed_of(replace(LAUNCH, index=server), incarnation) for server, incarnation in cases]
    assert len(set(seeds)) == len(cases)
    assert seeds == [seed_of(replace(LAUNCH, index=server), incarnation) for server, incarnation in cases]


@pytest.mark.parametrize("run_seed", [0, 2**32 - 1, 2**32, 2**32 + 1, 2**64 - 1])
def test_a_large_seed_of_a_run_gives_one_that_vllm_takes_and_is_no_smaller_one_in_disguise(run_seed: int) -> None:
    seed = seed_of(replace(LAUNCH, run_seed=run_seed))
    assert 0 <= seed < 2**32
    assert run_seed < 2**32 or seed != seed_of(replace(LAUNCH, run_seed=run_seed % 2**32))


def test_the_last_line_of_the_log_says_what_a_start_is_doing(tmp_path: Path) -> None:
    program = (
        "import sys; from actors.serving.policy_engine import OwnErrorLog\n"
        "log = OwnErrorLog(); print(log.last_line())\n"
        "print('\x1b[0;36m(EngineCore pid=7)\x1b[0;0m Starting to load model', file=sys.stderr, flush=True)\n"
        "print('Loading shards:  50%\\rLoading shards: 100%\\n\\n', file=sys.stderr, flush=True)\n"
        "print(log.last_line()); print('x' * 1000, file=sys.stderr, flush=True); print(len(log.last_line()))\n"
        "print('\x1b[31mend\x1b[0m', file=sys.stderr, flush=True); print(log.last_line())"
    )
    with open(tmp_path / "log", "w+b") as log:
        log.write(b"what another process wrote before\n")
        log.flush()
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=log, text=True, check=True
        )
    assert done.stdout.splitlines() == ["", "Loading shards: 100%", "160", "end"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_float32(dtype: Literal["float32", "bfloat16"]) -> None:
    override = engine_arguments(ModelSettings(dtype=dtype), PolicyServerSettings(), LAUNCH, 0)["hf_overrides"]
    config = pickle.loads(pickle.dumps(override))(LlavaConfig())  # the engine's process may be another one
    assert config.head_dtype == config.text_config.head_dtype == "float32"
