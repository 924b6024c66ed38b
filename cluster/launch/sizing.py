"""How much memory a run's actors need, and how much disk its checkpoints: from the config and the model's shape alone.

What is held is exact: weights, gradients, optimizer states, KV cache. What comes and goes is an estimate: activations
count every input and output of a linear layer once, in the model's precision, as in Korthikanti et al. (arXiv
2205.05198, section 4), without attention matrices, which fused attention never holds. Prompts are taken to be as long
as `policy_server.max_model_len` allows. docs/gpu.md explains the formulas, and compares them with what was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from actors.settings import Transport
from cluster.config.files import validate
from cluster.config.run_config import RunConfig
from cluster.errors import CosoError
from cluster.launch.model_shape import ModelShape
from cluster.launch.placement import Kind
from learner.publish import KEPT_VERSIONS, STORED_COPIES

GIB = 2**30
#: Bytes of a number.
SIZES = {"float32": 4, "bfloat16": 2}
#: DeepSpeed's defaults: numbers in the buffer that gradients pass through, and in the parameters that stage 3 has
#: gathered at a time.
BUCKET, GATHERED = 500_000_000, 1_000_000_000
#: float32 arrays of a chunk's logits at once, in forward and backward pass (`learner.policy.token_logprobs`).
LOGIT_COPIES = 5
#: What CUDA, its libraries and NCCL take in a process, about, bytes; an engine also has graphs and activations.
RUNTIME, ENGINE_RUNTIME = 1 * GIB, 3 * GIB


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What one actor needs. parts: bytes by what they are for."""

    actor: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        return f"{self.actor}: {gib(self.total)} GiB ({self.listed})"

    @property
    def listed(self) -> str:
        """Its parts, in GiB."""
        return ", ".join(f"{name} {gib(size)}" for name, size in self.parts.items() if size)


def gib(size: float) -> str:
    """GiB, for people: `0.003`, `1.5`, `61`."""
    amount = size / GIB
    return f"{amount:.0f}" if amount >= 100 else f"{amount:.1f}" if amount >= 0.1 else f"{amount:.2g}"


def trained_parameters(config: RunConfig, shape: ModelShape) -> int:
    """Numbers that the learner trains, the small value head not counted."""
    lora = config.learner.lora
    return shape.parameters if lora is None else shape.adapter_parameters(lora.rank, lora.target == "all-linear")


def learner_states(config: RunConfig, shape: ModelShape) -> dict[str, int]:
    """What a learner rank holds all the time, bytes.

    With N weights, T of them trained, R ranks and AdamW's two moments, bytes of N, T and T:

        float32    stage 0: 4 N, 4 T, 8 T     1: 4 N, 4 T, 12 T/R     2: 4 N, 4 T/R, 12 T/R     3: all divided by R
        bfloat16   stage 0, 1: 2 N, 6 T, 12 T/R                       2: 2 N, 4 T/R, 12 T/R     3: all divided by R

    DeepSpeed's optimizer states include a float32 copy of the weights, also of float32 ones (not at stage 0). In
    bfloat16 the gradients of stages 0 and 1 are a float32 sum beside those of the last pass.
    """
    settings, size = config.learner, SIZES[config.model.dtype]
    stage, ranks, trained = settings.zero_stage, settings.ranks, trained_parameters(config, shape)
    frozen = shape.parameters if settings.lora is not None else 0
    plain, early_bf16 = stage == 0 and size == 4, stage < 2 and size == 2
    # DeepSpeed's stage 0 is not used in bfloat16, see `learner.engine`.
    optimizer = 8 * trained if plain else 12 * trained // ranks
    return {
        "weights": (frozen + trained) * size // (ranks if stage == 3 else 1),
        "gradients": (6 if early_bf16 else 4) * trained // (ranks if stage >= 2 else 1),
        "optimizer": optimizer,
    }


def learner_memory(config: RunConfig, shape: ModelShape) -> Memory:
    """What a rank needs at most, on its own device."""
    settings, size = config.learner, SIZES[config.model.dtype]
    parts = learner_states(config, shape)
    if settings.device == "cuda":
        if settings.zero_stage == 3:
            parts["gathered"] = min(shape.parameters, GATHERED) * size
        if settings.zero_stage >= 2 or (settings.zero_stage == 1 and size == 4):
            parts["buffer"] = BUCKET * size
        parts["runtime"] = RUNTIME
    parts["activations"] = activations(config, shape)
    parts["token head"] = token_head(config, shape)
    return Memory(actor="learner rank", parts=parts)


def token_head(config: RunConfig, shape: ModelShape) -> int:
    """Logits of one chunk, and where the head is trained, a chunk's gradient of its weights, bytes."""
    answers = min(config.learner.micro_batch * config.rollout.max_new_tokens, tokens_of_pass(config))
    rows = min(config.learner.token_chunk, answers)
    gradient = shape.hidden * SIZES[config.model.dtype] if config.learner.lora is None else 0
    return shape.vocabulary * (rows * 4 * LOGIT_COPIES + gradient)


