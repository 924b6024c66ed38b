"""What is checked of a family on the learner's side, and in which forms of its chat format.

The reference is the family's own `generate`, which writes an answer token by token with a cache. The learner runs
prompt and answer at once, padded in a batch with others. Both must give the same log-probabilities.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from actors.chat import ChatProcessor
from actors.images import PngEncoder
from actors.trajectory import TrajectoryBatch
from learner.policy.batch import BatchBuilder
from learner.policy.model import build_policy
from tools.families.parts import PROMPT, TEXTS, TinyVlm, picture

#: (height, width) of the pictures: square, wide, tall.
SIZES = ((64, 64), (40, 90), (90, 40))
#: Prompts of different lengths, so that everything that can be padded is.
PROMPTS = (PROMPT, "Answer.", PROMPT + " Be brief.")
TEMPERATURE = 0.7
#: Largest difference of a log-probability in float32, nats.
TOLERANCE = 1e-4
ANSWER_TOKENS = 12
#: Standard deviation of the noise on the weights.
NOISE = 0.15


def sharpened(tiny: TinyVlm, seed: int = 0) -> TinyVlm:
    """The same model, its weights moved by noise: freshly made, it finds nearly all tokens equally likely, and a
    mistake would hardly show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tiny.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=NOISE)
    return tiny


class FamilyBroken(AssertionError):
    """A check of a family failed."""


def logprobs_equal_generation(tiny: TinyVlm, chat: ChatProcessor) -> float:
    """Largest difference between the learner's log-probabilities and those of `generate`, nats."""
    pictures = [picture(number, *size) for number, size in enumerate(SIZES)]
    answers = [_generate(tiny, chat, *example) for example in zip(PROMPTS, pictures, strict=True)]
    trajectories = _rows(chat, pictures, [ids for ids, _ in answers])
    batch = BatchBuilder(chat).build(trajectories, range(len(answers)))
    policy = build_policy(
        tiny.model, lora=None, value_hidden=(8,), gradient_checkpointing=False, value_gradient=True, seed=0
    ).eval()
    with torch.no_grad():
        output = policy(batch, temperature=TEMPERATURE, banned_token_ids=chat.banned_token_ids, token_chunk=1024)
    largest = 0.0
    for row, (ids, expected) in enumerate(answers):
        largest = max(largest, float((output.logprobs[row, : len(ids)] - expected).abs().max()))
    if not largest <= TOLERANCE:
        raise FamilyBroken(f"log-probabilities differ from those of generate() by {largest:.2g}")
    return largest


def pictures_matter(tiny: TinyVlm, chat: ChatProcessor) -> list[int]:
    """Image tokens of the three sizes; another picture must change what the model says."""
    counts = []
    for size in SIZES:
        first, second = (chat.encode_prompt("", Image.fromarray(picture(seed, *size))) for seed in (1, 2))
        if not torch.equal(first["input_ids"], second["input_ids"]):
            raise FamilyBroken(f"pictures of one size, {size}, make different prompts")
        with torch.no_grad():
            logits = [tiny.model(**inputs).logits[0, -1] for inputs in (first, second)]
        if torch.equal(*logits):
            raise FamilyBroken(f"two pictures of size {size} give the same answer")
        counts.append(int((first["input_ids"] == chat.image_token_id).sum()))
    return counts


def action_span(chat: ChatProcessor) -> None:
    """The action part of an answer begins at the token that holds its first character."""
    for text in TEXTS[1:]:
        ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        if chat.decode(ids) != text:
            raise FamilyBroken(f"an answer does not survive its tokens: {text!r} became {chat.decode(ids)!r}")
        start = text.index('"action"')
        token = chat.action_start(ids, start)
        if not len(chat.decode(ids[:token])) <= start < len(chat.decode(ids[: token + 1])):
            raise FamilyBroken(f"the action part of {text!r} begins at token {token}, which does not hold its key")


