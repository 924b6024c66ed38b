"""EZPoints and Points24 to the letter: rules, deals, length limits, pictures, expert."""

import json
import random
from collections import Counter
from typing import Any

import gymnasium
import numpy as np
import pytest

from envs.cards.deck import RANKS, rank
from envs.cards.formula_game import FormulaGame
from envs.cards.points import EZPoints, Points24
from envs.cards.solver import solvable
from envs.drawing import text_block


def say(action: str) -> str:
    return json.dumps({"thoughts": "", "action": action})


def ez(cards: str, formula: list[str] | None = None, **kwargs: Any) -> EZPoints:
    return begun(EZPoints(**kwargs), cards, formula)


def p24(cards: str, formula: list[str] | None = None, **kwargs: Any) -> Points24:
    return begun(Points24(**kwargs), cards, formula)


def begun(env: Any, cards: str, formula: list[str] | None) -> Any:
    env.reset(seed=0, options={"state": {"cards": cards.split(), **({"formula": formula} if formula else {})}})
    return env


def play(env: FormulaGame, actions: str) -> list[tuple[float, bool, bool]]:
    """(reward, terminated, truncated) of each action, words with spaces between."""
    return [env.step(say(action))[1:4] for action in actions.split()]


GOES_ON, COSTS, WON, LOST, CUT = (
    (0, False, False),
    (-1, False, False),
    (10, True, False),
    (-1, True, False),
    (-1, False, True),
)


@pytest.mark.parametrize(
    ("cards", "actions", "outcomes"),
    [
        ("D3 H9", "3 + 9 =", [GOES_ON] * 3 + [WON]),
        ("D3 C4", "4 * 3 =", [GOES_ON] * 3 + [WON]),
        ("HT H2", "2 + 10 =", [GOES_ON] * 3 + [WON]),
        ("HK H2", "2 + 10 =", [GOES_ON] * 3 + [WON]),  # a king counts as 10
        ("SA S2", "1 2 =", [GOES_ON] * 2 + [WON]),  # adjacent numbers join: 12
        ("D3 H9", "+ 3 + 9 =", [GOES_ON] * 4 + [WON]),  # a sign before a number
        ("D3 H9", "3 + + 9 =", [GOES_ON] * 4 + [WON]),
        ("D3 H9", "3 * 9 =", [GOES_ON] * 3 + [LOST]),  # 27
        ("D3 C4", "3 * * 4 =", [GOES_ON] * 4 + [LOST]),  # no operator
        ("D3 H9", "=", [LOST]),  # no formula
        ("D3 H9", "3 =", [GOES_ON, LOST]),
        ("HT H2", "2 + 2 + 10 =", [GOES_ON, GOES_ON, COSTS, GOES_ON, GOES_ON, WON]),  # 2 + _ + 10: the blank is nothing
        ("D6 H6", "6 + 6 =", [GOES_ON] * 3 + [WON]),
        ("D6 H6", "6 + 6 6 =", [GOES_ON] * 3 + [COSTS, WON]),  # a number used up costs, and leaves a blank behind
        ("D3 H9", "4 3 + 9 =", [COSTS] + [GOES_ON] * 3 + [WON]),  # a number not held
        ("SA S2", "1 3 2 =", [GOES_ON, COSTS, GOES_ON, LOST]),  # 1 _ 2: with a blank between they do not join
        ("D3 H9", "3 + 9 + =", [GOES_ON] * 4 + [LOST]),
        ("D3 H9", "1 1 1 1 1 1 3", [COSTS] * 6 + [CUT]),
        ("D3 H9", "+ + + + + + =", [GOES_ON] * 6 + [CUT]),  # six entries are too many, also for =
        ("D3 H9", "+ + + 3 + 9 =", [GOES_ON] * 6 + [CUT]),
        ("D3 H9", "+ + 3 + 9 =", [GOES_ON] * 5 + [WON]),  # five are not
    ],
)
def test_ezpoints_by_hand(cards: str, actions: str, outcomes: list[tuple[float, bool, bool]]) -> None:
    env = ez(cards)
    assert play(env, actions) == outcomes
    if outcomes[-1][1] or outcomes[-1][2]:
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step(say("="))


