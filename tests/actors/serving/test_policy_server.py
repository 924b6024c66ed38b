"""What a policy server answers: tokens the learner can train on, with the log-probabilities they were drawn with."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.actors.conftest import LiveServer, Reference, request


@pytest.fixture(autouse=True)
def first_weights(policy_server: LiveServer, reference: Reference, tmp_path: Path) -> Reference:
    """The server serves the weights of `reference`, whatever an earlier test left."""
    from learner.publish import SharedMemoryPublisher

    publisher = SharedMemoryPublisher(f"test-{tmp_path.name}", tmp_path)
    policy_server.sync(publisher.publish(policy_server.next_version(), reference.perturb(1).weights()))
    yield reference
    publisher.close()


def test_prompt_ids_are_those_of_the_models_own_processor(policy_server: LiveServer, reference: Reference) -> None:
    from actors.images import decode_png

    for prompt in ("Answer.", "Answer in JSON, with thoughts and an action."):
        question = request(5, prompt=prompt)
        answer = policy_server.ask("generate", question)
        expected = reference.chat.encode_prompt(prompt, decode_png(question.png))["input_ids"][0].numpy()
        np.testing.assert_array_equal(answer.prompt_ids, expected)


def test_what_coso_check_finds_of_a_live_engine(policy_server: LiveServer, reference: Reference) -> None:
    """Engine and learner agree on its prompts, and an engine with other weights than the learner's is found."""
    from cluster.config.run_config import RunConfig
    from cluster.model_check import compared, sample_requests
    from learner.policy.model import build_policy

    config = RunConfig.model_validate({"model": {"path": reference.chat.path}})
    requests = sample_requests(config)
    answers = policy_server.ask("generate_batch", requests)
    policy = build_policy(
        reference.model, lora=None, value_hidden=(4,), gradient_checkpointing=False, value_gradient=True, seed=0
    ).eval()
    found = list(compared(config, reference.chat, policy, requests, answers))
    assert [finding.what for finding in found] == ["engine", "engine's prompt ids", "log-probabilities"]
    assert all(finding.works for finding in found)
    reference.perturb(5)
    assert [finding.works for finding in compared(config, reference.chat, policy, requests, answers)][-1] is False


def test_logprobs_are_of_the_distribution_sampled_from(policy_server: LiveServer, reference: Reference) -> None:
    """Temperature and the ban on special tokens included, against log_softmax by hand."""
    for temperature in (0.5, 1.0, 1.7):
        question = request(11, temperature=temperature, max_new_tokens=40)
        answer = policy_server.ask("generate", question)
        assert not set(answer.response_ids) & set(reference.chat.banned_token_ids)
        np.testing.assert_allclose(answer.logprobs, reference.logprobs(question, answer.response_ids), atol=1e-4)
        assert answer.logprobs.dtype == np.float32 and answer.response_ids.dtype == np.int32


def test_an_answer_ends_at_the_models_end_token_or_at_its_limit(
    policy_server: LiveServer, reference: Reference
) -> None:
    answers = [policy_server.ask("generate", request(seed, temperature=1.5, max_new_tokens=60)) for seed in range(12)]
    end_ids = set(reference.chat.eos_token_ids)
    assert {answer.finish_reason for answer in answers} <= {"stop", "length"}
    for answer in answers:
        *inner, last = answer.response_ids.tolist()
        assert not end_ids & set(inner)
        assert (last in end_ids) == (answer.finish_reason == "stop")
        assert len(answer.response_ids) == 60 or answer.finish_reason == "stop"
        assert answer.text == reference.chat.decode(answer.response_ids)


def test_a_batch_does_not_depend_on_what_happened_before(policy_server: LiveServer) -> None:
    batch = [request(seed, temperature=1.0, max_new_tokens=20 + 3 * seed) for seed in range(6)]
    first = policy_server.ask("generate_batch", batch)
    others = [policy_server.actor.generate.remote(request(seed, temperature=1.0)) for seed in range(3, 12)]
    policy_server.ask("generate_batch", batch[2:4])
    second = policy_server.ask("generate_batch", batch)
    import ray

    ray.get(others, timeout=60)
    for one, other in zip(first, second, strict=True):
        assert one.response_ids.tobytes() == other.response_ids.tobytes()
        assert one.logprobs.tobytes() == other.logprobs.tobytes()
    assert len({one.response_ids.tobytes() for one in first}) == len(batch)


