"""Steps per second of one rollout worker whose environments show large screens, beside an earlier commit.

    git worktree add ../before COMMIT
    python -m benchmarks.images --before ../before [--out benchmarks/results/images.json]

The screens are those of an embedded phone that is tapped at random, recorded first, so Chromium must be there. 64
environments replay them in two ways: as recorded, where many taps change nothing, and with a few pixels changed at
every step, so that no picture is ever seen twice. Worker, environment processes, hashing and encoding are the real
ones. The policy is a stand-in that answers at once, because the engine is not what is measured here. Takes six
minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

SIZES = ((1080, 2400), (360, 640))
ENVIRONMENTS = 64
EPISODE_STEPS = 8
MEASURED_S = 10.0
TAPS = 16
SCREENS_ID = "coso-benchmark/Screens-v0"


class Screens(gymnasium.Env[dict[str, Any], str]):
    """Shows recorded screens in turn, in episodes of `EPISODE_STEPS` steps.

    path: of an array uint8 (N, H, W, 3). always_new: a few pixels differ at every step.
    """

    def __init__(self, path: str, always_new: bool) -> None:
        from envs.labels import LabelHead, LabelSpace

        self.label_space = LabelSpace((LabelHead("action", 1, ("tap",)),))
        self._screens = np.load(path, mmap_mode="r")
        self._always_new = always_new
        self._next = os.getpid() % len(self._screens)
        self._shown = 0

    def _observation(self) -> dict[str, Any]:
        image = np.array(self._screens[self._next])
        self._next = (self._next + 1) % len(self._screens)
        self._shown += 1
        if self._always_new:
            image[0, :8] = np.frombuffer(np.array([os.getpid(), self._shown, 0]).tobytes(), np.uint8).reshape(8, 3)
        return {"image": image, "prompt": "Tap."}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self._steps = 0
        return self._observation(), {}

    def step(self, action: str) -> Any:
        self._steps += 1
        info = {"action": "tap", "action_labels": np.array([0], np.int32), "valid": True, "success": False}
        return self._observation(), 0.0, False, self._steps == EPISODE_STEPS, info


if SCREENS_ID not in gymnasium.registry:
    gymnasium.register(SCREENS_ID, entry_point=Screens, disable_env_checker=True)


class Accepts:
    """Stand-in for the call by which a policy server refuses what an episode was cut off at: it refuses nothing."""

    async def remote(self, _: Any) -> None:
        return None


class Answers:
    """Stand-in for a policy server and for the stream: it answers at once and lets every episode begin at once."""

    def __init__(self) -> None:
        self.generate = self.begin = self.put = self
        self.refusal = Accepts()

    async def remote(self, first: Any, *_: Any) -> Any:
        from actors.generation import Generation, GenerationRequest

        if not isinstance(first, GenerationRequest):
            return 0.0
        ids = np.arange(3, dtype=np.int32)
        return Generation(ids, ids, np.zeros(3, np.float32), [(0, 0)], "stop", "tap", 0.0)


async def steps_per_second(path: str, always_new: bool) -> float:
    """Of one worker with `ENVIRONMENTS` environments, with the code that this process imports."""
    from actors.rollouts.worker import RolloutLaunch, RolloutWorker
    from actors.settings import RolloutSettings
    from envs.settings import EnvironmentSettings

    kwargs = {"path": path, "always_new": always_new}
    env_id = f"{Path(__file__).stem}:{SCREENS_ID}"
    worker = RolloutWorker(
        EnvironmentSettings(id=env_id, kwargs=kwargs, deadline_s=300, start_deadline_s=300),
        RolloutSettings(envs_per_worker=ENVIRONMENTS, max_new_tokens=16),
        RolloutLaunch(run="benchmark", run_seed=1, worker=0, answer_deadline_s=300),
        [Answers()],
        Answers(),
    )
    await worker.start(0)
    try:
        # Until all have begun; and, where screens come again, until every environment has shown all of them.
        rounds = 2 if always_new else TAPS
        while (await worker.status())["steps"] < rounds * ENVIRONMENTS:
            await asyncio.sleep(0.2)
        before, started = (await worker.status())["steps"], time.monotonic()
        await asyncio.sleep(MEASURED_S)
        return ((await worker.status())["steps"] - before) / (time.monotonic() - started)
    finally:
        await worker.stop()


def record_screens(path: Path, width: int, height: int) -> None:
    """Tap an embedded phone of this size at random, `TAPS` times, and save what it shows after each."""
    import envs  # noqa: F401  (registers coso/...)

    phone = gymnasium.make("coso/Android-v0", device={"screen_size": (width, height)})
    rng = random.Random(0)
    screens = []
    over = True
    for tap in range(TAPS):
        if over:
            phone.reset(seed=tap)
        answer = json.dumps({"action": "click", "coordinate": [rng.randrange(1001), rng.randrange(1001)]})
        observation, _, terminated, truncated, _ = phone.step(answer)
        over = terminated or truncated
        screens.append(observation["image"])
    phone.close()
    np.save(path, np.stack(screens))


def floor(path: Path) -> dict[str, float]:
    """CPU milliseconds and bytes of one picture, over the distinct screens: hash, PNG, and PNG as Pillow makes it."""
    from io import BytesIO

    from PIL import Image

    from actors.images import encode_png, image_hash

    distinct = list({image_hash(screen): screen for screen in np.load(path)}.values())

    def by_pillow(image: np.ndarray) -> bytes:
        buffer = BytesIO()
        Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()

    result: dict[str, float] = {"distinct_screens": len(distinct), "raw_mb": round(distinct[0].nbytes / 1e6, 2)}
    for name, function in (("hash", image_hash), ("png", encode_png), ("pillow_png", by_pillow)):
        started = time.process_time()
        made: list[Any] = [function(screen) for screen in distinct]
        seconds = (time.process_time() - started) / len(distinct)
        result[f"{name}_ms"] = round(1000 * seconds, 2)
        result[f"{name}_mb_per_s_and_core"] = round(distinct[0].nbytes / 1e6 / seconds)
        if name != "hash":
            result[f"{name}_kb"] = round(sum(map(len, made)) / len(made) / 1e3)
    return result


def measured_in(root: Path, path: Path, always_new: bool) -> float:
    """`steps_per_second` of the code under `root`, in a process of its own."""
    # A copy outside `benchmarks/`, whose other modules would hide packages of the same name.
    script = Path(shutil.copy(__file__, path.with_name("screens_benchmark.py")))
    command = [sys.executable, str(script), "--measure", str(path), str(int(always_new))]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def commit_of(root: Path) -> str:
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a working tree of the commit to compare with")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/images.json"))
    parser.add_argument("--measure", nargs=2, metavar=("SCREENS", "ALWAYS_NEW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        path, always_new = arguments.measure
        print(asyncio.run(steps_per_second(path, always_new == "1")))
        return
    if arguments.before is None:
        parser.error("give --before a working tree of the commit to compare with")
    from benchmarks.record import record

    here = Path(__file__).resolve().parents[1]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for width, height in SIZES:
            path = Path(folder) / f"{height}.npy"
            record_screens(path, width, height)
            row: dict[str, Any] = {"screen": [width, height], **floor(path)}
            for name, always_new in (("as_recorded", False), ("always_new", True)):
                before, now = (measured_in(root, path, always_new) for root in (arguments.before, here))
                row[name] = {
                    "steps_per_s_before": round(before, 1),
                    "steps_per_s": round(now, 1),
                    "times": round(now / before, 1),
                }
            rows.append(row)
            print(row, flush=True)
            facts = {"environments": ENVIRONMENTS, "before": commit_of(arguments.before), "policy": "stand-in"}
            record(arguments.out, {**facts, "rows": rows})


if __name__ == "__main__":
    main()
