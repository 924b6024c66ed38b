"""The default model: any text and picture goes in, answers end, and the same arguments write the same model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from actors.chat import ChatProcessor
from learner.supervised.default_model import make_default_vlm
from tests.tiny_models import PROMPT, TEXTS, TINY, picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("default")
    make_default_vlm(folder, TEXTS, [picture(n) for n in range(3)], TINY, seed=4)
    return folder


@pytest.fixture(scope="module")
def chat(folder):
    return ChatProcessor(str(folder))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text())
def test_every_text_decodes_to_itself(chat, text):
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    if set(ids) & set(chat.tokenizer.all_special_ids):  # the text spells out a special token
        return
    assert chat.decode(ids) == text


def test_a_prompt_holds_the_picture_the_words_and_an_opening_for_the_answer(chat):
    ids = chat.encode_prompt(PROMPT, Image.fromarray(picture(7, 300, 200)))["input_ids"][0].tolist()
    assert ids.count(chat.config.image_token_id) == TINY.image_tokens == 4
    text = chat.tokenizer.decode(ids)
    assert text.startswith("<|im_start|>User:") and text.endswith(f"{PROMPT}<end_of_utterance>\n<|im_start|>Assistant:")


def test_the_chat_template_takes_turns_and_plain_text(chat):
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]},
    ]
    text = chat.processor.apply_chat_template(messages, tokenize=False)
    assert text == ("<|im_start|>User:Hello<end_of_utterance>\n<|im_start|>Assistant:Hi<end_of_utterance>\n")


def test_pixels_are_normalised_by_the_sample_pictures(chat):
    pixels = [chat.encode_prompt(PROMPT, Image.fromarray(picture(n)))["pixel_values"].numpy() for n in range(3)]
    assert abs(np.mean(pixels)) < 0.02 and abs(np.std(pixels) - 1) < 0.02


@pytest.mark.parametrize("shade", [0, 51, 128, 255])
def test_a_picture_of_one_colour_is_never_all_zeros(tmp_path, shade):
    """vLLM leaves such pictures out as padding, and its engine then dies of the prompt's image tokens."""
    plain = np.full((64, 64, 3), shade, np.uint8)
    make_default_vlm(tmp_path, TEXTS, [plain], TINY, seed=4)
    encoded = ChatProcessor(str(tmp_path)).encode_prompt(PROMPT, Image.fromarray(plain))
    assert bool((encoded["pixel_values"] != 0).all())


def test_the_model_answers_and_stops_at_its_end_token(folder, chat):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert chat.eos_token_ids == [chat.tokenizer.eos_token_id] == [model.generation_config.eos_token_id]
    model.lm_head.weight.data[chat.eos_token_ids[0]] *= 100  # an end token comes soon
    inputs = chat.encode_prompt(PROMPT, Image.fromarray(picture()))
    torch.manual_seed(0)
    answer = model.generate(**inputs, do_sample=True, max_new_tokens=200, suppress_tokens=chat.banned_token_ids)[
        0, inputs["input_ids"].shape[1] :
    ].tolist()
    assert len(answer) < 200 and answer[-1] == chat.eos_token_ids[0]
    assert not set(answer) & set(chat.banned_token_ids)


def test_the_same_arguments_write_the_same_bytes(folder, tmp_path):
    make_default_vlm(tmp_path, TEXTS, [picture(n) for n in range(3)], TINY, seed=4)
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted(path.name for path in tmp_path.iterdir()) and "model.safetensors" in files
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="image_size \\(60\\)"):
        replace(TINY, image_size=60)
    with pytest.raises(ValueError, match="heads \\(3\\)"):
        replace(TINY, heads=3)


def test_it_needs_texts_and_pictures(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        make_default_vlm(tmp_path, TEXTS, [], TINY)
