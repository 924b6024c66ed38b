"""ALFWorld: equality with the plain engine, speed, memory, and success of the expert.

    coso alfworld make games/alfworld
    python -m benchmarks.alfworld equality games/alfworld [--games 216] [--skip 0]
    python -m benchmarks.alfworld speed games/alfworld
    python -m benchmarks.alfworld parallel games/alfworld
    python -m benchmarks.alfworld expert games/alfworld

Each prints JSON and writes it to benchmarks/results/alfworld_NAME.json. `equality` takes about 3 s a game; with --skip
it goes on where a former call stopped, and adds to its result. The plain engine is `alfworld`'s own stack of wrappers
round TextWorld (`tests/envs/alfworld/plain_engine.py`), in the same process on the same games and commands.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from envs.alfworld.engine import Engine
from envs.alfworld.games import DATA_FOLDER, GAME_FILE, GamePath, NoGames, list_games, read_game
from envs.alfworld.names import ROOMS, SPLITS, TASKS

RESULTS = Path(__file__).parent / "results"
#: Steps of random play per game; every fifth command is not admissible.
RANDOM_STEPS = 12
#: Published.
HORIZON = 50
#: Deadline of a process's answer on a busy machine, seconds.
DEADLINE_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["equality", "speed", "parallel", "expert"])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--games", type=int, default=0, help="number of games (default: equality 216, speed 12, expert 6)"
    )
    parser.add_argument("--skip", type=int, default=0, help="equality: number of games to skip at the start")
    parser.add_argument("--environments", type=int, default=16, help="parallel: number of environments")
    parser.add_argument("--out", type=Path, default=None)
    words = parser.parse_args()
    out = words.out or RESULTS / f"alfworld_{words.what}.json"
    if words.what == "equality":
        result = equality(words.folder, words.games or 216, words.skip, out)
    elif words.what == "speed":
        result = speed(words.folder, words.games or 12)
    elif words.what == "expert":
        result = expert(words.folder, words.games or 6)
    else:
        result = asyncio.run(parallel(words.folder, words.environments))
    result["command"] = f"python -m benchmarks.alfworld {words.what} {words.folder}"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def spread(folder: Path, count: int) -> list[GamePath]:
    """`count` games of all splits, alternating between task types and rooms."""
    heaps: dict[tuple[str, str], list[GamePath]] = {}
    for split in SPLITS:
        with contextlib.suppress(NoGames):
            for path in list_games(folder, split):
                heaps.setdefault((path.task, path.room), []).append(path)
    rng = random.Random(0)
    for heap in heaps.values():
        rng.shuffle(heap)
    chosen: list[GamePath] = []
    while len(chosen) < count and any(heaps.values()):
        chosen += [heap.pop() for key in sorted(heaps) if (heap := heaps[key])]
    return chosen[:count]


def equality(folder: Path, count: int, skip: int, out: Path) -> dict[str, Any]:
    """Compare text, admissible commands, facts, reward and victory after every step with the engine driven directly."""
    from tests.envs.alfworld.plain_engine import PlainEngine, assert_same

    ours = Engine()
    counts = Counter(json.loads(out.read_text())["counts"]) if skip and out.exists() else Counter[str]()
    paths = spread(folder, count)[skip:]
    for number, path in enumerate(paths, skip):
        game = read_game(path)
        plain = PlainEngine()
        plain.load(game)
        ours.load(game.game)
        rng = random.Random(number)
        for play in ("expert", "random"):
            their_state, our_state = plain.reset(), ours.reset()
            assert_same(their_state, our_state)
            commands = game.game["walkthrough"] if play == "expert" else range(RANDOM_STEPS)
            for step, command in enumerate(commands):
                if play == "random":
                    command = "open moon 1" if step % 5 == 4 else rng.choice(our_state.admissible)
                their_state, our_state = plain.step(command), ours.step(command)
                assert_same(their_state, our_state)
                counts[f"steps of {play} play"] += 1
            counts[f"won in {play} play"] += our_state.won
        counts["games"] += 1
        counts[f"task {path.task}"] += 1
        counts[f"room {path.room}"] += 1
        if number % 10 == 9:
            print(f"{number + 1} of {skip + len(paths)} games", flush=True)
    assert all(counts[f"task {task}"] for task in TASKS) and all(counts[f"room {room}"] for room in ROOMS)
    return {"counts": dict(sorted(counts.items())), "differences": 0}


def speed(folder: Path, count: int) -> dict[str, Any]:
    """CPU time per load with reset, per reset and per step, plain and ours, on the same games and commands."""
    from tests.envs.alfworld.plain_engine import PlainEngine

    times: dict[str, list[float]] = {}

    def timed(name: str, function: Any, *arguments: Any) -> Any:
        begun = time.process_time()
        result = function(*arguments)
        times.setdefault(name, []).append((time.process_time() - begun) * 1e3)
        return result

    ours = Engine()
    for path in spread(folder, count):
        game = read_game(path)
        plain = PlainEngine()
        timed("plain load", plain.load, game)
        timed("plain reset", plain.reset)
        timed("ours load", ours.load, game.game)
        timed("ours reset", ours.reset)
        for command in game.game["walkthrough"]:
            timed("plain step", plain.step, command)
            timed("ours step", ours.step, command)
        timed("ours environment step", _environment_steps(folder, path), game.game["walkthrough"])
    steps = sum(len(read_game(path).game["walkthrough"]) for path in spread(folder, count))
    means = {name: statistics.fmean(values) for name, values in times.items() if name != "ours environment step"}
    # The whole environment: parsing, prompt, goal, picture.
    means["ours environment step"] = sum(times["ours environment step"]) / steps
    return {
        "games": count,
        "steps": steps,
        "cpu_ms": {name: round(value, 2) for name, value in means.items()},
        "times_faster": {
            "step": round(means["plain step"] / means["ours step"], 1),
            "whole environment step": round(means["plain step"] / means["ours environment step"], 1),
            "load and reset": round(
                (means["plain load"] + means["plain reset"]) / (means["ours load"] + means["ours reset"]), 1
            ),
            "reset of a loaded game": round(means["plain reset"] / means["ours reset"], 1),
        },
    }


def expert(folder: Path, count: int) -> dict[str, Any]:
    """`alfworld`'s unchanged `AlfredExpert` and ours, on games of the task that puts down two things.

    Made games are those that our expert wins. So this measures what the verb `move` costs, not which is better.
    """
    from envs.alfworld.engine import import_engine

    import_engine()
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredExpert
    from textworld.envs import PddlEnv

    paths = list_games(folder, "train", ["pick_two_obj_and_place"])
    chosen = paths[:: max(1, len(paths) // count)][:count]
    steps: dict[str, dict[str, int | None]] = {}
    for path in chosen:
        infos = textworld.EnvInfos(won=True, admissible_commands=True)
        env = AlfredExpert(AlfredDemangler(PddlEnv(infos), shuffle=False))
        env.load(str(path.folder / DATA_FOLDER / path.name / GAME_FILE))
        random.seed(0)
        state, done, taken = env.reset(), False, 0
        while not done and taken < HORIZON:
            state, _, done = env.step(state["extra.expert_plan"][0])
            taken += 1
        steps[path.name] = {
            "AlfredExpert": taken if done else None,
            "ours": len(read_game(path).game["walkthrough"]),
        }
    won = {who: sum(each[who] is not None for each in steps.values()) for who in ("AlfredExpert", "ours")}
    return {"games": len(chosen), "won_within_50_steps": won, "steps": steps}


def _environment_steps(folder: Path, path: GamePath) -> Any:
    from envs.alfworld.environment import ALFWorld

    split = next(split for split, below in SPLITS.items() if path.name.startswith(f"{below}/"))
    env = ALFWorld(games=str(folder), split=split)
    env.reset(options={"state": {"game": path.name, "commands": []}})

    def play(commands: list[str]) -> None:
        for command in commands:
            env.step(json.dumps({"thoughts": "", "action": command}))

    return play


async def parallel(folder: Path, count: int) -> dict[str, Any]:
    """`count` environments in separate processes with deadlines: start time, throughput and memory of each."""
    from actors.rollouts.environment_host import EnvironmentHost
    from envs.settings import EnvironmentSettings

    begun = time.perf_counter()
    settings = EnvironmentSettings(
        id="coso/ALFWorld-v0", kwargs={"games": str(folder)}, deadline_s=DEADLINE_S, start_deadline_s=DEADLINE_S
    )
    hosts = [EnvironmentHost(settings) for _ in range(count)]
    try:
        await asyncio.gather(*(host.start() for host in hosts))
        started = time.perf_counter() - begun

        async def play(host: EnvironmentHost, seed: int, episodes: int) -> int:
            rng = random.Random(seed)
            steps = 0
            for episode in range(episodes):
                _, info = await host.reset(seed=seed * 100 + episode)
                for _ in range(40):
                    command = rng.choice(info["admissible_commands"])
                    *_, terminated, _, info = await host.step(json.dumps({"action": command}))
                    steps += 1
                    if terminated:
                        break
            return steps

        begun = time.perf_counter()
        steps = sum(await asyncio.gather(*(play(host, seed, 1) for seed, host in enumerate(hosts))))
        seconds = time.perf_counter() - begun
        early = [_memory(host.pid) for host in hosts]
        # Twelve more games each, to see whether memory grows.
        await asyncio.gather(*(play(host, seed, 12) for seed, host in enumerate(hosts, 1000)))
        late = [_memory(host.pid) for host in hosts]
    finally:
        await asyncio.gather(*(host.close() for host in hosts))
    return {
        "environments": count,
        "cores": os.cpu_count(),
        "seconds_to_start_all": round(started, 2),
        "steps_per_second": round(steps / seconds, 1),
        "load_average": os.getloadavg()[0],
        "megabytes_each_after_1_game": _means(early),
        "megabytes_each_after_13_games": _means(late),
    }


def _memory(pid: int | None) -> dict[str, float]:
    """Resident, proportional (shared pages divided among their users) and private memory of a process, MB."""
    sizes = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split()[:2]
        sizes[name.rstrip(":")] = int(value) / 1024
    return {
        "resident": sizes["Rss"],
        "proportional": sizes["Pss"],
        "private": sizes["Private_Clean"] + sizes["Private_Dirty"],
    }


def _means(memories: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.fmean(each[name] for each in memories), 1) for name in memories[0]}


if __name__ == "__main__":
    main()
