"""`coso check MODEL`: what it finds without an engine; tests/actors/serving/test_policy_server.py has one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.generation import Generation, Refusal
from actors.images import decode_png
from cluster.config.files import validate
from cluster.config.run_config import RunConfig
from cluster.model_check import (
    PROMPTS,
    _action_span,
    _chat_findings,
    _learner_findings,
    compared,
    memory_findings,
    sample_requests,
)
from tests.tiny_models import TinyVlm, make_idefics3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyVlm:
    return make_idefics3(tmp_path_factory.mktemp("idefics3"))


def config_of(tiny: TinyVlm, **sections: Any) -> RunConfig:
    return validate({"model": {"path": tiny.chat.path}, **sections})


def returned(generator: Any) -> tuple[list[Any], Any]:
    found = []
    while True:
        try:
            found.append(next(generator))
        except StopIteration as stop:
            return found, stop.value


@pytest.fixture(scope="module")
def policy(tiny: TinyVlm) -> Any:
    found, policy = returned(_learner_findings(config_of(tiny)))
    assert [finding.works for finding in found] == [True]
    return policy


@torch.no_grad()
def engine_answers(tiny: TinyVlm, config: RunConfig) -> list[Generation]:
    """What an engine without a fault says, from the family's own logits."""
    answers = []
    for request in sample_requests(config):
        inputs = tiny.chat.encode_prompt(request.prompt, decode_png(request.png))
        prompt = inputs["input_ids"]
        response = torch.tensor([tiny.chat.text_ids("the answer is 3")])
        inputs |= {"input_ids": torch.cat([prompt, response], 1)}
        inputs |= {"attention_mask": torch.ones_like(inputs["input_ids"])}
        logits = tiny.model(**inputs).logits[0, prompt.shape[1] - 1 : -1] / request.temperature
        logits[:, tiny.chat.banned_token_ids] = -torch.inf
        logprobs = logits.log_softmax(-1).gather(1, response[0][:, None])[:, 0].numpy()
        ids = prompt[0].numpy().astype(np.int32)
        answers.append(Generation(ids, response[0].numpy().astype(np.int32), logprobs, [(0, 0)], "stop", "", 0.1))
    return answers


def judged(tiny: TinyVlm, policy: Any, change: Callable[[Generation], Any]) -> dict[str, tuple[Any, str]]:
    config = config_of(tiny)
    answers = [change(answer) for answer in engine_answers(tiny, config)]
    findings = compared(config, tiny.chat, policy, sample_requests(config), answers)
    return {finding.what: (finding.works, finding.says) for finding in findings}


def test_an_engine_that_says_what_the_learner_says_works(tiny: TinyVlm, policy: Any) -> None:
    found = judged(tiny, policy, lambda answer: answer)
    assert [works for works, _ in found.values()] == [True, True, True]
    assert f"{PROMPTS} of {PROMPTS}" in found["engine"][1]


def test_other_log_probabilities_do_not_work(tiny: TinyVlm, policy: Any) -> None:
    found = judged(tiny, policy, lambda answer: replace(answer, logprobs=answer.logprobs - 0.1))
    works, says = found["log-probabilities"]
    assert works is False and "differ by 0.1 nats" in says and "tolerance 0.02" in says
    broken = judged(tiny, policy, lambda answer: replace(answer, logprobs=answer.logprobs * np.nan))
    assert broken["log-probabilities"][0] is False


def test_other_prompt_ids_do_not_work(tiny: TinyVlm, policy: Any) -> None:
    found = judged(tiny, policy, lambda answer: replace(answer, prompt_ids=answer.prompt_ids[1:]))
    assert found["engine's prompt ids"][0] is False and "log-probabilities" not in found


def test_refused_prompts_do_not_work_and_the_reason_is_quoted(tiny: TinyVlm, policy: Any) -> None:
    found = judged(tiny, policy, lambda answer: Refusal("image_refused", "too wide"))
    assert found == {"engine": (False, f"answered 0 of {PROMPTS} prompts; too wide")}


def test_image_tokens_of_three_sizes_and_whether_they_leave_room(tiny: TinyVlm) -> None:
    found = list(_chat_findings(config_of(tiny), tiny.chat))
    assert all(finding.works for finding in found)
    images = [finding for finding in found if finding.what.startswith("image of")]
    assert len(images) == 3 and all(finding.says.startswith("4 image tokens") for finding in images)
    narrow = config_of(tiny, policy_server={"max_model_len": 64}, rollout={"max_new_tokens": 60})
    refused = [finding for finding in _chat_findings(narrow, tiny.chat) if finding.works is False]
    assert len(refused) == 3 and all("max_model_len 64. Raise it" in finding.says for finding in refused)


def test_an_answer_that_does_not_survive_its_tokens_does_not_work(tmp_path: Path) -> None:
    from tokenizers import normalizers

    chat = make_idefics3(tmp_path).chat
    assert _action_span(chat).works
    chat.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    found = _action_span(chat)
    assert found.works is False and "does not survive" in found.says


def test_a_model_that_does_not_fit_is_found(tiny: TinyVlm, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    config = config_of(tiny)
    configured, other = memory_findings(config)
    assert configured.what == "memory, float32" and configured.works is True and other.works is None
    count = sum(parameter.numel() for parameter in tiny.model.parameters())
    assert f"{count / 1e6:.1f} M weights" in configured.says
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    assert next(memory_findings(config)).works is False
