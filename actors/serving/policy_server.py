"""A policy server: vLLM's asynchronous engine in a Ray actor, which swaps its weights while it serves.

The engine runs in a process of its own, which the actor starts and watches. If that process dies, the actor ends itself
and Ray restarts it. A restarted server loads the current weights before it answers any request.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from actors.generation import Generation, GenerationRequest, Refusal
from actors.serving.adapters.served import lora_request
from actors.serving.admission import BusyMeter, Gate, Silence, Sleep
from actors.serving.engine_loading import load_adapter, load_weights
from actors.serving.policy_engine import LastWords, OwnErrorLog, PolicyServerLaunch, resident_bytes, start_engine
from actors.serving.prompt_renderer import PromptRenderer
from actors.serving.weight_transfer import (
    COLLECTIVE_TRANSPORTS,
    CollectiveGroup,
    LoadReport,
    WeightTransferError,
    WeightUpdate,
    anonymous_file,
    check_readable,
)
from actors.settings import ModelSettings, PolicyServerSettings

logger = logging.getLogger(__name__)

#: Added to the logits of tokens that an answer must not contain. vLLM allows no lower value; exp(-100) is close to 0.
BAN_LOGIT_BIAS = -100.0

#: Niceness of an engine on CPUs. Where it shares cores with the learner, the learner goes first: the training loop
#: always waits for the learner, but for answers only when it needs them to train on.
LOWEST_PRIORITY = 19


class PolicyServer:
    """Serves one policy. An asynchronous Ray actor class: `ray.remote(PolicyServer)`.

    Options for Ray: `max_restarts=-1`, and `policy_server_environment(...)` as the `env_vars` of its `runtime_env`.
    """

    def __init__(
        self,
        model: ModelSettings,
        settings: PolicyServerSettings,
        launch: PolicyServerLaunch,
        registry: Any | None = None,
    ) -> None:
        """Starts the engine in the background of the event loop. registry: handle of a `WeightRegistry` actor, which
        says how often this server was started and which weights are current; None: serve the model's own."""
        if settings.device == "cpu":
            os.nice(LOWEST_PRIORITY)
        self._model = model
        self._settings = settings
        self._launch = launch
        self._name = launch.name
        self._registry = registry
        self._incarnation = 0  # how often this server was started before
        self._log = OwnErrorLog()
        self._last_words = LastWords(Path(launch.temp_folder) / f"last_words_{launch.index}")
        self._last_failure = self._last_words.read()
        self._broken: Exception | None = None
        self._current = asyncio.Event()  # set once the engine holds the current weights
        self._pausing = asyncio.Lock()  # held while the engine's scheduler is paused
        self._gate = Gate()
        self._sleep = Sleep(self._gate)
        self._meter = BusyMeter()
        self._silence = Silence()
        self._request_ids = itertools.count()
        self._adapter: Any = None  # vLLM's request for the adapter, where updates bring one
        self._version = 0
        self._requests = 0
        self._generated_tokens = 0
        self._starting = asyncio.get_running_loop().create_task(self._start())

    async def ready(self) -> dict[str, Any]:
        """Wait until the engine serves; returns `status()`. Raises `ModelNotServable`, TimeoutError."""
        await self._started()
        return await self.status()

    async def generate(self, request: GenerationRequest) -> Generation | Refusal:
        """One answer. Raises TimeoutError, naming this server, when it gives no answer to anybody for as long as
        `generate_deadline_s` says."""
        async with self._answering(f"{self._name} did not finish an answer"), self._gate.shared():
            received = time.monotonic()
            engine_input = await self._renderer.render(request)
            return await self._finish(await self._submit(request, engine_input), received)

    async def generate_batch(self, requests: Sequence[GenerationRequest]) -> list[Generation | Refusal]:
        """Answers in the order of the requests: a deterministic function of the requests, weights and settings.

        The batch has the engine to itself, and is queued as a whole before the engine's first step. So it never depends
        on timing which requests share a forward pass. Raises ValueError for sampling without a seed, TimeoutError.
        """
        if any(request.seed is None and request.temperature > 0 for request in requests):
            raise ValueError("generate_batch needs a seed in every request that samples (temperature > 0)")
        if not requests:
            return []
        async with self._answering(f"{self._name} did not finish a batch of {len(requests)}"), self._gate.alone():
            received = time.monotonic()
            inputs = [await self._renderer.render(request) for request in requests]
            async with self._paused():
                submitted = [
                    await self._submit(request, engine_input)
                    for request, engine_input in zip(requests, inputs, strict=True)
                ]
            return list(await asyncio.gather(*(self._finish(collector, received) for collector in submitted)))

    async def refusal(self, request: GenerationRequest) -> Refusal | None:
        """Why a request would have no answer, found without the engine; None if prompt and image are fine."""
        await self._started()
        parts = await self._renderer.parts(request)
        return parts if isinstance(parts, Refusal) else None

    async def load(self, update: WeightUpdate) -> LoadReport:
        """Swap in new weights while serving: requests in flight pause, then continue under the new weights.

        Raises `WeightTransferError`. After a swap that failed half-way, every later call raises it too.
        """
        await self._started()
        await self.wake()
        return await self._load(update)

    async def sleep(self) -> None:
        """Give the GPU's memory back until `wake` or `load`, once no request runs; later requests wait. Weights go to
        host memory. Needs `policy_server.sleep`."""
        await self._started()
        await self._sleep.begin(self._engine)

    async def wake(self) -> None:
        """Take the GPU's memory again, after `sleep`."""
        await self._started()
        await self._sleep.end()

    async def join(self, group: CollectiveGroup, engine: int) -> None:
        """Connect to the learner for broadcasts, as server number `engine` of the group. Blocks until all members have
        connected. Raises `WeightTransferError`."""
        await self._started()
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        try:
            await self._engine.init_weight_transfer_engine(
                WeightTransferInitRequest(init_info=group.as_seen_by(engine))
            )
        except Exception as error:
            raise WeightTransferError(f"{self._name} could not join the weight sync group: {error}") from error

    async def status(self) -> dict[str, Any]:
        """Process ids, node address, how often it was started before, `last_failure` (why the process before ended
        itself, or ""), `starting` (the last line of the engine's log while it starts, then None), weights version,
        requests running and answered, tokens generated, seconds busy and memory in bytes."""
        import ray

        engines = [process.pid for process in multiprocessing.active_children() if process.pid]
        return {
            "name": self._name,
            "pid": os.getpid(),
            "engine_pids": engines,
            "address": ray.util.get_node_ip_address(),
            "incarnation": self._incarnation,
            "last_failure": self._last_failure,
            "starting": None if self._starting.done() else self._log.last_line(),
            "version": self._version,
            "running": self._gate.inside,
            "requests": self._requests,
            "generated_tokens": self._generated_tokens,
            "busy_seconds": self._meter.seconds,
            "rss_bytes": resident_bytes([os.getpid(), *engines]),
        }

    # ---------------------------------------------------------------- start

    async def _started(self) -> None:
        await asyncio.shield(self._starting)
        if self._broken is not None:
            raise self._broken

    async def _start(self) -> None:
        deadline_s = self._settings.start_deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                if self._registry is not None:
                    self._incarnation = await self._registry.count_start.remote(self._launch.index)
                self._chat, self._engine = await asyncio.to_thread(
                    start_engine, self._model, self._settings, self._launch, self._incarnation
                )
                self._renderer = PromptRenderer(self._chat, self._engine, self._settings.max_model_len)
                self._bias = dict.fromkeys(self._chat.banned_token_ids, BAN_LOGIT_BIAS)
                loop = asyncio.get_running_loop()
                for process in multiprocessing.active_children():
                    loop.add_reader(process.sentinel, self._end_this_process)
                if self._settings.device == "cpu":
                    await self._engine.collective_rpc("unlink_own_semaphores")
                if (adapters := self._launch.adapters) is not None:
                    await self._engine.collective_rpc("begin_adapter", args=(adapters.rank, adapters.alpha))
                    self._adapter = lora_request()
                elif Path(self._model.path).is_dir():
                    await self._engine.collective_rpc("remember_held_weights", args=(self._model.path,))
                await self._engine.update_weight_version("0")
                await self._take_current_weights()
        except BaseException as error:
            for process in multiprocessing.active_children():
                asyncio.get_running_loop().remove_reader(process.sentinel)
                process.kill()
            if isinstance(error, TimeoutError):
                last = self._log.last_line()
                raise TimeoutError(
                    f"{self._name} did not start within {deadline_s:.0f} s (policy_server.start_deadline_s)"
                    + (f"; the last line of its log: {last}" if last else "")
                ) from error
            raise

    async def _take_current_weights(self) -> None:
        """Load the weights that the registry has; if their file was replaced meanwhile, ask the registry again."""
        while True:
            update: WeightUpdate | None = None
            if self._registry is not None:
                update = await self._registry.latest.remote()
            if update is None:
                self._current.set()
                return
            if update.transport in COLLECTIVE_TRANSPORTS:
                return  # answers wait until the learner has connected to this server and sent the weights again
            try:
                check_readable(update)
            except WeightTransferError:
                if self._registry is None or (await self._registry.latest.remote()) == update:
                    raise
                continue
            await self._load(update)
            return

    def _end_with_engine(self, error: Exception) -> None:
        """End this process if the error says that the engine died. The error can come before the engine's process ends.
        A caller retries when an actor died, but not when it raised an error."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if isinstance(error, EngineDeadError):
            self._end_this_process()

    def _end_this_process(self) -> None:
        """End the actor, so that Ray restarts it. Ray does not notice a dead engine in an actor that still runs."""
        found = self._log.last_error()
        reason = f"the vLLM engine died{f' ({found})' if found else ''}"
        logger.error("%s: %s; the actor ends and Ray restarts it", self._name, reason)
        self._last_words.write(reason)
        logging.shutdown()
        os._exit(1)

    # ---------------------------------------------------------------- answers

    @asynccontextmanager
    async def _answering(self, failure: str) -> AsyncIterator[None]:
        """Run the block on a started engine with current weights. TimeoutError after too long a silence: no answer of
        this server, to this request or to another, and no new weights."""
        await self._started()
        deadline_s = self._settings.generate_deadline_s
        try:
            async with self._silence.bounded(deadline_s):
                await self._current.wait()
                with self._meter.running():
                    yield
        except TimeoutError as error:
            raise TimeoutError(
                f"{failure}: it was silent for {deadline_s:.0f} s (policy_server.generate_deadline_s)"
            ) from error
        except Exception as error:
            self._end_with_engine(error)
            raise

    async def _submit(self, request: GenerationRequest, engine_input: Any | Refusal) -> Any | Refusal:
        """Queue a rendered request; returns vLLM's collector of its output, or why the engine does not take it."""
        if isinstance(engine_input, Refusal):
            return engine_input
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=request.temperature,
            max_tokens=request.max_new_tokens,
            seed=request.seed,
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            logit_bias=self._bias or None,
            ignore_eos=True,  # the end tokens are the model's own, as the learner knows them, and no others
            stop_token_ids=self._chat.eos_token_ids,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        try:
            return await self._engine.add_request(
                str(next(self._request_ids)), engine_input, params, lora_request=self._adapter
            )
        except (VLLMClientError, ValueError) as error:
            return Refusal("request_refused", f"vLLM refuses the request: {error}")

    async def _finish(self, collector: Any | Refusal, received: float) -> Generation | Refusal:
        if isinstance(collector, Refusal):
            return collector
        try:
            output = await collector.get()
        except asyncio.CancelledError:
            await self._engine.abort(collector.request_id, internal=True)
            raise
        finally:
            collector.close()
        (completion,) = output.outputs
        self._silence.broken()
        self._requests += 1
        self._generated_tokens += len(completion.token_ids)
        return Generation(
            prompt_ids=np.asarray(output.prompt_token_ids, np.int32),
            response_ids=np.asarray(completion.token_ids, np.int32),
            logprobs=np.asarray(completion.logprobs.logprobs, np.float32),
            version_spans=[(int(span.version), span.start) for span in completion.weight_versions],
            finish_reason=completion.finish_reason,
            text=self._chat.decode(completion.token_ids),
            seconds=time.monotonic() - received,
        )

    # ---------------------------------------------------------------- weights

    @asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        """Within the block the engine accepts requests but makes no step. It resumes after it, unless a swap failed."""
        async with self._pausing:
            # Drop everything computed with the weights, but keep processed images: they do not depend on weights, and
            # waiting requests refer to them.
            await self._engine.pause_generation(mode="keep", clear_cache=False)
            await self._engine.reset_prefix_cache(reset_running_requests=True)
            await self._engine.reset_encoder_cache()
            try:
                yield
            finally:
                if self._broken is None:
                    await self._engine.resume_generation()

    async def _load(self, update: WeightUpdate) -> LoadReport:
        check_readable(update)
        if update.refs:
            with ExitStack() as files:
                paths = [files.enter_context(anonymous_file(np.asarray(await ref))) for ref in update.refs]
                return await self._swap(update, {"paths": paths})
        if update.path is not None:
            return await self._swap(update, {"paths": [update.path]})
        announcement = {
            "names": list(update.names),
            "dtype_names": list(update.dtypes),
            "shapes": [list(s) for s in update.shapes],
        }
        return await self._swap(update, announcement)

    async def _swap(self, update: WeightUpdate, info: dict[str, Any]) -> LoadReport:
        """info: see `actors.serving.engine_loading`."""
        version, started = update.version, time.monotonic()
        parts: dict[str, float] = {}
        since = started

        def part(name: str) -> None:
            nonlocal since
            before, since = since, time.monotonic()
            parts[name] = since - before

        async with self._paused():
            part("pause")
            try:
                load = load_weights if self._adapter is None else load_adapter
                checksums, held = await load(self._engine, update, info, self._name, part)
                part("check")
            except Exception as error:
                self._end_with_engine(error)
                # Some of its weights are new and some old, so it must not answer again.
                self._broken = WeightTransferError(
                    f"{self._name} could not load weights version {version} and will not answer until it is "
                    f"restarted: {error}"
                )
                raise self._broken from error
        part("resume")
        self._version = version
        self._silence.broken()
        self._current.set()
        return LoadReport(seconds=since - started, parts=parts, version=version, checksums=checksums, held=held)
