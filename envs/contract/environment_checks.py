"""The checks of an environment, in order. Each takes the environment under test and raises `Broken`."""

from __future__ import annotations

import pickle
import random
import time
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils.env_checker import check_env

from envs.contract.costs import memory, times
from envs.contract.player import NONSENSE, SEED, Environment, Outcome, Player, described, label_space, shown
from envs.contract.result import Broken, Passed
from envs.contract.trace import Script, difference, fingerprint, record, replay
from envs.labels import NOT_APPLICABLE
from envs.parsing import Parser

#: Steps within which an episode must end.
LONGEST_EPISODE = 2_000


def makes(subject: Environment) -> Passed:
    """It can be made from its id and keyword arguments alone, and has a label space."""
    begun = time.perf_counter()
    env = subject.make()
    seconds = time.perf_counter() - begun
    try:
        heads = label_space(env, subject.env_id)
    finally:
        env.close()
    return Passed({"make_s": seconds, "label_heads": len(heads)})


def outputs(subject: Environment) -> Passed:
    """What reset and step return has the entries, types and ranges that a run needs; rewards are finite."""
    valid = steps = 0
    rng = np.random.default_rng(SEED)
    with Player(subject) as player:
        for outcome in player.play(50, rng):
            steps += 1
            valid += outcome.info["valid"]
    note = (
        "no utterance was valid, so only invalid ones are checked: name some that are (--utterance), or define "
        "expert_utterance or random_action"
    )
    return Passed({"steps": steps, "valid_share": valid / steps}, "" if valid else note)


def spaces(subject: Environment) -> Passed:
    """The spaces are those of the contract, and observations lie in them."""
    with Player(subject) as player:
        space, actions = player.env.observation_space, player.env.action_space
        if not isinstance(space, gymnasium.spaces.Dict) or not {"image", "prompt"} <= set(space.spaces):
            raise Broken(f"observation_space must be a Dict with 'image' and 'prompt', not {shown(space)}")
        image, prompt = space["image"], space["prompt"]
        if not isinstance(image, gymnasium.spaces.Box) or image.dtype != np.uint8 or image.shape[2:] != (3,):
            raise Broken(
                f"observation_space['image'] must be a Box of uint8 (height, width, 3), not {shown(image)}: use "
                "envs.spaces.image_space((height, width, 3))"
            )
        for name, text in (("observation_space['prompt']", prompt), ("action_space", actions)):
            if not isinstance(text, gymnasium.spaces.Text):
                raise Broken(f"{name} must be a Text space, not {shown(text)}: use envs.spaces.AnyText()")
        outside = next((utterance for utterance in NONSENSE if not actions.contains(utterance)), None)
        if outside is not None:
            raise Broken(
                f"action_space does not contain {shown(outside)}, but a policy may say any text: use "
                "envs.spaces.AnyText()"
            )
        rng = np.random.default_rng(SEED)
        for outcome in player.play(20, rng):
            for name, value in outcome.returned[0].items():
                if name in space.spaces and not space[name].contains(value):
                    raise Broken(
                        f"observation[{name!r}] is outside of the observation space {space[name]} after "
                        f"{player.calls}: it is {_form(value)}. Its shape and dtype must not change, "
                        "and a prompt's space must be envs.spaces.AnyText()"
                    )
    return Passed()


def gymnasium_checker(subject: Environment) -> Passed:
    """Gymnasium's own checker finds no fault."""
    env = subject.make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_env(env.unwrapped, skip_render_check=True)
        except Exception as error:
            raise Broken(f"gymnasium.utils.env_checker.check_env finds: {described(error)}") from error
        finally:
            env.close()
    said = dict.fromkeys(str(each.message).replace("\x1b[33m", "").replace("\x1b[0m", "") for each in caught)
    return Passed(note="; ".join(f"gymnasium warns: {each[:200]}" for each in said))


def utterances(subject: Environment) -> Passed:
    """Any text has a defined outcome; an invalid one has no action and no labels."""
    slowest = 0.0
    with Player(subject) as player:
        for number, utterance in enumerate(NONSENSE):
            if player.over:
                player.reset(SEED + number)
            outcome = player.step(utterance)
            _consistent(player, outcome)
            slowest = max(slowest, player.step_s[-1])
            if player.step_s[-1] > subject.deadline_s / 3:
                raise Broken(
                    f"{player.calls} takes {player.step_s[-1]:.1f} s: an utterance must be read in time linear in its "
                    "length (a regular expression that backtracks, or a search in a loop, is not)"
                )
    return Passed({"slowest_step_s": slowest, "utterances": len(NONSENSE)})