def test_sampling_in_a_batch_needs_a_seed(policy_server: LiveServer) -> None:
    with pytest.raises(ValueError, match="needs a seed"):
        policy_server.ask("generate_batch", [replace(request(1, temperature=1.0), seed=None)])


def test_a_prompt_longer_than_the_engine_takes_is_refused_and_the_engine_lives(policy_server: LiveServer) -> None:
    refusal = policy_server.ask("generate", request(1, prompt="number " * 600))
    assert refusal.reason == "prompt_too_long"
    assert re.search(r"has \d{3,} tokens.*policy_server.max_model_len is 512", refusal.detail)
    assert policy_server.ask("refusal", request(1, prompt="number " * 600)) == refusal
    assert policy_server.ask("refusal", request(1)) is None
    assert len(policy_server.ask("generate", request(1)).response_ids)


def test_a_prompt_that_only_its_image_makes_too_long_is_refused_and_the_image_can_be_shown_again(
    policy_server: LiveServer, reference: Reference
) -> None:
    text = "n" * (511 - len(reference.chat.prompt_ids("")))
    while len(reference.chat.prompt_ids(text)) < 510:
        text += "n"
    assert len(reference.chat.prompt_ids(text)) < 512
    assert policy_server.ask("generate", request(77, prompt=text)).reason == "prompt_too_long"
    assert len(policy_server.ask("generate", request(77)).response_ids)


def test_a_refused_request_costs_its_batch_nothing(policy_server: LiveServer) -> None:
    good = [request(seed, temperature=1.0) for seed in (1, 2)]
    broken = replace(request(3), image="no picture", png=b"no picture")
    first, refusal, too_long, second = policy_server.ask(
        "generate_batch", [good[0], broken, request(4, prompt="number " * 600), good[1]]
    )
    assert refusal.reason == "image_refused" and "cannot identify image" in refusal.detail
    assert too_long.reason == "prompt_too_long"
    for one, other in zip((first, second), policy_server.ask("generate_batch", good), strict=True):
        assert one.response_ids.tobytes() == other.response_ids.tobytes()


def test_special_tokens_in_a_prompt_are_text_to_engine_and_learner(
    policy_server: LiveServer, reference: Reference
) -> None:
    from actors.images import decode_png

    special = reference.chat.tokenizer.added_tokens_decoder.values()
    question = request(5, prompt=" ".join(["say", *map(str, special), "🙂", "twice", *map(str, special)]))
    answer = policy_server.ask("generate", question)
    expected = reference.chat.encode_prompt(question.prompt, decode_png(question.png))["input_ids"][0].numpy()
    np.testing.assert_array_equal(answer.prompt_ids, expected)
    assert (answer.prompt_ids == reference.chat.config.image_token_id).sum() == 4
    np.testing.assert_allclose(answer.logprobs, reference.logprobs(question, answer.response_ids), atol=1e-4)


def test_status_counts_work(policy_server: LiveServer) -> None:
    before = policy_server.ask("status")
    answer = policy_server.ask("generate", request(2))
    after = policy_server.ask("status")
    assert after["requests"] == before["requests"] + 1
    assert after["generated_tokens"] == before["generated_tokens"] + len(answer.response_ids)
    assert after["busy_seconds"] > before["busy_seconds"]
    assert after["version"] == policy_server.last_version and after["running"] == 0
    assert after["rss_bytes"] > 100 << 20 and len(after["engine_pids"]) == 1


def _server_of(ray_cluster: Any, model_path: Path, temp_folder: str, **changes: Any) -> Any:
    from actors.serving.policy_engine import PolicyServerLaunch, policy_server_environment
    from actors.serving.policy_server import PolicyServer
    from actors.settings import ModelSettings, PolicyServerSettings

    model, settings = ModelSettings(path=str(model_path)), PolicyServerSettings(**changes)
    launch = PolicyServerLaunch(index=7, run_seed=0, temp_folder=temp_folder)
    environment = policy_server_environment(model, settings, launch)
    actor = ray_cluster.remote(PolicyServer).options(num_cpus=0, runtime_env={"env_vars": environment})
    return actor.remote(model, settings, launch)


