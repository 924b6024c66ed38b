"""Blackjack to the letter: by hand, against Gymnasium's own Blackjack, and against an exact solution of the game."""

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from gymnasium.envs.toy_text import blackjack as published
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.cards.blackjack import Blackjack, basic_strategy, points
from envs.cards.deck import ALL_CARDS, card, rank

cards = st.sampled_from(ALL_CARDS)


def say(action: str) -> str:
    return json.dumps({"thoughts": "", "action": action})


def at(player: str, dealer: str, draws: str = "", **kwargs: Any) -> Blackjack:
    env = Blackjack(**kwargs)
    state = {"player": player.split(), "dealer": dealer.split(), "draws": draws.split()}
    env.reset(seed=0, options={"state": state})
    return env


def play(env: Blackjack, actions: str) -> tuple[float, bool]:
    """(reward, terminated) of the last action."""
    for action in actions.split():
        _, reward, terminated, truncated, _ = env.step(say(action))
        assert not truncated
    return reward, terminated


@pytest.mark.parametrize(
    ("player", "dealer", "draws", "actions", "reward", "ends"),
    [
        ("HT D9", "SJ D8", "", "stand", 1, True),  # 19 against 18
        ("HT D8", "SJ D8", "", "stand", 0, True),  # a draw
        ("HT D7", "SJ D8", "", "stand", -1, True),
        ("H5 D2", "SJ D6", "SK", "stand", 1, True),  # the dealer draws to 26
        ("H5 D2", "SJ D6", "SA", "stand", -1, True),  # the dealer draws to 17 and stands
        ("HT D8", "SA D6", "SK", "stand", 1, True),  # a soft 17 stands
        ("HT D8", "SA D5", "SK SA", "stand", 1, True),  # soft 16, hard 16, 17
        ("HT D8", "S2 D2", "S2 S2 S2 S2 S2 S3", "stand", 1, True),  # 2 six times is 14 without a 17: then 3 is 17
        ("HT D6", "SJ D8", "S2", "hit", 0, False),
        ("HT D6", "SJ D8", "S5", "hit stand", 1, True),  # 21
        ("HT D6", "SJ D8", "S6", "hit", -1, True),  # 22 is over
        ("HA D6", "SJ D8", "SK", "hit", 0, False),  # soft 17 to hard 17
        ("HA DA", "SJ D8", "S9", "hit stand", 1, True),  # 11 + 1 + 9
        ("HA DK", "SJ D8", "", "stand", 1, True),
        ("HA DK", "SA DK", "", "stand", 0, True),
        ("HA DK", "S5 D6", "SK", "stand", 0, True),  # 21 is 21, however made
    ],
)
def test_hands_by_hand(player: str, dealer: str, draws: str, actions: str, reward: float, ends: bool) -> None:
    assert play(at(player, dealer, draws), actions) == (reward, ends)


@pytest.mark.parametrize(
    ("player", "dealer", "draws", "flags", "reward"),
    [
        ("HA DK", "SJ D8", "", {"natural": True}, 1.5),
        ("HA DK", "SA DK", "", {"natural": True}, 0),
        ("HA D5 C5", "SJ D8", "", {"natural": True}, 1),  # 21 with three cards is none
        ("HA DK", "S5 D6", "SK", {"natural": True}, 0),  # a natural does not beat another 21 by itself
        ("HA DK", "S5 D6", "SK", {"sab": True}, 1),  # but here it does
        ("HA DK", "SA DK", "", {"sab": True}, 0),
        ("HA DK", "SJ D8", "", {"sab": True, "natural": True}, 1),  # natural is ignored
    ],
)
def test_naturals(player: str, dealer: str, draws: str, flags: dict[str, bool], reward: float) -> None:
    assert play(at(player, dealer, draws, **flags), "stand") == (reward, True)


