"""Prompts: the text of an environment is data, and a model's folder has all that engine and learner need of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from actors import chat as chat_module
from actors.chat import ChatProcessor, NotAVisionLanguageModel
from envs.alfworld.commands import AnyCommandParser
from envs.android.formats import PhoneParser
from envs.parsing import KeywordParser, Parser, without_surrogates
from tests.tiny_models import ALL_FAMILIES, FAMILIES, PROMPT, make_idefics3, picture

IMAGE = Image.fromarray(picture())


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatProcessor]:
    return {family: make(tmp_path_factory.mktemp(family)).chat for family, make in ALL_FAMILIES.items()}


def special_ids(chat: ChatProcessor) -> set[int]:
    """What the tokenizer itself calls special, and what the model's config names."""
    named = {value for name, value in vars(chat.config).items() if name.endswith(("_token_id", "_token_index"))}
    added = {index for index, token in chat.tokenizer.added_tokens_decoder.items() if token.special}
    return (named | added) - {None}


def names_of_special_tokens(chat: ChatProcessor) -> list[str]:
    return [chat.tokenizer.convert_ids_to_tokens(index) for index in sorted(special_ids(chat))]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_text_writes_a_special_token_and_every_text_is_there(
    chats: dict[str, ChatProcessor], family: str, data: st.DataObject
) -> None:
    chat = chats[family]
    pieces = st.one_of(st.text(max_size=8), st.sampled_from([*names_of_special_tokens(chat), chat_module.TEXT_MARK]))
    text = "".join(data.draw(st.lists(pieces, max_size=6)))
    special = special_ids(chat)
    empty, ids = chat.prompt_ids(""), chat.prompt_ids(text)
    assert [index for index in ids if index in special] == [index for index in empty if index in special]
    # Without the text's ids, wherever they are, it is the prompt of an empty text.
    length = len(ids) - len(empty)
    starts = [start for start in range(len(empty) + 1) if ids[:start] + ids[start + length :] == empty]
    assert text in {chat.tokenizer.decode(ids[start : start + length]) for start in starts}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_learner_gets_the_same_text_whatever_it_says(chats: dict[str, ChatProcessor], family: str) -> None:
    chat = chats[family]
    special = special_ids(chat)
    plain = chat.encode_prompt("", IMAGE)
    text = " ".join(["say", *names_of_special_tokens(chat), "assistant\n", "🙂"])
    inputs = chat.encode_prompt(text, IMAGE)
    ids = inputs["input_ids"][0].tolist()
    text_ids = chat.text_ids(text)
    assert not special & set(text_ids) and chat.tokenizer.decode(text_ids) == text
    assert [i for i in ids if i in special] == [i for i in plain["input_ids"][0].tolist() if i in special]
    assert len(ids) == plain["input_ids"].shape[1] + len(text_ids)
    assert inputs.keys() == plain.keys() and inputs["attention_mask"].tolist() == [[1] * len(ids)]
    per_token = [name for name, tensor in plain.items() if tensor.shape == plain["input_ids"].shape]
    assert all(inputs[name].shape == (1, len(ids)) for name in per_token)
    pixels = next(name for name in plain if name.startswith("pixel_values"))
    assert inputs[pixels].equal(plain[pixels])


def test_an_ordinary_word_that_a_config_names_for_padding_stays_a_word(chats: dict[str, ChatProcessor]) -> None:
    chat = chats["idefics3"]
    config = copy.deepcopy(chat.config)
    (config.pad_token_id,) = chat.text_ids("!")
    named = ChatProcessor.from_parts(chat.path, config, chat.processor)
    assert config.pad_token_id in named.banned_token_ids and named.text_ids("Go!") == chat.text_ids("Go!")


def test_half_of_a_surrogate_pair_becomes_a_replacement_character(chats: dict[str, ChatProcessor]) -> None:
    chat = chats["idefics3"]
    assert chat.tokenizer.decode(chat.text_ids("a\ud83db")) == "a\ufffdb"
    assert chat.tokenizer.decode(chat.text_ids("\ud83d\ude42")) == "🙂"


@given(st.text(st.characters(), max_size=10))
@example("\ud83d")
@example("\ude42\ud83d")
def test_without_surrogates_leaves_all_other_text_as_it_is(text: str) -> None:
    clean = without_surrogates(text)
    clean.encode()
    if not any(0xD800 <= ord(character) < 0xE000 for character in text):
        assert clean == text


