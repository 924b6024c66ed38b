"""Weights & Biases, where a config asks for it: what it needs, and the run's own run there."""

from __future__ import annotations

import netrc
import os
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.config.run_config import RunConfig
from cluster.errors import CosoError

#: Holds the id of the W&B run, so that a resumed run continues it.
WANDB_ID_FILE = "wandb_id"
#: Where `wandb login` may have kept a key, besides the server's own name.
_HOSTS = ("api.wandb.ai",)


def require_wandb(config: RunConfig) -> None:
    """Raise `CosoError` if the config asks for W&B and the package or a key is missing. Nothing is sent."""
    if not config.logging.wandb_project:
        return
    settings = _wandb().setup().settings
    if settings.mode in ("offline", "disabled", "dryrun"):
        return
    if settings.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _kept_key(settings.base_url):
        return
    raise CosoError(
        f"logging.wandb_project is {config.logging.wandb_project!r}, but there is no key for {settings.base_url}: run "
        "`wandb login`, set WANDB_API_KEY (or WANDB_MODE=offline), or leave the project null"
    )


def start_wandb(folder: Path, config: RunConfig) -> Any:
    """Start or continue the W&B run of a run folder. Raises `CosoError` if W&B refuses or does not answer."""
    wandb = _wandb()
    id_file = folder / WANDB_ID_FILE
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    try:
        return wandb.init(
            project=config.logging.wandb_project,
            id=id_file.read_text(encoding="utf-8"),
            name=config.name,
            dir=str(folder),
            resume="allow",
            config=config.model_dump(mode="json"),
        )
    except wandb.Error as error:  # the base class of usage, authentication and communication errors
        raise CosoError(f"Weights & Biases did not start: {' '.join(str(error).split())}") from error


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise CosoError(
            f"logging.wandb_project needs wandb, which cannot be imported ({error}): pip install wandb"
        ) from None
    return wandb


def _kept_key(base_url: str) -> bool:
    """Whether netrc, where `wandb login` keeps keys, has one for the server."""
    try:
        kept = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc")
    except (OSError, netrc.NetrcParseError):
        return False
    return any(kept.authenticators(host) for host in (urlsplit(base_url).netloc, *_HOSTS) if host)
