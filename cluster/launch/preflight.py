"""What a run needs from elsewhere, checked before anything starts and by `--dry-run`."""

from __future__ import annotations

import sys

from cluster.config.run_config import RunConfig
from cluster.environments import require_environment
from envs.android.browser import missing_for_browser
from envs.android.device import DeviceError
from envs.android.reference_screen import other_screens


def preflight(config: RunConfig) -> None:
    """Raise `CosoError` for what is missing; print a line for what will work but not as elsewhere."""
    require_environment(config.environment.id)
    if warning := browser_warning(config):
        print(f"coso: {warning}", file=sys.stderr)


def browser_warning(config: RunConfig) -> str | None:
    """A line that names this machine's Chromium if the run's phones are drawn by it and differ from the reference.

    None also where there is no Chromium: environments may run elsewhere, and say what is missing.
    """
    kwargs = config.environment.kwargs
    if config.environment.id.rpartition(":")[2] != "coso/Android-v0" or kwargs.get("driver", "browser") != "browser":
        return None
    if missing_for_browser() is not None:
        return None
    try:
        return other_screens((kwargs.get("device") or {}).get("browser"))
    except DeviceError as error:
        return str(error)