def parser(subject: Environment) -> Passed:
    """`parse` and `parser` read an utterance as `step` does; `parser` can be pickled and outlives the environment."""
    said: list[tuple[str, dict[str, Any]]] = []
    rng = np.random.default_rng(SEED)
    with Player(subject) as player:
        parse = getattr(player.game, "parse", None)
        outside: Parser | None = getattr(player.game, "parser", None)
        if outside is not None:
            try:
                outside = pickle.loads(pickle.dumps(outside))
            except Exception as error:
                raise Broken(f"the parser cannot be pickled, which a run does: {described(error)}") from error
        for _ in range(30):
            if player.over:
                player.reset(SEED)
            utterance = player.answer(rng)
            before = parse(utterance) if parse else None
            info = player.step(utterance).info
            if before is not None:
                _same_reading(f"parse({shown(utterance)})", before, info)
            said.append((utterance, info))
    for utterance, info in said if outside is not None else []:
        _same_reading(f"parser.parse({shown(utterance)})", outside.parse(utterance), info)  # type: ignore[union-attr]
    missing = [name for name, found in (("parse", parse), ("parser", outside)) if found is None]
    return Passed(note=f"no {' and no '.join(missing)}, which exact influence needs" if missing else "")


def expert(subject: Environment) -> Passed:
    """The expert's utterances are valid, and it draws from the generator that it is given only."""
    successes = steps = 0
    with Player(subject) as player:
        rng = np.random.default_rng(SEED)
        for _ in range(30):
            if player.over:
                player.reset(SEED + steps)
            before = fingerprint(player.env.unwrapped.np_random.bit_generator.state)
            try:
                utterance = player.game.expert_utterance(rng)
            except (AttributeError, NotImplementedError):
                return Passed(note="no expert, which warm starts and demonstrations need (expert_utterance)")
            if fingerprint(player.env.unwrapped.np_random.bit_generator.state) != before:
                raise Broken("expert_utterance draws from self.np_random: it must draw only from the generator it gets")
            outcome = player.step(utterance)
            if not outcome.info["valid"]:
                raise Broken(f"expert_utterance returned {shown(utterance)}, which {player.calls} says is invalid")
            successes += outcome.info["success"]
            steps += 1
    return Passed({"expert_steps": steps, "expert_successes": successes})


def determinism(subject: Environment, in_another_process: Callable[[Script], Any]) -> Passed:
    """The same seed and utterances give the same bytes: again, after other episodes, and in another process."""
    advice = (
        "All chance must come from self.np_random (reset calls super().reset(seed=seed)), and nothing may depend on "
        "the clock, the order of a set, or episodes before"
    )
    script, first = record(subject, SEED)
    random.seed(7)
    np.random.seed(7)
    with Player(subject) as player:
        replays = {"in a new environment": replay(player, script)}
        rng = np.random.default_rng(SEED)
        for _ in player.play(5, rng):
            pass
        replays["in an environment that was played before"] = replay(player, script)
    replays["in another process"] = in_another_process(script)
    for where, trace in replays.items():
        if found := difference(first, trace):
            raise Broken(f"the same seed and utterances gave something else {where}: {found}. {advice}")
    return Passed({"calls_compared": len(first)})


def copies(subject: Environment) -> Passed:
    """What a step returned does not change when the next one is made."""
    rng = np.random.default_rng(SEED)
    held: tuple[str, Any, dict[str, str]] | None = None
    with Player(subject) as player:
        for outcome in player.play(12, rng):
            _unchanged(held, player)
            held = (player.calls, outcome.returned, _prints(outcome.returned))
        player.reset(SEED)
        _unchanged(held, player)
    return Passed()


def ends(subject: Environment) -> Passed:
    """Every episode ends, also one of an agent that says nothing useful."""
    deadline = time.monotonic() + subject.play_s
    longest = 0
    rng = np.random.default_rng(SEED)
    policies: dict[str, Callable[[Player], str]] = {
        "whose utterances are invalid": lambda player: NONSENSE[longest % 5],
        "with random utterances": lambda player: player.answer(rng),
    }
    with Player(subject) as player:
        for agent, answer in policies.items():
            player.reset(SEED)
            steps = 0
            while not player.over:
                player.step(answer(player))
                steps += 1
                if steps >= LONGEST_EPISODE or time.monotonic() > deadline:
                    if steps < LONGEST_EPISODE:
                        return Passed({"longest_episode": steps}, f"no end was seen in {subject.play_s:g} s")
                    raise Broken(
                        f"an episode of an agent {agent} has no end after {steps} steps: a run would play it for ever. "
                        "Give the environment a horizon, or register it with max_episode_steps"
                    )
            longest = max(longest, steps)
    return Passed({"longest_episode": longest})


