"""`coso serve`: serve a model at an OpenAI-compatible endpoint, with the same engine as a run's policy servers."""

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

from cluster.cli.arguments import Trust


def serve(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="FILE.yaml... key.sub=value...", help="As for `coso train`.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub name; default: model.path of the config.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any other than loopback is open to the network.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free port.")] = 8000,
    name: Annotated[str, typer.Option(help="Name of the model in requests.")] = "policy",
    images: Annotated[int, typer.Option(min=1, help="Largest number of pictures in a request.")] = 2,
    trust: Trust = None,
) -> None:
    """Serve a model at an OpenAI-compatible endpoint, for instance to judge phone tasks, until Ctrl-C.

    The config sections `model` and `policy_server` configure the engine. If VLLM_API_KEY is set in the environment,
    requests must carry that key.
    """
    from actors.serving import policy_engine
    from actors.serving.endpoint import openai_api
    from cluster.config.files import config_of_words
    from cluster.errors import CosoError
    from cluster.launch.ray_runtime import short_temporary_folder, temporary_prefix
    from cluster.telemetry.progress import spinner

    config = config_of_words([*(words or []), *([f"model.path={json.dumps(model)}"] if model else [])], trust)
    try:
        bound = openai_api.listening_socket(host, port)
    except OSError as error:
        raise CosoError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from None
    address = f"http://{host}:{bound.getsockname()[1]}/v1"
    temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix(os.getpid()), dir=short_temporary_folder()))
    # vLLM warns about settings that `policy_engine` chose on purpose; the user need not see them.
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    starting = ExitStack()

    def on_serving() -> None:
        starting.close()
        typer.echo(f"serving {name!r} at {address} (Ctrl-C stops it)")

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
