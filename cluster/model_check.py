"""`coso check` of a model: read its folder as a run will, try every part that depends on it, and say what works.

The engine is a policy server as a run starts it, and the learner's forward pass is the learner's own. Both see the
same prompts, and their ids and log-probabilities are compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.config.files import validate
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.launch.model_shape import read_shape
from cluster.launch.sizing import engine_weights, gib, learner_states

if TYPE_CHECKING:
    from actors.chat import ChatProcessor
    from actors.generation import Generation, GenerationRequest, Refusal
    from actors.serving.adapters.served import ServedAdapters

#: (width, height) of the pictures: small, as a wide screen, as a tall one.
IMAGE_SIZES = ((224, 224), (640, 360), (360, 780))
#: Prompts that engine and learner are compared on.
PROMPTS = 20
#: Longest answer to one of them, tokens.
ANSWER_TOKENS = 24
#: What an environment's prompt may say: other scripts, other lengths, the names of special tokens.
TEXTS = (
    'The picture shows a screen. Answer in JSON: {"thoughts": "what you see", "action": "what to do"}',
    "Answer.",
    "Ümläute, 漢字, עברית, 🙂 and a tab\tand\nlines. " * 3,
    'Typed so far: "<image> <|image_pad|> <|im_end|> </s> <end_of_turn> [INST]" - what next?',
)
ANSWER = '{"thoughts": "ümläut 🙂, so I should tap", "action": "tap 3"}'


@dataclass(frozen=True)
class Finding:
    """One thing that a run needs, and whether it works."""

    what: str
    says: str
    works: bool | None  # None: was not tried


def check_model(config: RunConfig) -> Iterator[Finding]:
    """Findings on `model.path` under this config, one after the other: the engine's takes half a minute."""
    from cluster.run.system import require_model

    try:
        chat = require_model(config)
    except CosoError as error:
        for line in str(error).splitlines():
            yield Finding("model folder", line, False)
        return
    yield Finding("model folder", _family(config, chat), True)
    yield from _chat_findings(config, chat)
    memory = list(memory_findings(config))
    yield from memory
    if any(finding.works is False for finding in memory):
        yield Finding("learner and engine", "not started, since the memory is too small", None)
        return
    policy = yield from _learner_findings(config)
    yield from _agreement(config, chat, policy)


# ---------------------------------------------------------------- template, tokens


def _family(config: RunConfig, chat: ChatProcessor) -> str:
    named = ", ".join(getattr(chat.config, "architectures", None) or [])
    return f"family {chat.config.model_type} ({named})" + (
        "" if Path(config.model.path).is_dir() else ", a hub name: its files were not looked at one by one"
    )


def _chat_findings(config: RunConfig, chat: ChatProcessor) -> Iterator[Finding]:
    from PIL import Image

    ids = chat.prompt_ids("TEXT")
    yield Finding("chat template", f"{len(ids) - len(chat.text_ids('TEXT'))} tokens around the text", True)
    room = config.policy_server.max_model_len
    for width, height in IMAGE_SIZES:
        what = f"image of {width} × {height}"
        try:
            inputs = chat.encode_prompt("TEXT", Image.new("RGB", (width, height), (128, 128, 128)))
        except Exception as error:  # a processor is code of others and may raise anything
            yield Finding(what, f"the model's processor refuses it: {error}", False)
            continue
        length = inputs["input_ids"].shape[1]
        stands = int((inputs["input_ids"] == chat.image_token_id).sum()) if chat.image_token_id is not None else 0
        says = f"{stands} image tokens, {length} tokens with the template"
        if length + config.rollout.max_new_tokens > room:
            says += (
                f": with rollout.max_new_tokens {config.rollout.max_new_tokens} more than policy_server.max_model_len "
                f"{room}. Raise it"
            )
        yield Finding(what, says, length + config.rollout.max_new_tokens <= room)
    ends = ", ".join(f"{token!r} ({chat.tokenizer.convert_ids_to_tokens(token)})" for token in chat.eos_token_ids)
    yield Finding("end tokens", f"{ends}; padding {chat.pad_token_id}; {len(chat.banned_token_ids)} banned", True)
    yield _action_span(chat)


def _action_span(chat: ChatProcessor) -> Finding:
    ids = chat.tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    text, start = chat.decode(ids), ANSWER.index('"action"')
    if text != ANSWER:
        return Finding("action span", f"an answer does not survive its tokens: {ANSWER!r} becomes {text!r}", False)
    token = chat.action_start(ids, start)
    holds = len(chat.decode(ids[:token])) <= start < len(chat.decode(ids[: token + 1]))
    return Finding("action span", f"tokens {token} to {len(ids) - 1} of {len(ids)} of a sample answer", holds)


