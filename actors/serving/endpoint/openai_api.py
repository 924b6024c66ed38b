"""An OpenAI-compatible HTTP endpoint for an engine, for instance to judge phone tasks.

The endpoint is vLLM's own. The engine comes from `start_engine`, like the engines of a run's policy servers.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from actors.serving.endpoint.same_site import SameSiteOnly

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


def listening_socket(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free port. Raises OSError."""
    (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


async def serve(
    engine: AsyncLLM, model_path: str, name: str, bound: socket.socket, on_serving: Callable[[], None]
) -> None:
    """Serve until SIGINT or SIGTERM; calls `on_serving` once it accepts requests.

    Endpoint: `/v1/chat/completions`, and whatever else vLLM offers for the model. Requests name the model `name`. If
    `VLLM_API_KEY` is in the environment, they must carry that key. Web pages of other sites are refused.
    """
    import uvicorn
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(
        # vLLM by default lets the pages of every site read answers.
        ["--model", model_path, "--served-model-name", name, "--disable-fastapi-docs", "--allowed-origins", "[]"]
    )
    tasks = await engine.get_supported_tasks()
    app = build_app(arguments, tasks, engine.model_config)
    await init_app_state(engine, app.state, arguments, tasks)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            on_serving()

    beyond = not ipaddress.ip_address(bound.getsockname()[0]).is_loopback
    guarded = SameSiteOnly(app, names=None if beyond else frozenset())
    # A request that runs at the signal has five seconds left.
    server = Server(uvicorn.Config(guarded, log_level="warning", timeout_graceful_shutdown=5))
    await server.serve(sockets=[bound])