@given(
    st.lists(cards, min_size=4, max_size=4),
    st.lists(cards, min_size=40, max_size=40),
    st.lists(st.sampled_from(["hit", "stand"]), min_size=1, max_size=6),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_every_hand_goes_as_in_gymnasiums_blackjack(
    hands: list[str], draws: list[str], actions: list[str], natural: bool, sab: bool
) -> None:
    ours = at(" ".join(hands[:2]), " ".join(hands[2:]), " ".join(draws), natural=natural, sab=sab)
    theirs = published.BlackjackEnv(natural=natural, sab=sab)
    values = [min(rank(code), 10) for code in [*hands, *draws]]
    theirs.player, theirs.dealer = values[:2], values[2:4]
    rest = iter(values[4:])
    patch = pytest.MonkeyPatch()
    patch.setattr(published, "draw_card", lambda rng: next(rest))
    try:
        for action in actions:
            _, reward, terminated, truncated, info = ours.step(say(action))
            (total, dealer, soft), expected, ended, cut, _ = theirs.step(int(action == "hit"))
            assert (reward, terminated, truncated) == (expected, ended, cut)
            assert points(info["state"]["player"]) == (total, bool(soft))
            assert min(rank(info["state"]["dealer"][0]), 10) == dealer
            assert info["success"] is (reward > 0)
            if terminated:
                break
    finally:
        patch.undo()


# An exact solution of these rules. A hand is its points with aces as 1, and whether it has an ace.
Hand = tuple[int, bool]
CHANCES = {value: 1 / 13 for value in range(1, 10)} | {10: 4 / 13}


def counted(hand: Hand) -> int:
    return hand[0] + 10 if hand[1] and hand[0] <= 11 else hand[0]


def added(hand: Hand, value: int) -> Hand:
    return hand[0] + value, hand[1] or value == 1


@cache
def dealer_ends(hand: Hand) -> dict[int, float]:
    """Probabilities of the points a dealer's hand ends with (over 21: 22)."""
    if counted(hand) >= 17:
        return {min(counted(hand), 22): 1.0}
    ends: dict[int, float] = {}
    for value, chance in CHANCES.items():
        for end, probability in dealer_ends(added(hand, value)).items():
            ends[end] = ends.get(end, 0.0) + chance * probability
    return ends


@cache
def stand_value(hand: Hand, shown: int) -> float:
    mine = counted(hand)
    return sum(
        probability * ((end == 22 or mine > end) - (end != 22 and mine < end))
        for end, probability in dealer_ends((shown, shown == 1)).items()
    )


@cache
def hit_value(hand: Hand, shown: int) -> float:
    return sum(
        chance * (-1.0 if counted(after) > 21 else max(stand_value(after, shown), hit_value(after, shown)))
        for value, chance in CHANCES.items()
        for after in [added(hand, value)]
    )


@pytest.mark.parametrize(
    ("total", "shown", "value"),
    [(9, 2, 0.0744), (10, 5, 0.2563), (11, 2, 0.2384), (4, 7, -0.0883), (6, 6, -0.0130)],
)
def test_the_exact_solution_agrees_with_a_published_one(total: int, shown: int, value: float) -> None:
    """Values of hard hands by Rein Halbersma's dynamic program (github.com/rhalbersma/doctrina), to four digits."""
    assert max(stand_value((total, False), shown), hit_value((total, False), shown)) == pytest.approx(value, abs=5e-5)


def test_basic_strategy_takes_the_best_action_in_every_situation() -> None:
    for shown in range(1, 11):
        dealer = card(shown, 0)
        for first in range(1, 11):
            for second in range(1, 11):
                for third in range(11):
                    values = [first, second] + [third] * (third > 0)
                    hand = (sum(values), 1 in values)
                    if counted(hand) > 21:
                        continue
                    best = "hit" if hit_value(hand, shown) > stand_value(hand, shown) else "stand"
                    assert basic_strategy([card(value, 1) for value in values], dealer) == best, (values, shown)


def test_200_000_hands_of_basic_strategy_return_what_the_exact_solution_says() -> None:
    expected = 0.0
    for first, p in CHANCES.items():
        for second, q in CHANCES.items():
            for shown, r in CHANCES.items():
                hand = added((first, first == 1), second)
                expected += p * q * r * max(stand_value(hand, shown), hit_value(hand, shown))
    assert expected == pytest.approx(-0.046556, abs=1e-6)
    env = Blackjack()
    env.reset(seed=1)
    # The rules alone: what is drawn on the canvas does not matter here, and takes most of a step's time.
    env._draw_table = env._draw_player = lambda: None  # type: ignore[method-assign]
    rewards = np.zeros(200_000)
    for hand_number in range(len(rewards)):
        env._set_state(None)
        ended = False
        while not ended:
            rewards[hand_number], ended, _ = env._act(basic_strategy(env._player, env._dealer[0]))
    error = rewards.std() / len(rewards) ** 0.5
    assert abs(rewards.mean() - expected) < 3 * error


def test_the_deck_is_infinite_and_uniform() -> None:
    env = Blackjack()
    env.reset(seed=2)
    seen = dict.fromkeys(ALL_CARDS, 0)
    for _ in range(1300):
        env.reset()
        for code in [*env.state["player"], *env.state["dealer"]]:
            seen[code] += 1
    assert all(abs(count - 100) < 50 for count in seen.values())


def test_nothing_tells_the_hidden_card() -> None:
    def everything(hidden: str) -> list[Any]:
        env = at("H5 D2", f"SJ {hidden}", "H2 H3")
        observation, info = env.reset(
            options={"state": {"player": ["H5", "D2"], "dealer": ["SJ", hidden], "draws": ["H2", "H3"]}}
        )
        told = [observation["image"].tobytes(), observation["prompt"], repr(info), env.state_labels().tolist()]
        rng = np.random.default_rng(0)
        for _ in range(2):
            told.append(env.expert_utterance(rng))
            observation, *_, info = env.step(say("hit"))
            told += [observation["image"].tobytes(), observation["prompt"], repr(info)]
        return told

    assert everything("D5") == everything("CA")


def test_what_info_shows_can_be_played_on_from() -> None:
    env = at("H5 D2", "SJ D5", "H2")
    info = env.step(say("hit"))[4]
    assert info["state"] == {"player": ["H5", "D2", "H2"], "dealer": ["SJ"]}
    info["state"]["player"].clear()
    assert env.state["player"] == ["H5", "D2", "H2"]
    other = Blackjack()
    hidden = set()
    for seed in range(30):
        observation, again = other.reset(seed=seed, options={"state": env.public_state})
        assert again["state"] == env.public_state
        assert np.array_equal(observation["image"], env._picture())
        hidden.add(other.state["dealer"][1])
    assert len(hidden) > 10


def test_no_hand_is_longer_than_the_horizon_and_invalid_answers_end_too() -> None:
    aces = " ".join(["SA"] * 20)
    env = at("SA SA", "SJ D8", aces)
    assert play(env, " ".join(["hit"] * 19)) == (0, False)
    assert play(env, "hit") == (-1, True)
    env = at("SA SA", "SJ D8", invalid_action="noop")
    outcomes = [env.step("hit or stand")[1:4] for _ in range(env.horizon)]
    assert outcomes == [(0, False, False)] * 20 + [(0, False, True)]


@pytest.mark.parametrize("count", range(2, 23))
def test_any_hand_fits_the_canvas_and_shows_each_card(count: int) -> None:
    """Whichever card of a hand is changed, at any place of it, the picture changes, in rank and in suit."""

    def picture(hand: list[str]) -> np.ndarray:
        env = Blackjack()
        env.reset(seed=0, options={"state": {"player": hand[:2], "dealer": ["C9", "C9"], "draws": hand[2:]}})
        env._player = list(hand)
        env._draw_player()
        return env._picture()

    hand = ["SA"] * count
    before = picture(hand)
    for place in range(count):
        for other, pixels in (("S4", 60), ("DA", 60)):
            changed = np.any(picture([*hand[:place], other, *hand[place + 1 :]]) != before, axis=-1)
            assert changed.sum() > pixels, (place, other)


def test_the_expert_says_what_it_sees_and_does_the_best() -> None:
    rng = np.random.default_rng(0)
    said = json.loads(at("HA D6", "SK D5").expert_utterance(rng))
    assert said == {
        "dealer": "K",
        "player": "A 6",
        "thoughts": "I have soft 17 and the dealer shows K the book says hit so I should hit",
        "action": "hit",
    }
    answers = [json.loads(at("HT D9", "SK D5").expert_utterance(rng, 0.6, "hit")) for _ in range(1000)]
    assert all(said["thoughts"].endswith(said["action"]) for said in answers)
    assert abs(sum(said["action"] == "hit" for said in answers) - 600) < 80


def test_state_labels_fit_their_sizes_up_to_the_worst_bust() -> None:
    env = at("HT DA", "SA D5", "SK SK")
    assert env.state_labels().tolist() == [0, 21, 1, 9, 0, -1, -1]
    play(env, "hit hit")
    assert env.state_labels().tolist() == [0, 31, 0, 9, 0, 12, 12]
    assert len(env.state_label_names) == len(env.state_label_sizes)
    assert all(label < size for label, size in zip(env.state_labels(), env.state_label_sizes, strict=True))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"player": ["H5", "D2"]}, "'player', 'dealer' and optionally 'draws'"),
        ({"player": ["H5", "D2"], "dealer": ["SJ", "DJ"], "deck": []}, "'player', 'dealer' and optionally 'draws'"),
        ({"player": ["H5"], "dealer": ["SJ", "DJ"]}, "two cards or more"),
        ({"player": ["HT", "DT", "C5"], "dealer": ["SJ", "DJ"]}, "at most 21 points"),
        ({"player": ["H5", "D2"], "dealer": []}, "the card shown and the hidden one"),
        ({"player": ["H5", "D2"], "dealer": ["S1", "DJ"]}, "'S1', which is not a card"),
        ({"player": ["H5", "D2"], "dealer": ["SJ", "DJ"], "draws": "S2"}, "'draws' must be a list"),
    ],
)
def test_a_state_that_cannot_be_is_refused_in_words(state: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Blackjack().reset(seed=0, options={"state": state})