@pytest.mark.parametrize(
    ("cards", "actions", "last"),
    [
        ("H8 D8 C3 S3", "8 / ( 3 - 8 / 3 ) =", WON),  # exactly 24; in floating point it is not
        ("SA S2 S3 S4", "1 * 2 * 3 * 4 =", WON),
        ("H4 DK C6 S2", "10 + 2 * 6 + 2 =", LOST),  # the 2 is used twice: 10 + 2 * 6 + _
        ("H4 DK C6 S2", "( 10 - 4 ) * ( 6 - 2 ) =", WON),
        ("HK DQ CJ ST", "10 + 10 + 10 + 10 =", LOST),
        ("HT DT C4 S4", "10 * 10 - 4 =", LOST),  # a card is left
        ("HT DT C4 S4", "( 10 * 10 - 4 ) / 4 =", WON),
        ("H2 D4 CK SK", "2 4 + 10 - 10 =", WON),  # 24 + 10 - 10
        ("H2 D4 CK SK", "2 4 =", LOST),  # worth 24, but cards are left
        ("H4 D6 C2 S2", "4 * 6 / ( 2 - 2 ) =", LOST),  # division by zero
        ("H4 D6 CA S2", "- 4 * - 6 * 1 / 2 =", LOST),
        ("H4 D6 CA SA", "- 4 * - 6 * 1 / 1 =", WON),
        ("H4 D6 CA SA", "4 * 6 / / 1 * 1 =", LOST),  # floor division is no operator
        ("H4 D6 CA SA", "( 4 * 6 * 1 * 1 =", LOST),
        ("H4 D6 CA SA", "4 6 1 1 ) =", LOST),
        ("H4 D6 CA SA", "( ( ( ( 4 ) ) ) ) * 6 * 1 / ( 1 ) =", WON),
    ],
)
def test_points24_by_hand(cards: str, actions: str, last: tuple[float, bool, bool]) -> None:
    *before, end = play(p24(cards), actions)
    assert end == last
    assert set(before) <= {GOES_ON, COSTS}


def test_points24_is_cut_off_on_the_22nd_step_and_not_before() -> None:
    assert play(p24("H4 D6 CA SA"), "+ " * 21 + "=") == [GOES_ON] * 21 + [CUT]
    # 20 entries and then = is still in time.
    assert play(p24("H4 D6 CA SA"), "+ " * 13 + "4 * 6 / 1 / 1 =") == [GOES_ON] * 20 + [WON]
    assert play(p24("H4 D6 CA SA"), "+ " * 14 + "4 * 6 / 1 / 1 =") == [GOES_ON] * 21 + [CUT]
    assert (Points24().horizon, EZPoints().horizon) == (22, 7)


@pytest.mark.parametrize("policy", ["penalty", "noop"])
def test_invalid_answers_that_do_nothing_still_use_up_the_episode(policy: str) -> None:
    for env, steps in ((ez("D3 H9", invalid_action=policy), 7), (p24("H4 D6 CA SA", invalid_action=policy), 22)):
        outcomes = [env.step("hm")[1:4] for _ in range(steps)]
        assert outcomes == [(-1 if policy == "penalty" else 0, False, step == steps) for step in range(1, steps + 1)]
        assert env.state["formula"] == []


def test_an_invalid_answer_does_a_random_action_of_all_there_are() -> None:
    env = p24("H4 D6 CA SA", invalid_action="random")
    drawn: Counter[str] = Counter()
    for _ in range(1700):
        env.reset(options={"state": {"cards": ["H4", "D6", "CA", "SA"]}})
        info = env.step("4 and 6")[4]
        assert (info["action"], info["valid"], info["action_labels"].tolist()) == ("", False, [-1])
        drawn[info["executed_action"]] += 1
    assert set(drawn) == set(env.action_words) and len(drawn) == 17
    # mean 100, standard deviation 9.7
    assert max(abs(count - 100) for count in drawn.values()) < 50


@pytest.mark.parametrize(
    ("utterance", "action"),
    [('"action": "10"', "10"), ('"action": "1"', "1"), ('"action": "1 or 10"', ""), ('"action": "101"', "")],
)
def test_ten_is_read_before_one(utterance: str, action: str) -> None:
    assert ez("ST SA").parse(utterance).action == action


def test_faces_can_count_as_eleven_to_thirteen() -> None:
    env = p24("HK DQ CA SJ", treat_face_cards_as_10=False)
    assert env.action_words[:13] == tuple(str(number) for number in range(1, 14))
    assert "11, 12 and 13" in env.prompt and "13" in env.prompt
    assert env.parse('"action": "13"').action == "13"
    assert play(env, "13 + 12 - 1 + 11 - 11 =")[-1] == LOST
    assert play(p24("HK DQ CA SA", treat_face_cards_as_10=False), "13 + 12 * 1 - 1 =")[-1] == WON
    assert p24("HK DQ CA SA").parse('"action": "13"').action == "", "in a game up to 10 it names both 1 and 3"