def test_a_model_that_vllm_does_not_know_is_named_with_vllms_reason(
    ray_cluster: Any, tiny_vlm: Path, tmp_path: Path, policy_server: LiveServer
) -> None:
    from actors.serving.policy_engine import ModelNotServable

    folder = tmp_path / "unknown"
    shutil.copytree(tiny_vlm, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["NoSuchModel"]
    (folder / "config.json").write_text(json.dumps(config))
    server = _server_of(ray_cluster, folder, policy_server.temp_folder)
    with pytest.raises(ModelNotServable, match=r"(?s)vLLM cannot serve .*unknown.*NoSuchModel"):
        ray_cluster.get(server.ready.remote(), timeout=120)
    ray_cluster.kill(server)


def test_a_text_model_is_refused(ray_cluster: Any, tiny_vlm: Path, tmp_path: Path, policy_server: LiveServer) -> None:
    from transformers import LlamaConfig

    from actors.serving.policy_engine import ModelNotServable

    folder = tmp_path / "text_only"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_vlm / name, folder / name)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer.pop("processor_class", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    LlamaConfig(hidden_size=64, num_hidden_layers=1, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    server = _server_of(ray_cluster, folder, policy_server.temp_folder)
    with pytest.raises(ModelNotServable, match="text_only"):
        ray_cluster.get(server.ready.remote(), timeout=120)
    ray_cluster.kill(server)


def test_a_start_past_its_deadline_names_the_server(
    ray_cluster: Any, tiny_vlm: Path, policy_server: LiveServer
) -> None:
    server = _server_of(ray_cluster, tiny_vlm, policy_server.temp_folder, start_deadline_s=0.5)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="policy server 7 did not start within"):
        ray_cluster.get(server.ready.remote(), timeout=60)
    assert time.monotonic() - started < 40
    ray_cluster.kill(server)


def test_a_batch_longer_than_the_deadline_of_an_answer_is_answered(policy_server: LiveServer) -> None:
    """Answers come in waves of 16, since the engine takes no more requests at once; the deadline is of silence."""
    one_wave = [request(seed, temperature=1.0, max_new_tokens=200) for seed in range(16)]

    def seconds(batch: list[Any]) -> float:
        begun = time.monotonic()
        assert len(policy_server.ask("generate_batch", batch, deadline_s=120)) == len(batch)
        return time.monotonic() - begun

    def set_deadline(server: Any, deadline_s: float) -> None:
        server._settings = server._settings.model_copy(update={"generate_deadline_s": deadline_s})

    seconds(one_wave[:1])
    deadline_s = 1.5 * seconds(one_wave)
    policy_server.ask("__ray_call__", set_deadline, deadline_s)
    try:
        assert seconds(5 * one_wave) > deadline_s
    finally:
        policy_server.ask("__ray_call__", set_deadline, 60.0)


def test_heads_of_a_width_without_cpu_kernels_are_refused_before_the_engine_starts(
    ray_cluster: Any, tmp_path: Path, policy_server: LiveServer
) -> None:
    """Such an engine starts, and dies with the first request."""
    from actors.serving.policy_engine import ModelNotServable
    from learner.supervised.default_model import DefaultModelOptions, make_default_vlm
    from tests.actors.conftest import ANSWER, PROMPT, picture

    make_default_vlm(
        tmp_path, [PROMPT, ANSWER], [picture(0)], DefaultModelOptions(hidden=96, layers=1, image_size=32), seed=0
    )
    config = json.loads((tmp_path / "config.json").read_text())
    text = config["text_config"]
    assert text["hidden_size"] // text["num_attention_heads"] == 24
    server = _server_of(ray_cluster, tmp_path, policy_server.temp_folder)
    with pytest.raises(ModelNotServable, match=r"heads of .* are 24 wide.*kernels for 32, 64, 80.* only"):
        ray_cluster.get(server.ready.remote(), timeout=120)
    ray_cluster.kill(server)


def test_a_folder_too_long_for_sockets_is_refused() -> None:
    from actors.serving.policy_engine import PolicyServerLaunch

    with pytest.raises(ValueError, match="too long"):
        PolicyServerLaunch(index=0, run_seed=0, temp_folder="/" + "long" * 30)