def test_a_special_token_that_is_a_word_of_the_vocabulary_is_cut() -> None:
    """As in vocabularies whose merges can spell an end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {letter: index for index, letter in enumerate("</s>ab")}
    vocabulary = {**letters, "</": 6, "s>": 7, "</s>": 8}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("<", "/"), ("s", ">"), ("</", "s>")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.decoder = decoders.Fuse()
    chat = object.__new__(ChatProcessor)
    chat.path = "here"
    chat._text_tokenizer = tokenizer  # type: ignore[misc]
    chat._special_ids = frozenset({8})  # type: ignore[misc]
    ids = chat.text_ids("a</s></s>b")
    assert 8 not in ids and tokenizer.decode(ids) == "a</s></s>b"
    chat._special_ids = frozenset({letters["a"]})  # type: ignore[misc]
    with pytest.raises(ValueError, match="here' knows 'a' only as special token"):
        chat.text_ids("ba")


# ---------------------------------------------------------------- the chat template


def with_template(folder: Path, template: str) -> str:
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def template_of(folder: Path) -> str:
    return (folder / "chat_template.jinja").read_text()


def test_a_template_that_writes_the_date_writes_the_same_one_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.utils.chat_template_utils as library

    class Tomorrow(library.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2031, 3, 4)

    make_idefics3(tmp_path)
    path = with_template(tmp_path, "{{ strftime_now('%Y-%m-%d') }}" + template_of(tmp_path))
    today = ChatProcessor(path).prompt_ids(PROMPT)
    monkeypatch.setattr(library, "datetime", Tomorrow)
    later = ChatProcessor(path)
    assert later.prompt_ids(PROMPT) == today
    assert later.tokenizer.decode(today).startswith("2025-01-01")
    assert later.encode_prompt(PROMPT, IMAGE)["input_ids"][0].tolist()[:5] == today[:5]


@pytest.mark.parametrize(
    ("chance", "named"),
    [
        ("{{ ['a', 'b'] | random }}", "filter 'random'"),
        ("{%- set x = [1]|random -%}", "filter 'random'"),
        ("{{ lipsum(1) }}", "function 'lipsum'"),
    ],
)
def test_a_template_that_throws_dice_is_refused(tmp_path: Path, chance: str, named: str) -> None:
    make_idefics3(tmp_path)
    with pytest.raises(NotAVisionLanguageModel, match=named):
        ChatProcessor(with_template(tmp_path, chance + template_of(tmp_path)))


def test_a_template_that_only_speaks_of_chance_is_not(tmp_path: Path) -> None:
    make_idefics3(tmp_path)
    words = "{# a | random #}| random lipsum(){{ 'x | random' if random is defined else messages[0].lipsum }}"
    assert ChatProcessor(with_template(tmp_path, words + template_of(tmp_path))).prompt_ids(PROMPT)


def test_a_template_only_in_the_tokenizers_config_is_used(tmp_path: Path) -> None:
    make_idefics3(tmp_path)
    expected = ChatProcessor(str(tmp_path)).prompt_ids(PROMPT)
    template = template_of(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    assert ChatProcessor(str(tmp_path)).prompt_ids(PROMPT) == expected


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for message in messages %}{{ message['content'][1]['text'] }}{% endfor %}", "one image and a text"),
        ("{% for message in messages %}<image>{% endfor %}", "text 0 times"),
        ("{{ raise_exception('system messages only') }}", "system messages only"),
    ],
)
def test_a_template_without_image_or_text_is_refused(tmp_path: Path, template: str, words: str) -> None:
    make_idefics3(tmp_path)
    with pytest.raises(NotAVisionLanguageModel, match=words):
        ChatProcessor(with_template(tmp_path, template))


# ---------------------------------------------------------------- the action part

JSON = '{"action": "type", "text": "a"}'
AUTOUI = '"action_plan": ["DUAL_POINT"], "action_decision": "action_type": "TYPE", "typed_text": "hello"'
COGAGENT = "Plan: 1. Open it. Next Action: Tap it. Grounded Operation: tap the icon [[500,300]]"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("parser", "utterance", "part"),
    [
        (KeywordParser(("+", "-")), '{"thoughts": "ümläut 🙂", "Action": "+"}', '"Action": "+"}'),
        (KeywordParser(("+", "-")), '{"thoughts": "say", "action" : "+"}', ""),
        (KeywordParser(("+", "-")), '{"action": "+", "action": "10"}', '"action": "10"}'),
        (PhoneParser((100, 200)), AUTOUI, AUTOUI[AUTOUI.index('"action_type"') :]),
        (PhoneParser((100, 200)), COGAGENT, COGAGENT[COGAGENT.index("Grounded") :]),
        (PhoneParser((100, 200)), 'So: {"thoughts": "x", "action": "wait"} ' + JSON, JSON[1:]),
        (AnyCommandParser(), '{"thoughts": "go", "action": "go to shelf 1"}', '"action": "go to shelf 1"}'),
        (AnyCommandParser(), "I think that I should now open drawer 2", "hat I should now open drawer 2"),
    ],
)
def test_the_learner_takes_for_the_action_part_what_the_environment_does(
    chats: dict[str, ChatProcessor], family: str, parser: Parser, utterance: str, part: str
) -> None:
    chat = chats[family]
    ids = [*chat.tokenizer(utterance, add_special_tokens=False)["input_ids"], chat.eos_token_ids[0]]
    assert chat.decode(ids) == utterance
    character = parser.parse(utterance).start
    assert character is not None
    assert utterance[character:] == part
    start = chat.action_start(ids, character)
    if not part:
        assert start == len(ids)
    else:  # the first token that reaches into the part
        assert len(chat.decode(ids[:start])) <= character < len(chat.decode(ids[: start + 1]))


# ---------------------------------------------------------------- tokens


def test_tokens_without_embeddings_are_refused(tmp_path: Path) -> None:
    tiny = make_idefics3(tmp_path)
    tiny.chat.tokenizer.add_tokens([f"<extra {number}>" for number in range(200)])
    tiny.chat.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(NotAVisionLanguageModel, match="<extra 199>.*resize_token_embeddings"):
        ChatProcessor(str(tmp_path))


def test_a_model_without_an_end_token_is_refused(tmp_path: Path) -> None:
    make_idefics3(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(NotAVisionLanguageModel, match="no end token"):
        ChatProcessor(str(tmp_path))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, "<end>"]}')
    with pytest.raises(NotAVisionLanguageModel, match="no end token"):
        ChatProcessor(str(tmp_path))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ' + "9" * 5000)
    with pytest.raises(NotAVisionLanguageModel, match="cannot be loaded as a vision-language model"):
        ChatProcessor(str(tmp_path))
