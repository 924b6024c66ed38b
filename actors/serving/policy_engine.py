"""Starting vLLM's asynchronous engine for one policy server: its arguments, its environment, and what can go wrong."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from actors.chat import ChatProcessor, NotAVisionLanguageModel
from actors.model_folder import read_model
from actors.serving.adapters.served import ServedAdapters
from actors.settings import ModelSettings, PolicyServerSettings

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


#: Size of vLLM's cache of processed images, GiB.
IMAGE_CACHE_GIB = 0.25
#: Tokens that a CPU engine computes in one step, at least: enough for many short prompts at once.
MINIMUM_BATCHED_TOKENS = 4096

#: CPU threads of an engine where the config says nothing. On CPUs, more of them wait for each other.
ENGINE_THREADS = {"cpu": 1, "cuda": 4}


class ModelNotServable(ValueError):
    """The model is no vision-language model, or vLLM cannot serve it."""


@dataclass(frozen=True, kw_only=True)
class PolicyServerLaunch:
    """What the run tells a policy server beside its settings."""

    index: int  # of this server among the run's
    run_seed: int  # >= 0
    temp_folder: str  # for vLLM's sockets and scratch files; at most 60 characters, since socket paths are short
    images_per_prompt: int = 1  # at most; a policy's prompts have one
    adapters: ServedAdapters | None = None  # that updates bring; None: they bring all weights

    def __post_init__(self) -> None:
        if len(self.temp_folder) > 60:
            raise ValueError(
                f"the temporary folder {self.temp_folder!r} is too long for sockets in it: 60 characters at most. "
                "Set TMPDIR to a shorter one."
            )

    @property
    def name(self) -> str:
        """For error messages."""
        return f"policy server {self.index}"


def engine_seed(run_seed: int, server: int, incarnation: int) -> int:
    """Seed of one engine, below 2**32 (vLLM takes no larger one), for requests without a seed of their own.

    It differs between the servers of a run, so that they explore differently, and after each restart of a server, so
    that it does not sample the same sequence again.
    """
    sequence = np.random.SeedSequence(run_seed, spawn_key=(server, incarnation))
    return int(sequence.generate_state(1, np.uint32)[0])


def policy_server_environment(
    model: ModelSettings, settings: PolicyServerSettings, launch: PolicyServerLaunch
) -> dict[str, str]:
    """Environment variables that the actor's process needs before it imports anything (`runtime_env`)."""
    environment = {
        "TMPDIR": launch.temp_folder,
        "VLLM_RPC_BASE_PATH": launch.temp_folder,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(max(1, int(settings.start_deadline_s))),
        "TOKENIZERS_PARALLELISM": "false",
        # Ray would set 1, the CPUs that are reserved for an engine.
        "OMP_NUM_THREADS": str(settings.threads or ENGINE_THREADS[settings.device]),
    }
    if Path(model.path).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if settings.device == "cpu":
        environment |= {
            "TORCHDYNAMO_DISABLE": "1",  # else the first log-probabilities compile for ten seconds
            # Model and scheduler in one process: two processes per server instead of three, half the start time, and
            # no shared-memory segments that a kill would leave behind.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    else:
        environment |= {
            # What the start is about, in the log that `OwnErrorLog` reads: on a GPU it takes minutes.
            "VLLM_LOGGING_LEVEL": "INFO",
            "VLLM_LOGGING_STREAM": "ext://sys.stderr",
            # FlashInfer compiles its kernels at the first start, for minutes and with a CUDA toolkit. Its sampler is
            # for top-k and top-p, which no request has; its all-reduce is a gain for tensor parallel engines only.
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
        }
    return environment


def start_engine(
    model: ModelSettings, settings: PolicyServerSettings, launch: PolicyServerLaunch, incarnation: int = 0
) -> tuple[ChatProcessor, AsyncLLM]:
    """Start the engine and wait until it serves (20 s and more). incarnation: how often it was started before. Raises
    `ModelNotServable`."""
    Path(launch.temp_folder).mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = None  # Python may have cached another folder before this one existed
    try:
        chat = read_model(model.path, device=settings.device)
    except NotAVisionLanguageModel as error:
        raise ModelNotServable(str(error)) from error
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    log = OwnErrorLog()
    try:
        arguments = engine_arguments(model, settings, launch, incarnation)
        config = AsyncEngineArgs(**arguments).create_engine_config()
        _check_servable(model.path, config.model_config)
        engine = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    except ModelNotServable:
        raise
    except Exception as error:
        # If the engine's process failed, the reason is in its log and not in the exception.
        reason = log.last_error() or str(error).strip() or type(error).__name__
        raise ModelNotServable(f"vLLM cannot serve model.path {model.path!r} on {settings.device}: {reason}") from error
    return chat, engine


def _check_servable(path: str, model_config: Any) -> None:
    """Raise `ModelNotServable` for what vLLM would not find out."""
    if not model_config.is_multimodal_model:
        raise ModelNotServable(
            f"vLLM serves model.path {path!r} as a text model ({model_config.architecture}), without images. Name a "
            "vision-language model."
        )


def engine_arguments(
    model: ModelSettings, settings: PolicyServerSettings, launch: PolicyServerLaunch, incarnation: int
) -> dict[str, Any]:
    """Arguments of vLLM's `AsyncEngineArgs`; incarnation: how often this engine was started before."""
    executor = "OneProcess" if settings.tensor_parallel == 1 else "SeveralProcesses"
    arguments: dict[str, Any] = {
        "model": model.path,
        "dtype": model.dtype,
        "seed": engine_seed(launch.run_seed, launch.index, incarnation),
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_concurrent_requests,
        "limit_mm_per_prompt": {"image": launch.images_per_prompt},
        "mm_processor_cache_gb": IMAGE_CACHE_GIB,
        # Prompts begin with the picture, so there is little to share, and an answer would depend on earlier requests.
        # Also, vLLM 0.32 drops an image whose prompt it finds in this cache. When a weight swap then clears the cache
        # under the running request, the engine dies ("Encoder cache miss").
        "enable_prefix_caching": False,
        "generation_config": "vllm",  # sampling is what the request says, not what the model's folder suggests
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from: after temperature and bans
        "hf_overrides": float32_head,
        "tensor_parallel_size": settings.tensor_parallel,
        "distributed_executor_backend": f"actors.serving.engine_processes.{executor}",
        "worker_extension_cls": "actors.serving.weight_backends.WorkerExtension",
        "weight_transfer_config": {"backend": "coso"},
        "disable_log_stats": True,
        "kv_cache_memory_bytes": settings.stated_kv_cache_bytes,
    }
    if launch.adapters is not None:
        arguments |= launch.adapters.engine_arguments(settings.device)
    if settings.device == "cpu":
        return arguments | {
            "enforce_eager": True,
            # A prompt computed in pieces rewinds its seeded generator after each piece. CPU generators cannot do that,
            # and the engine would die.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(MINIMUM_BATCHED_TOKENS, settings.max_model_len),
        }
    return arguments | {
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "enable_sleep_mode": settings.sleep,
        # As in `policy_server_environment`: nothing that waits for FlashInfer's compiler.
        "enable_flashinfer_autotune": False,
        "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}},
    }


def resident_bytes(pids: Sequence[int]) -> int:
    """Memory of those processes that there still are."""
    total = 0
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            total += psutil.Process(pid).memory_info().rss
    return total


def float32_head(config: Any) -> Any:
    """The model's config, so that vLLM gives logits in float32 whatever the model's precision (`hf_overrides`).

    In bfloat16, a logit of 20 is rounded to a multiple of 0.125. The learner's `TokenHead` has float32 logits too, so
    the two agree. The weights of the head stay as they are. Where a family's text model is a model of its own, vLLM
    reads the text model's config, else the whole one; so both say it.
    """
    config.head_dtype = "float32"
    config.get_text_config().head_dtype = "float32"
    return config


class OwnErrorLog:
    """What this process and its children write to standard error from now on, if that is a file (as under Ray)."""

    _ERROR = re.compile(r"\b[A-Za-z_.]*(?:Error|Exception): \S.*")

    def __init__(self) -> None:
        self._path = Path("/proc/self/fd/2")
        self._start = self._path.stat().st_size if self._path.is_file() else None

    def last_error(self) -> str:
        """The last line that reads like an exception, other than vLLM's word for an engine that is dead already; "" if
        there is none or the log cannot be read."""
        found = [line for line in self._ERROR.findall(self._text()) if "EngineDeadError" not in line]
        return found[-1].strip() if found else ""

    def last_line(self) -> str:
        """What was written last, without colours and at most 160 characters of it; "" if there is nothing or the log
        cannot be read."""
        plain = re.sub(r"\x1b\[[0-9;]*m", "", self._text())
        lines = [line.strip() for line in re.split(r"[\r\n]+", plain) if line.strip()]
        return lines[-1][-160:] if lines else ""

    def _text(self) -> str:
        if self._start is None:
            return ""
        with open(self._path, "rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")


class LastWords:
    """Why a server ended itself, in a file for the process that Ray starts in its place."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, reason: str) -> None:
        with suppress(OSError):  # the server must end, with or without words
            self._path.write_text(reason, encoding="utf-8")

    def read(self) -> str:
        """The reason, once; "" if the process before, if any, did not end itself on this node."""
        try:
            reason = self._path.read_text(encoding="utf-8")
            self._path.unlink()
        except OSError:
            return ""
        return reason