def test_other_targets() -> None:
    assert play(ez("D3 H9", target_points=27), "3 * 9 =")[-1] == WON
    assert play(p24("H4 D6 CA SA", target_points=12), "4 + 6 + 1 + 1 =")[-1] == WON
    assert "worth 27" in ez("D3 H9", target_points=27).prompt


def test_the_deal_of_ezpoints_has_the_published_probabilities() -> None:
    expected: Counter[tuple[int, int]] = Counter()  # of 48ths
    for first in range(2, 14):
        number = min(first, 10)
        for partner in [12 // number, 12 - number] if number in (2, 3, 4, 6) else [12 - number] * 2:
            expected[first, partner] += 1
            expected[partner, first] += 1
    env = EZPoints()
    env.reset(seed=1)
    draws = 4800
    seen: Counter[tuple[int, int]] = Counter()
    suits: Counter[str] = Counter()
    for _ in range(draws):
        cards = env.reset()[1]["state"]["cards"]
        seen[rank(cards[0]), rank(cards[1])] += 1
        suits.update(code[0] for code in cards)
    assert set(seen) == set(expected)
    for pair, weight in expected.items():
        mean = draws * weight / 48
        assert abs(seen[pair] - mean) < 5 * mean**0.5, pair
    assert all(abs(suits[suit] - draws / 2) < 5 * (draws * 3 / 8) ** 0.5 for suit in "CDHS")


def test_the_deal_of_points24_is_uniform_and_a_quarter_of_it_cannot_be_solved() -> None:
    env = Points24()
    env.reset(seed=1)
    ranks: Counter[int] = Counter()
    unsolvable = 0
    deals = 2600
    for _ in range(deals):
        cards = env.reset()[1]["state"]["cards"]
        ranks.update(map(rank, cards))
        unsolvable += not solvable([min(rank(code), 10) for code in cards], 24)
    assert all(abs(ranks[value] - 4 * deals / 13) < 5 * (4 * deals / 13) ** 0.5 for value in range(1, 14))
    assert 0.2 < unsolvable / deals < 0.3


def test_solvable_only_and_max_rank_narrow_the_deal() -> None:
    env = Points24(solvable_only=True, max_rank=6)
    env.reset(seed=0)
    for _ in range(100):
        numbers = [rank(code) for code in env.reset()[1]["state"]["cards"]]
        assert max(numbers) <= 6 and solvable(numbers, 24)


@pytest.mark.parametrize("game", [EZPoints, Points24])
def test_the_expert_solves_every_deal_that_can_be_solved(game: type[FormulaGame]) -> None:
    env: Any = game(solvable_only=True) if game is Points24 else game()
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    for _ in range(60):
        env.reset()
        plans = set()
        while True:
            said = json.loads(env.expert_utterance(rng))
            assert list(said) == ["cards", "formula", "thoughts", "action"]
            assert said["cards"].split() == ["10" if code[1] == "T" else code[1] for code in env.state["cards"]]
            assert said["thoughts"].endswith(f"so I should say {said['action']}")
            begun = "" if said["formula"] == "empty" else said["formula"] + " "
            rest = said["thoughts"].removeprefix("then ").split(" makes ")[0]
            assert rest.split()[0] == said["action"]
            plans.add(begun + rest)
            _, reward, terminated, truncated, _ = env.step(say(said["action"]))
            if terminated or truncated:
                break
            assert reward == 0
        assert (reward, truncated) == (10, False)
        assert len(plans) == 1, "a plan that is followed stays the same"


def test_the_expert_gives_up_at_once_where_nothing_helps_and_mends_what_noise_did() -> None:
    rng = np.random.default_rng(0)
    assert json.loads(p24("HA DA CA SA").expert_utterance(rng))["action"] == "="
    assert "nothing makes 24" in p24("HA DA CA SA").expert_utterance(rng)
    # 3 * would be fine for 3 * 4; for 3 + 9 it is not.
    assert json.loads(ez("D3 H9", ["3", "*"]).expert_utterance(rng))["action"] == "="
    assert json.loads(ez("D3 H9", ["+"]).expert_utterance(rng))["action"] in "39"
    env = p24("H4 D6 CA SA", ["("])
    while not (done := env.step(env.expert_utterance(rng)))[2]:
        pass
    assert done[1] == 10


def test_expert_noise_is_the_share_of_habits_or_of_random_actions() -> None:
    rng = np.random.default_rng(0)
    env = ez("D3 H9")
    habits = [json.loads(env.expert_utterance(rng, 0.5, "="))["action"] for _ in range(1000)]
    assert set(habits) == {"3", "="} and abs(habits.count("=") - 500) < 80
    random_ones = [json.loads(env.expert_utterance(rng, 0.5))["action"] for _ in range(1000)]
    assert set(random_ones) == set(env.action_words)


def test_the_prompt_states_rules_actions_and_the_formula_of_now() -> None:
    env = p24("H8 D8 C3 S3")
    assert "Formula: empty ." in env.prompt
    play(env, "8 / 5 (")
    assert "Formula: 8 / _ ( ." in env.prompt
    assert "24" in env.prompt and "1 2 3 4 5 6 7 8 9 10 + - * / ( ) =" in env.prompt
    assert env.prompt.rindex('"action"') > env.prompt.rindex('"thoughts"') > env.prompt.rindex('"cards"')
    env.reset(options={"state": {"cards": ["H8", "D8", "C3", "S3"]}})
    assert "Formula: empty ." in env.prompt, "a new episode starts with a formula of its own"


def test_info_holds_copies() -> None:
    env = ez("D3 H9")
    info = env.step(say("3"))[4]
    info["state"]["cards"].clear()
    info["state"]["formula"].append("9")
    assert env.state == {"cards": ["D3", "H9"], "formula": ["3"]}


def test_a_state_taken_on_the_way_goes_on_as_the_episode_did() -> None:
    rng = random.Random(0)
    for _ in range(40):
        env = Points24(invalid_action="noop")
        env.reset(seed=rng.randrange(1000))
        for _ in range(rng.randrange(22)):
            if any(env.step(say(rng.choice(env.action_words[:-1])))[2:4]):
                break
        else:
            other = Points24(invalid_action="noop")
            observation, _ = other.reset(options={"state": env.state})
            action = say(rng.choice(env.action_words))
            first, second = env.step(action), other.step(action)
            assert first[1:4] == second[1:4] and first[4]["state"] == second[4]["state"]
            assert np.array_equal(first[0]["image"], second[0]["image"])


@pytest.mark.parametrize("game", [EZPoints, Points24])
def test_what_is_drawn_entry_by_entry_is_what_would_be_drawn_at_once_and_fits(game: type[FormulaGame]) -> None:
    env: Any = game()
    rng = random.Random(1)
    for trial in range(40):
        env.reset(seed=trial)
        tens = ["HT", "HJ", "HQ", "HK"][: env.card_count]
        env.reset(options={"state": {"cards": tens}} if trial % 2 else None)
        for _ in range(env.max_entries + 1):
            # As wide as can be: mostly tens and wide operators, in any order.
            env.step(say(rng.choice([*env.numbers[-1:] * 2, *env.operators, "1"])))
            assert env._cursor[1] + len(text_block("0", env.entry_px, "white", "black")) <= env.image_shape[0]
            assert env._cursor[0] <= env.image_shape[1]
        other: Any = game()
        at_once, _ = other.reset(options={"state": env.state})
        assert np.array_equal(at_once["image"], env._picture())


def test_state_labels_are_the_ranks() -> None:
    env = p24("HA DT C4 SK")
    assert env.state_labels().tolist() == [0, 9, 3, 12] and env.state_label_sizes == (len(RANKS),) * 4


@pytest.mark.parametrize(
    ("game", "state", "words"),
    [
        (EZPoints, {"cards": ["D3"]}, "must be 2 cards, not 1"),
        (Points24, {"cards": ["D3", "D4"]}, "must be 4 cards, not 2"),
        (EZPoints, {"cards": ["D3", "D1"]}, "'D1', which is not a card"),
        (EZPoints, {"cards": ["D3", 4]}, "4, which is not a card"),
        (EZPoints, {"cards": "D3"}, "must be a list"),
        (EZPoints, {"card": ["D3", "D4"]}, "has 'cards'"),
        (EZPoints, {"cards": ["D3", "D4"], "formula": "3"}, "must be a list of entries"),
        (EZPoints, {"cards": ["D3", "D4"], "formula": ["="]}, "must be a list of entries"),
        (EZPoints, {"cards": ["D3", "D4"], "formula": ["5"]}, "uses 5 more often"),
        (EZPoints, {"cards": ["D3", "D4"], "formula": ["+"] * 7}, "6 entries at most"),
    ],
)
def test_a_state_that_cannot_be_is_refused_in_words(game: type[Any], state: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        game().reset(seed=0, options={"state": state})


@pytest.mark.parametrize(
    ("game", "kwargs", "words"),
    [
        (EZPoints, {"target_points": 0}, "target_points"),
        (Points24, {"target_points": "24"}, "target_points"),
        (Points24, {"max_rank": 14}, "max_rank"),
        (EZPoints, {"invalid_action": "ignore"}, "random, penalty, noop"),
    ],
)
def test_bad_settings_are_refused_in_words(game: type[Any], kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        game(**kwargs)
