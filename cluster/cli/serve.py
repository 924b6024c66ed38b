"""`coso serve`: a model behind an OpenAI-compatible endpoint, on the engine that serves policies in a run."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer


def serve(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="FILE.yaml... key.sub=value...", help="As for `coso train`.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub name; default: model.path of the config.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; others than loopback are open to the network.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any that is free.")] = 8000,
    name: Annotated[str, typer.Option(help="What requests call the model.")] = "policy",
    images: Annotated[int, typer.Option(min=1, help="Pictures that a request may hold.")] = 2,
) -> None:
    """Serve a model at an OpenAI-compatible endpoint, for instance to judge phone tasks, until Ctrl-C.

    Its engine is set by `model` and `policy_server` of the config. With VLLM_API_KEY in the environment, requests have
    to bear that key.
    """
    from actors.serving import openai_api, policy_engine
    from cluster.config.files import config_of_words
    from cluster.errors import CosoError
    from cluster.launch.ray_runtime import short_temporary_folder, temporary_prefix
    from cluster.telemetry.progress import spinner

    config = config_of_words([*(words or []), *([f"model.path={json.dumps(model)}"] if model else [])])
    try:
        bound = openai_api.listening_socket(host, port)
    except OSError as error:
        raise CosoError(f"cannot listen at {host}:{port}: {error}; choose another --host or --port") from None
    address = f"http://{host}:{bound.getsockname()[1]}/v1"
    temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix(os.getpid()), dir=short_temporary_folder()))
    # What vLLM warns of are choices made in `policy_engine`; a person who waits for an address need not read them.
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    starting = ExitStack()

    def on_serving() -> None:
        starting.close()
        typer.echo(f"serving {name!r} at {address} (Ctrl-C ends it)")

    try:
        launch = policy_engine.PolicyServerLaunch(
            index=0, run_seed=config.seed, temp_folder=str(temporary / "v0"), images_per_prompt=images
        )
        environment = policy_engine.policy_server_environment(config.model, config.policy_server, launch)
        os.environ.update(environment | quiet)
        with starting:
            starting.enter_context(spinner(f"starting an engine for {config.model.path}"))
            _, engine = policy_engine.start_engine(config.model, config.policy_server, launch)
            try:
                asyncio.run(openai_api.serve(engine, config.model.path, name, bound, on_serving))
            finally:
                engine.shutdown()
    except policy_engine.ModelNotServable as error:
        raise CosoError(str(error)) from error
    finally:
        bound.close()
        shutil.rmtree(temporary, ignore_errors=True)
