"""What a tokenizer says of an answer's parts, on any text and any tokens; what is refused as a model."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from actors.chat import ChatProcessor, NotAVisionLanguageModel
from tests.tiny_models import FAMILIES, PROMPT, TEXTS, make_idefics3

answers = st.one_of(
    st.text(),
    st.builds(
        "{}{}{}".format,
        st.text(max_size=12),
        st.sampled_from(['"action":', '"action" :', '"action"\n:', '"action"', '"action": "+", "action": ']),
        st.text(max_size=12),
    ),
)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return make_idefics3(tmp_path_factory.mktemp("idefics3")).chat


@pytest.fixture(scope="module")
def token_bytes(chat):
    """The bytes behind every token id, from the byte-level alphabet itself (specials as written)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    special = set(chat.tokenizer.all_special_ids)
    tokens = chat.tokenizer.convert_ids_to_tokens(list(range(len(chat.tokenizer))))
    return [
        token.encode() if index in special else bytes(byte_of[character] for character in token)
        for index, token in enumerate(tokens)
    ]


def _slow_action_start(pieces):
    """The token that holds the byte at which the last `"action":` begins."""
    starts = [match.start() for match in re.finditer(rb'"action"[ \t\n\r\f\v]*:', b"".join(pieces))]
    if not starts:
        return len(pieces)
    end = 0
    for index, piece in enumerate(pieces):
        end += len(piece)
        if end > starts[-1]:
            return index
    raise AssertionError("the match lies beyond the text")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=answers)
@example('naïve "thoughts" 🙂🙂 "action": "+"')
@example('say "action": twice, "action": "-"')
def test_token_texts_join_to_the_answer_and_the_action_part_begins_at_its_key(chat, token_bytes, text):
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = chat.token_texts(ids)
    assert len(texts) == len(ids) and "".join(texts) == text
    start = chat.action_start(ids)
    assert start == _slow_action_start([token_bytes[index] for index in ids])
    matches = list(re.finditer(r'"action"\s*:', text))
    if matches:
        assert len("".join(texts[:start])) <= matches[-1].start() < len("".join(texts[: start + 1]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_ids_at_all_have_texts_and_an_action_start(chat, token_bytes, data):
    """Sampled ids need not be what a tokenizer would give: characters in pieces, bytes that are no text at all."""
    key = chat.tokenizer('"action":', add_special_tokens=False)["input_ids"]
    allowed = sorted(set(range(len(token_bytes))) - set(chat.banned_token_ids))
    high_bytes = [index for index in allowed if token_bytes[index][0] >= 0x80]
    some = st.lists(st.one_of(st.sampled_from(allowed), st.sampled_from(high_bytes)), max_size=8)
    ids = data.draw(some) + data.draw(st.sampled_from([[], key])) + data.draw(some)
    pieces = [token_bytes[index] for index in ids]
    texts = chat.token_texts(ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == b"".join(pieces).decode("utf-8", errors="replace")
    assert chat.action_start(ids) == _slow_action_start(pieces)


def test_a_character_of_several_tokens_belongs_to_the_last_of_them(chat):
    ids = chat.tokenizer("a€b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5
    assert chat.token_texts(ids) == ["a", "", "", "€", "b"]


def test_nothing_has_no_texts(chat):
    assert chat.token_texts([]) == [] and chat.action_start([]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_may_not_be_sampled_but_an_answer_may_end(family, tmp_path):
    tiny = FAMILIES[family](tmp_path)
    banned = set(tiny.chat.banned_token_ids)
    image = {getattr(tiny.model.config, name, None) for name in ("image_token_id", "image_token_index")}
    assert image - {None} and image - {None} <= banned
    assert set(tiny.chat.tokenizer.all_special_ids) - banned == set(tiny.chat.eos_token_ids) != set()
    assert not banned & set(tiny.chat.tokenizer(" ".join(TEXTS))["input_ids"])
    # gemma3's config also says how many tokens an image takes, which is no token id.
    assert max(banned) < 8


def test_the_generation_config_decides_what_ends_an_answer(chat):
    parts = ChatProcessor.from_parts(chat.path, chat.config, chat.processor, eos_token_id=[9, 1])
    assert parts.eos_token_ids == [1, 9]
    assert ChatProcessor.from_parts(chat.path, chat.config, chat.processor).eos_token_ids == [
        chat.tokenizer.eos_token_id
    ]


def test_a_start_token_of_both_template_and_tokenizer_comes_once(tmp_path):
    from PIL import Image
    from tokenizers.processors import TemplateProcessing

    from tests.tiny_models import make_llava_next, picture

    chat = make_llava_next(tmp_path).chat
    start = chat.tokenizer.bos_token_id
    before = chat.encode_prompt(PROMPT, Image.fromarray(picture()))["input_ids"][0].tolist()
    assert before[0] == start and chat.prompt_ids(PROMPT)[0] == start
    chat.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{chat.tokenizer.bos_token} $A", special_tokens=[(chat.tokenizer.bos_token, start)]
    )
    fresh = ChatProcessor.from_parts(chat.path, chat.config, chat.processor)
    assert fresh.encode_prompt(PROMPT, Image.fromarray(picture()))["input_ids"][0].tolist() == before


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(NotAVisionLanguageModel, match="nowhere"):
        ChatProcessor(str(tmp_path / "nowhere"))


def test_a_text_model_is_refused(chat, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    chat.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(NotAVisionLanguageModel, match="image processor"):
        ChatProcessor(str(tmp_path))
    with pytest.raises(NotAVisionLanguageModel, match="text model \\(llama\\)"):
        ChatProcessor.from_parts(str(tmp_path), LlamaConfig(), chat.tokenizer)


def test_a_model_without_a_chat_template_is_refused(tmp_path):
    make_idefics3(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(NotAVisionLanguageModel, match="chat_template.jinja"):
        ChatProcessor(str(tmp_path))