def after_the_end(subject: Environment) -> Passed:
    """A step after the end fails or returns something legal, and the next episode is as ever."""
    rng = np.random.default_rng(SEED)
    deadline = time.monotonic() + subject.play_s
    with Player(subject) as player:
        first = _prints(player.reset(SEED))
        while not player.over:
            player.step(player.answer(rng))
            if time.monotonic() > deadline:
                return Passed(note="no end was seen, so nothing was checked")
        try:
            player.step(NONSENSE[2])
        except Broken as error:
            if not isinstance(error.__cause__, Exception):
                raise Broken(f"a step after the end of the episode: {error}") from None
        _same_start(first, _prints(player.reset(SEED)), "after a step beyond the episode's end")
    return Passed()


def resets(subject: Environment) -> Passed:
    """Two resets in a row, and one in the middle of an episode, begin the same episode; a seed is optional."""
    with Player(subject) as player:
        first = _prints(player.reset(SEED))
        _same_start(first, _prints(player.reset(SEED)), "right after another reset")
        player.step(NONSENSE[2])
        _same_start(first, _prints(player.reset(SEED)), "in the middle of an episode")
        player.reset(None)
        player.reset(2**31 - 1)
    return Passed()


def closes(subject: Environment) -> Passed:
    """`close` can be called twice, and before a reset."""
    for calls in (["close"], ["reset", "close"]):
        env = subject.make()
        done: list[str] = []
        for call in [*calls, "close"]:
            done.append(f"{call}()")
            try:
                env.reset(seed=SEED) if call == "reset" else env.close()
            except Exception as error:
                raise Broken(f"{', '.join(done)}: the last call raises {described(error)}") from error
    return Passed()


def pickles(subject: Environment) -> Passed:
    """What it returns can go to another process, as every step of a run does."""
    rng = np.random.default_rng(SEED)
    size = 0
    with Player(subject) as player:
        parts: list[tuple[str, Any]] = [("reset", player.reset(SEED))]
        parts += [(player.calls, outcome.returned) for outcome in player.play(10, rng)]
        parts.append(("label_space", label_space(player.env, subject.env_id)))
        for call, value in parts:
            try:
                data = pickle.dumps(value)
                pickle.loads(data)
            except Exception as error:
                raise Broken(
                    f"what {call} returns cannot be pickled: {described(error)}. Put plain values and arrays into info"
                ) from error
            size = max(size, len(data))
    return Passed({"largest_kb": size / 1000})


ENVIRONMENT_CHECKS: dict[str, Callable[..., Passed]] = {
    check.__name__: check
    for check in (
        makes, outputs, spaces, gymnasium_checker, utterances, parser, expert, determinism, copies, ends,
        after_the_end, resets, closes, pickles, times, memory,
    )
}  # fmt: skip


def _consistent(player: Player, outcome: Outcome) -> None:
    action, labels, valid = (outcome.info[name] for name in ("action", "action_labels", "valid"))
    if valid and not (action and (labels != NOT_APPLICABLE).any()):
        raise Broken(f'{player.calls} is valid, but info["action"] is {shown(action)} with labels {labels.tolist()}')
    if not valid and (action or (labels != NOT_APPLICABLE).any()):
        raise Broken(
            f'{player.calls} is invalid, but info["action"] is {shown(action)} with labels {labels.tolist()}: they '
            f'must be "" and all {NOT_APPLICABLE}'
        )


def _same_reading(call: str, parsed: Any, info: dict[str, Any]) -> None:
    said = (parsed.action, parsed.valid, np.asarray(parsed.labels).tolist(), getattr(parsed, "start", None))
    did = (info["action"], info["valid"], info["action_labels"].tolist(), info["action_start"])
    if said != did:
        raise Broken(
            f"{call} says (action, valid, labels, start) = {said}, but the info of step says {did}: let step use parse"
        )


def _prints(returned: Any) -> dict[str, str]:
    return {
        f"{index}.{name}": fingerprint(value)
        for index, part in enumerate(returned)
        if isinstance(part, dict)
        for name, value in part.items()
    }


def _unchanged(held: tuple[str, Any, dict[str, str]] | None, player: Player) -> None:
    if held is None:
        return
    calls, returned, prints = held
    now = _prints(returned)
    changed = [name.partition(".")[2] for name in prints if now.get(name) != prints[name]]
    if changed:
        raise Broken(
            f"{', '.join(changed)} of {calls} changed when {player.calls} was called: return copies, not live objects"
        )


def _same_start(first: dict[str, str], now: dict[str, str], when: str) -> None:
    changed = [name.partition(".")[2] for name in {**first, **now} if first.get(name) != now.get(name)]
    if changed:
        raise Broken(
            f"reset(seed={SEED}) {when} does not begin the same episode: {', '.join(changed)} differs. Reset must set "
            "the whole state anew"
        )


def _form(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else shown(value)
