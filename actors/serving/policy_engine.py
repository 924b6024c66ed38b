"""Starting vLLM's asynchronous engine for one policy server: its options, its environment, and what can go wrong."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from actors.chat import ChatProcessor, NotAVisionLanguageModel
from actors.serving.weight_transfer import Transport

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


#: Bound on processed images that vLLM keeps, GiB.
IMAGE_CACHE_GIB = 0.25
#: Tokens a CPU engine computes in one step: enough for many short prompts at once.
MINIMUM_BATCHED_TOKENS = 4096


class ModelNotServable(ValueError):
    """The named model is no vision-language model, or vLLM cannot serve it."""


@dataclass(frozen=True, kw_only=True)
class PolicyServerOptions:
    """How one engine runs."""

    model_path: str  # folder or hub name of a Hugging Face VLM
    temp_folder: str  # for vLLM's sockets and scratch files; short, since socket paths are (107 characters)
    dtype: str = "float32"
    max_model_len: int = 1024  # prompt and answer together, tokens
    max_concurrent_requests: int = 64
    images_per_prompt: int = 1  # at most; a policy's prompts have one
    device: Literal["cpu", "cuda"] = "cpu"
    tensor_parallel: int = 1  # GPUs
    kv_cache_bytes: int = 32 << 20  # CPU only
    gpu_memory_utilization: float = 0.85  # GPU only
    seed: int = 0
    transport: Transport = "shared_memory"
    start_deadline_s: float = 300.0
    generate_deadline_s: float = 120.0

    def __post_init__(self) -> None:
        if len(self.temp_folder) > 60:
            raise ValueError(f"the temporary folder {self.temp_folder!r} is too long for sockets in it (60 at most)")


def policy_server_environment(options: PolicyServerOptions) -> dict[str, str]:
    """Environment variables that the actor's process needs before it imports anything (`runtime_env`)."""
    environment = {
        "TMPDIR": options.temp_folder,
        "VLLM_RPC_BASE_PATH": options.temp_folder,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(max(1, int(options.start_deadline_s))),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if Path(options.model_path).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if options.device == "cpu":
        environment |= {
            "OMP_NUM_THREADS": "1",  # with more, any other load slows vLLM tenfold
            "TORCHDYNAMO_DISABLE": "1",  # or the first log-probabilities compile for ten seconds
            # Keeps model and scheduler in one process: two processes per server instead of three, half the start time,
            # and no shared-memory segments that a kill would leave behind.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    return environment


def start_engine(options: PolicyServerOptions) -> tuple[ChatProcessor, AsyncLLM]:
    """Start the engine and wait until it is up (20 s and more). Raises `ModelNotServable`."""
    Path(options.temp_folder).mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = None  # it may have been looked up before the folder existed
    try:
        chat = ChatProcessor(options.model_path)
    except NotAVisionLanguageModel as error:
        raise ModelNotServable(str(error)) from error
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    log = _OwnErrorLog()
    try:
        config = AsyncEngineArgs(**_engine_arguments(options)).create_engine_config()
        engine = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    except Exception as error:
        # When it is the engine's process that failed, its reason is in the log and not in the exception.
        reason = log.last_error() or str(error).strip() or type(error).__name__
        raise ModelNotServable(
            f"vLLM cannot serve model.path {options.model_path!r} on {options.device}: {reason}"
        ) from error
    if not config.model_config.is_multimodal_model:
        engine.shutdown()
        raise ModelNotServable(
            f"vLLM serves model.path {options.model_path!r} as a text model ({config.model_config.architecture}), "
            "without images. Name a vision-language model."
        )
    return chat, engine


def _engine_arguments(options: PolicyServerOptions) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": options.model_path,
        "dtype": options.dtype,
        "seed": options.seed,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_concurrent_requests,
        "limit_mm_per_prompt": {"image": options.images_per_prompt},
        "mm_processor_cache_gb": IMAGE_CACHE_GIB,
        # Prompts begin with the picture, so there is little to share, and an answer would depend on what was asked
        # before. And vLLM 0.32 lets go of an image whose prompt it finds in this cache: when a weight swap then clears
        # the cache under the running request, the engine dies ("Encoder cache miss").
        "enable_prefix_caching": False,
        "generation_config": "vllm",  # sampling is what the request says, not what the model's folder suggests
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from: after temperature and bans
        "tensor_parallel_size": options.tensor_parallel,
        "distributed_executor_backend": "uni" if options.tensor_parallel == 1 else "mp",
        "worker_extension_cls": "actors.serving.weight_backends.WorkerExtension",
        "weight_transfer_config": {"backend": "nccl" if options.transport == "nccl" else "coso"},
        "disable_log_stats": True,
    }
    if options.device == "cpu":
        return arguments | {
            "enforce_eager": True,
            "kv_cache_memory_bytes": options.kv_cache_bytes,
            # A prompt computed in pieces takes its seeded generator back after each piece, which CPU generators cannot
            # do: the engine would die of it.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(MINIMUM_BATCHED_TOKENS, options.max_model_len),
        }
    return arguments | {"gpu_memory_utilization": options.gpu_memory_utilization}


class _OwnErrorLog:
    """What this process and its children write to standard error from now on, where that is a file (as under Ray)."""

    _ERROR = re.compile(r"\b[A-Za-z_.]*(?:Error|Exception): \S.*")

    def __init__(self) -> None:
        self._path = Path("/proc/self/fd/2")
        self._start = self._path.stat().st_size if self._path.is_file() else None

    def last_error(self) -> str:
        """The last line that reads like an exception; "" if there is none or the log cannot be read."""
        if self._start is None:
            return ""
        with open(self._path, "rb") as file:
            file.seek(self._start)
            text = file.read().decode(errors="replace")
        found = self._ERROR.findall(text)
        return found[-1].strip() if found else ""
