"""Config keys of earlier versions, so that an old config file gets an error that says what changed."""

from __future__ import annotations

#: Old dotted key (of a section or a value) -> its present name, or None if the setting no longer exists.
CHANGED_KEYS: dict[str, str | None] = {
    "cluster.start_deadline_s": None,
    "rollout.stall_deadline_s": "rollout.silence_deadline_s",
}