def _generate(tiny: TinyVlm, chat: ChatProcessor, prompt: str, image: np.ndarray) -> tuple[list[int], torch.Tensor]:
    inputs = chat.encode_prompt(prompt, Image.fromarray(image))
    torch.manual_seed(0)
    with torch.no_grad():
        output: Any = tiny.model.generate(
            **inputs,
            max_new_tokens=ANSWER_TOKENS,
            min_new_tokens=ANSWER_TOKENS,
            do_sample=True,
            top_k=0,
            temperature=TEMPERATURE,
            suppress_tokens=chat.banned_token_ids,
            eos_token_id=chat.eos_token_ids,
            pad_token_id=chat.pad_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
    ids = output.sequences[0, -ANSWER_TOKENS:]
    logits = torch.stack([step[0] for step in output.logits]).float() / TEMPERATURE
    logits[:, chat.banned_token_ids] = -torch.inf
    return ids.tolist(), logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]


def _rows(chat: ChatProcessor, pictures: list[np.ndarray], answers: list[list[int]]) -> TrajectoryBatch:
    encoder = PngEncoder()
    rows, images = [], {}
    for prompt, image, ids in zip(PROMPTS, pictures, answers, strict=True):
        key, png = encoder.encode(image)
        images[key] = png
        prompt_ids = chat.encode_prompt(prompt, Image.fromarray(image))["input_ids"][0].tolist()
        rows.append({"prompt": prompt, "image": key, "prompt_ids": prompt_ids, "response_ids": ids})
    return TrajectoryBatch.from_rows(rows, images)


def learner_checks(tiny: TinyVlm) -> dict[str, str]:
    """Each check of the learner's side, by name, in the family's own form and in every other: "" or what is wrong."""
    tiny = sharpened(tiny)
    checks: dict[str, Callable[[], Any]] = {
        "pictures": lambda: pictures_matter(tiny, tiny.chat),
        "log-probabilities": lambda: logprobs_equal_generation(tiny, tiny.chat),
        "action span": lambda: action_span(tiny.chat),
    }
    for form in FORMS:
        checks[form] = lambda form=form: logprobs_equal_generation(tiny, in_form(tiny, form))  # type: ignore[misc]
    results = {}
    for name, check in checks.items():
        try:
            check()
            results[name] = ""
        except (FamilyBroken, ValueError, RuntimeError) as error:
            results[name] = str(error).splitlines()[0]
    return results


# ---------------------------------------------------------------- forms of the chat format


def no_system_role(processor: Any) -> None:
    """The template refuses a system turn, as some families' do."""
    processor.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% endfor %}" + processor.chat_template
    )


def own_system_turn(processor: Any) -> None:
    """The template writes a system turn of its own."""
    processor.chat_template = "<|start|>system\nYou are a helpful assistant.<|end|>\n" + processor.chat_template


def pad_is_end(processor: Any) -> None:
    """The tokenizer pads with the end token."""
    processor.tokenizer.pad_token = processor.tokenizer.eos_token


def start_twice(processor: Any) -> None:
    """Template and tokenizer both write the start token."""
    from tokenizers.processors import TemplateProcessing

    start, index = processor.tokenizer.bos_token, processor.tokenizer.bos_token_id
    processor.chat_template = "{{ bos_token }}" + processor.chat_template
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=[(start, index)]
    )


def image_last(processor: Any) -> None:
    """The template writes the image after the text."""
    loop = "{% for part in message['content'] %}"
    assert loop in processor.chat_template
    processor.chat_template = processor.chat_template.replace(loop, loop.replace("']", "'] | reverse"))


FORMS = {
    "no system role": no_system_role,
    "own system turn": own_system_turn,
    "pad = end": pad_is_end,
    "start token twice": start_twice,
    "image last": image_last,
}


def in_form(tiny: TinyVlm, form: str) -> ChatProcessor:
    """The family's chat processor, with its chat format in another form."""
    processor = copy.deepcopy(tiny.chat.processor)
    FORMS[form](processor)
    return ChatProcessor.from_parts(tiny.chat.path, tiny.chat.config, processor)