# ---------------------------------------------------------------- memory


def memory_findings(config: RunConfig) -> Iterator[Finding]:
    """What engines and ranks take, by precision; whether the configured one fits into this machine."""
    try:
        shape = read_shape(Path(config.model.path))
    except CosoError as error:
        yield Finding("memory", f"unknown: {error}", None)
        return
    for dtype in ("float32", "bfloat16"):
        of_dtype = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
        engine, rank = engine_weights(of_dtype, shape), sum(learner_states(of_dtype, shape).values())
        engine += config.policy_server.stated_kv_cache_bytes or 0
        says = (
            f"{shape.parameters / 1e6:.1f} M weights: an engine {gib(engine)} GiB on {config.policy_server.device}, a "
            f"learner rank {gib(rank)} GiB on {config.learner.device}, without activations"
        )
        if dtype != config.model.dtype:
            yield Finding(f"memory, {dtype}", says, None)
            continue
        needed: dict[str, int] = {}
        for device, total in (
            (config.policy_server.device, engine * config.policy_server.replicas),
            (config.learner.device, rank * config.learner.ranks),
        ):
            needed[device] = needed.get(device, 0) + total
        yield _fits(f"memory, {dtype}", says, needed)


def _fits(what: str, says: str, needed: dict[str, int]) -> Finding:
    import psutil
    import torch

    works: bool | None = True
    for device, total in needed.items():
        if device == "cpu":
            there = psutil.virtual_memory().available
        elif torch.cuda.is_available():
            there = sum(torch.cuda.mem_get_info(index)[1] for index in range(torch.cuda.device_count()))
        else:
            says, works = f"{says}; no GPU here to compare with", None
            continue
        says += f"; {gib(total)} of {gib(there)} GiB of {device} memory"
        if total > there:
            return Finding(what, f"{says}. Use a smaller model, model.dtype bfloat16 or learner.lora", False)
    return Finding(what, says, works)


# ---------------------------------------------------------------- engine and learner


def _learner_findings(config: RunConfig) -> Any:
    """A generator of findings that returns the policy, None if the learner cannot load it."""
    import torch

    from learner.policy.model import load_policy
    from learner.policy.token_logprobs import UnsupportedHead

    try:
        policy = load_policy(
            config.model.path,
            dtype=getattr(torch, config.model.dtype),
            attention=config.model.attention,
            lora=config.learner.served_adapters,
            value_hidden=(8,),
            gradient_checkpointing=False,
            value_gradient=False,
            seed=0,
        )
    except (ValueError, OSError, RuntimeError, UnsupportedHead) as error:
        yield Finding("learner", str(error).splitlines()[0], False)
        return None
    head = policy.hf_model.get_output_embeddings().transform
    cap = f", soft cap {head.softcap:g}" if head.softcap is not None else ""
    lora = config.learner.served_adapters
    adapted = f"; adapters of rank {lora.rank}, which the engine is given too" if lora is not None else ""
    says = f"loads it in {config.model.dtype}; output head of scale {head.scale:g}{cap}{adapted}"
    yield Finding("learner", says, True)
    return policy.eval()