def tokens_of_pass(config: RunConfig) -> int:
    """The most tokens of one forward pass of a rank."""
    settings, longest = config.learner, config.policy_server.max_model_len
    tokens = settings.micro_batch * longest
    return tokens if settings.micro_tokens is None else min(tokens, max(settings.micro_tokens, longest))


def activations(config: RunConfig, shape: ModelShape) -> int:
    """What a forward pass keeps for the backward pass, bytes. With checkpointing: each layer's input, and all of the
    one layer that is computed again."""
    settings, size = config.learner, SIZES[config.model.dtype]
    tokens, longest = tokens_of_pass(config), config.policy_server.max_model_len
    image_tokens = tokens * max(0, longest - config.rollout.max_new_tokens) // longest
    vision_trained = settings.lora is None or settings.lora.target == "all-linear"
    patches = image_tokens * shape.patches_per_token if vision_trained else 0
    if not settings.gradient_checkpointing:
        return (tokens * shape.text_width + patches * shape.vision_width) * size
    text = tokens * (shape.hidden * shape.layers + shape.text_width // shape.layers)
    vision = patches * (shape.vision_hidden * shape.vision_layers + shape.vision_width // shape.vision_layers)
    return (text + vision) * size


def kv_bytes_per_token(config: RunConfig, shape: ModelShape) -> int:
    """KV cache of one token, over all GPUs of a server, bytes."""
    return 2 * shape.layers * shape.key_value_heads * shape.head_dim * SIZES[config.model.dtype]


def engine_memory(config: RunConfig, shape: ModelShape) -> Memory:
    """What a policy server needs of each of its GPUs (or of the machine), with the KV cache that the config
    states, or one for `policy_server.max_concurrent_requests` requests of full length."""
    settings = config.policy_server
    cache = settings.stated_kv_cache_bytes or wanted_kv_bytes(config, shape)
    parts = {"weights": engine_weights(config, shape), "KV cache": cache}
    if settings.device == "cuda":
        parts["runtime"] = ENGINE_RUNTIME
    return Memory(actor="policy server", parts=parts)


def engine_weights(config: RunConfig, shape: ModelShape) -> int:
    """On each GPU, with the adapters where those are served as such, bytes."""
    adapters = trained_parameters(config, shape) if config.learner.served_adapters is not None else 0
    return (shape.parameters + adapters) * SIZES[config.model.dtype] // config.policy_server.tensor_parallel


def wanted_kv_bytes(config: RunConfig, shape: ModelShape) -> int:
    """KV cache for all requests at full length, on each GPU."""
    settings = config.policy_server
    tokens = settings.max_concurrent_requests * settings.max_model_len
    return tokens * kv_bytes_per_token(config, shape) // min(settings.tensor_parallel, shape.key_value_heads)


def checkpoint_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Disk of one checkpoint: a complete model folder, the weights that are trained, the optimizer's states."""
    size, trained = SIZES[config.model.dtype], trained_parameters(config, shape)
    adapters = trained * size if config.learner.lora is not None else 0
    plain = config.learner.zero_stage == 0 and size == 4
    return shape.parameters * size + adapters + trained * size + trained * (8 if plain else 12)


def published_bytes(config: RunConfig, shape: ModelShape, transport: Transport) -> int:
    """What weights on their way to the servers take of a node's memory."""
    copies = {"shared_memory": KEPT_VERSIONS, "object_store": STORED_COPIES}.get(transport, 0)
    adapters = config.learner.served_adapters is not None
    numbers = trained_parameters(config, shape) if adapters else shape.parameters
    return copies * numbers * SIZES[config.model.dtype]


def host_memory(config: RunConfig, shape: ModelShape, actors: Mapping[Kind, int], transport: Transport) -> Memory:
    """What the models need of a node's own memory. actors: how many of each kind run there; transport: of weights."""
    ranks, servers = actors.get("learner rank", 0), actors.get("policy server", 0)
    parts = {}
    if config.learner.device == "cpu":
        parts["learner ranks"] = ranks * learner_memory(config, shape).total
    else:  # each reads the whole model before it goes to the GPU
        parts["loading the learner"] = ranks * shape.parameters * SIZES[config.model.dtype]
        if config.learner.offload_optimizer:
            parts["optimizer"] = ranks * learner_states(config, shape)["optimizer"]
    if config.policy_server.device == "cpu":
        parts["policy servers"] = servers * engine_memory(config, shape).total
    elif config.policy_server.sleep:
        parts["sleeping servers"] = servers * engine_weights(config, shape) * config.policy_server.tensor_parallel
    if ranks or servers:
        parts["published weights"] = published_bytes(config, shape, transport)
    return Memory(actor="models", parts=parts)


def shortages(config: RunConfig, shape: ModelShape, gpu_bytes: float) -> Iterator[str]:
    """What does not fit into GPUs of this memory, one line each, with changes that would help."""
    if config.learner.device == "cuda":
        needed, has = learner_memory(config, shape), learner_room(config, gpu_bytes)
        if needed.total > has:
            helps = "; ".join(f"{what}: {gib(size)} GiB" for what, size in _smaller_learners(config, shape))
            where = f"{gib(has)} GiB of a GPU of {gib(gpu_bytes)} GiB"
            yield f"too much for {where}: {needed}. Try {helps or 'a smaller model or larger GPUs'}"
    if config.policy_server.device == "cuda":
        yield from _engine_shortages(config, shape, gpu_bytes)


def learner_room(config: RunConfig, gpu_bytes: float) -> float:
    """What a rank may take of a GPU while it trains: its share, or where servers sleep meanwhile, all but what those
    keep."""
    if config.policy_server.sleep and config.shares_gpus:
        return gpu_bytes - RUNTIME
    return gpu_bytes * config.learner.gpu_share


def resting_learner(config: RunConfig, shape: ModelShape) -> Memory:
    """What a rank on a GPU keeps of it while it does not train."""
    states = learner_states(config, shape)
    parts = {"weights": states["weights"], "runtime": RUNTIME}
    if not config.learner.offload_optimizer:
        parts["optimizer"] = states["optimizer"]
    if config.learner.zero_stage < 2 and config.model.dtype == "bfloat16":  # DeepSpeed's float32 sum
        parts["gradients"] = 4 * trained_parameters(config, shape)
    return Memory(actor="the resting learner", parts=parts)


def engine_room(config: RunConfig, gpu_bytes: float) -> float:
    """What a policy server may take of a GPU: its share where the KV cache is stated, else what vLLM takes."""
    settings = config.policy_server
    if settings.stated_kv_cache_bytes is None:
        return gpu_bytes * settings.gpu_memory_utilization
    return gpu_bytes * (1.0 if settings.sleep else settings.gpu_share)


def _engine_shortages(config: RunConfig, shape: ModelShape, gpu_bytes: float) -> Iterator[str]:
    settings, room, needed = config.policy_server, engine_room(config, gpu_bytes), engine_memory(config, shape)
    stated, wanted = settings.stated_kv_cache_bytes, wanted_kv_bytes(config, shape)
    longest = wanted // settings.max_concurrent_requests
    left = room - needed.parts["weights"] - ENGINE_RUNTIME
    where = f"{gib(room)} GiB of a GPU of {gib(gpu_bytes)} GiB"
    if left < (stated or longest):
        shared, double = settings.gpu_share < 1, 2 * settings.tensor_parallel
        wider = "a larger policy_server.gpu_share" if shared else f"policy_server.tensor_parallel={double}"
        yield (
            f"too much for {where} (policy_server.gpu_share, policy_server.gpu_memory_utilization): {needed}. "
            f"Try {wider}, model.dtype bfloat16 or a shorter policy_server.max_model_len"
        )
    elif (cache := stated or left) < wanted:
        yield (
            f"a policy server's KV cache holds {cache // longest:.0f} of {settings.max_concurrent_requests} requests "
            f"of full length ({gib(cache)} of {gib(wanted)} GiB, in {where}): it works, and the others wait"
        )
    resting, taken = resting_learner(config, shape), needed.total if stated else room
    if settings.sleep and config.shares_gpus and resting.total + taken > gpu_bytes:
        yield (
            f"too much for a GPU of {gib(gpu_bytes)} GiB: {gib(taken)} GiB of a policy server that is awake, and "
            f"{resting}. Lower policy_server.gpu_memory_utilization, or set learner.offload_optimizer=true"
        )


def _smaller_learners(config: RunConfig, shape: ModelShape) -> Iterator[tuple[str, int]]:
    """Changes of the settings with which a rank needs less, and what it needs then."""
    now, ranks = learner_memory(config, shape).total, config.learner.ranks
    table: list[tuple[str, dict[str, Any]]] = [
        ("model.dtype=bfloat16", {"model": {"dtype": "bfloat16"}}),
        ("learner.gradient_checkpointing=true", {"learner": {"gradient_checkpointing": True}}),
        ("learner.micro_batch=1", {"learner": {"micro_batch": 1}}),
        ("learner.zero_stage=2", {"learner": {"zero_stage": 2}}),
        ("learner.zero_stage=3", {"learner": {"zero_stage": 3}}),
        (f"learner.zero_stage=3 learner.ranks={2 * ranks}", {"learner": {"zero_stage": 3, "ranks": 2 * ranks}}),
        ("learner.lora={}", {"learner": {"lora": {}}}),
    ]
    for what, changed in table:
        values = config.model_dump()
        for section, keys in changed.items():
            values[section] |= keys
        try:
            smaller = learner_memory(validate(values), shape).total
        except CosoError:
            continue  # the settings contradict each other
        if smaller < 0.98 * now:
            yield what, smaller