def sample_requests(config: RunConfig) -> list[GenerationRequest]:
    """`PROMPTS` requests whose texts and pictures differ, the same each time."""
    from actors.generation import GenerationRequest
    from actors.images import PngEncoder

    encoder, generator = PngEncoder(), np.random.default_rng(0)
    requests = []
    for number in range(PROMPTS):
        width, height = IMAGE_SIZES[number % len(IMAGE_SIZES)]
        image = encoder.encode(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        text = f"{TEXTS[number % len(TEXTS)]} ({number})"
        requests.append(
            GenerationRequest(
                text, image.key, image.png, config.rollout.temperature, ANSWER_TOKENS, seed=config.seed % 2**31 + number
            )
        )
    return requests


def _agreement(config: RunConfig, chat: ChatProcessor, policy: Any) -> Iterator[Finding]:
    from cluster.launch.ray_runtime import ray_session, require_local_resources

    # One engine and nothing else: whether the whole run fits is `coso train --dry-run`'s question.
    alone = validate(
        {
            **config.model_dump(),
            "policy_server": {**config.policy_server.model_dump(), "replicas": 1},
            "scoring": {**config.scoring.model_dump(), "workers": 1, "device": "cpu"},
            "learner": {**config.learner.model_dump(), "ranks": 1},
            "rollout": {**config.rollout.model_dump(), "workers": 1},
        }
    )
    try:
        require_local_resources(alone)
    except CosoError as error:
        yield Finding("engine", f"not started: {error}", None)
        return
    requests = sample_requests(config)
    try:
        with ray_session(alone) as temporary:
            answers = asyncio.run(_ask(alone, chat, policy, temporary, requests))
    except CosoError as error:
        yield Finding("engine", str(error), False)
        return
    except Exception as error:  # of the engine's process
        yield Finding("engine", str(getattr(error, "cause", None) or error).strip().splitlines()[0], False)
        return
    yield from compared(config, chat, policy, requests, answers)


async def _ask(
    config: RunConfig, chat: ChatProcessor, policy: Any, temporary: Path, requests: list[GenerationRequest]
) -> list[Generation | Refusal]:
    from cluster.launch.adapters import served_adapters
    from cluster.launch.reservation import reserve
    from cluster.run.rollout_actors import start_policy_servers, wait_for_servers
    from cluster.run.waiting import answer

    adapters = served_adapters(config, chat) if policy is not None else None
    servers = start_policy_servers(config, temporary, None, reserve(config, "policy server"), adapters)
    await wait_for_servers(config, list(servers.values()))
    (server,) = servers.values()
    if adapters is not None:
        await _give_adapters(config, adapters, policy, temporary, server)
    deadline = config.policy_server.generate_deadline_s * 2
    return await answer(server.generate_batch.remote(requests), deadline, f"{len(requests)} answers")


async def _give_adapters(
    config: RunConfig, adapters: ServedAdapters, policy: Any, temporary: Path, server: Any
) -> None:
    """Make the policy's adapters random ones that change its answers, and load them into the server."""
    from contextlib import closing, nullcontext

    import torch

    from cluster.run.waiting import answer
    from learner.publish import SharedMemoryPublisher

    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if ".lora_B." in name:  # so large that the adapters add about a tenth to what a layer says
            scale = 0.1 * adapters.rank**0.5 / adapters.alpha
            parameter.data = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)
    with closing(SharedMemoryPublisher(temporary.name, temporary)) as publisher:
        update = publisher.publish(1, policy.adapter_weights(lambda parameters: nullcontext()))
        await answer(server.load.remote(update), config.weight_sync.deadline_s, "the adapters in the engine")


def compared(
    config: RunConfig,
    chat: ChatProcessor,
    policy: Any,
    requests: Sequence[GenerationRequest],
    answers: Sequence[Generation | Refusal],
) -> Iterator[Finding]:
    """Findings on the engine's answers: refusals, prompt ids against the processor's, log-probabilities against the
    learner's (None: it could not load the model)."""
    from actors.generation import Generation
    from cluster.run.sync_check import answered
    from learner.policy.batch import BatchBuilder, PromptMismatch

    given = [(ask, answer) for ask, answer in zip(requests, answers, strict=True) if isinstance(answer, Generation)]
    refused = [answer for answer in answers if not isinstance(answer, Generation)]
    says = f"answered {len(given)} of {len(requests)} prompts"
    yield Finding("engine", says if not refused else f"{says}; {refused[0].detail}", not refused)
    if not given:
        return
    rows = answered([ask for ask, _ in given], [answer for _, answer in given])
    builder = BatchBuilder(chat)
    try:
        batches = [builder.build(rows, [row]) for row in range(len(given))]
    except PromptMismatch as error:
        yield Finding("engine's prompt ids", str(error), False)
        return
    yield Finding("engine's prompt ids", f"equal the processor's on {len(given)} prompts", True)
    if policy is not None:
        learner = [_logprobs(config, chat, policy, batch) for batch in batches]
        yield _difference(config, [answer.logprobs for _, answer in given], learner)


def _logprobs(config: RunConfig, chat: ChatProcessor, policy: Any, batch: Any) -> np.ndarray:
    import torch

    device = config.learner.device if torch.cuda.is_available() else "cpu"
    policy.value_head.to(device)  # no submodule of the policy
    with torch.inference_mode():
        output = policy.to(device)(
            batch.to(device),
            temperature=config.rollout.temperature,
            banned_token_ids=chat.banned_token_ids,
            token_chunk=config.learner.token_chunk,
            with_entropy=False,
        )
    return output.logprobs[0].cpu().numpy()


def _difference(config: RunConfig, engine: list[np.ndarray], learner: list[np.ndarray]) -> Finding:
    from cluster.run.sync_check import agree, fit, tolerance

    found, temperature = fit(engine, learner), config.rollout.temperature
    works = agree(found, temperature, tolerance(config))
    says = (
        f"engine and learner differ by {found['mean_difference'] * temperature:.2g} nats in the mean, "
        f"{found['max_difference'] * temperature:.2g} at most, KL {found['kl'] * temperature**2:.2g}, at "
        f"{found['tokens']:.0f} tokens; tolerance {tolerance(config):g}"
    )
    if not works:
        says += ". The two do not run the same model: use another one, or another version of vLLM or transformers"
    return Finding("log-probabilities", says, works)
