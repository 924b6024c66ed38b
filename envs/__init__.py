"""Environments: the observation is a picture and a prompt, the action is an utterance.

Importing this package registers them with gymnasium under `coso/...`.
"""

import gymnasium

NAMESPACE = "coso"
_ENTRY_POINTS = {
    "coso/ALFWorld-v0": "envs.alfworld.environment:ALFWorld",
    "coso/Android-v0": "envs.android.environment:AndroidEnv",
    "coso/NumberLine-v0": "envs.cards.number_line:NumberLine",
    "coso/Blackjack-v0": "envs.cards.blackjack:Blackjack",
    "coso/EZPoints-v0": "envs.cards.points:EZPoints",
    "coso/Points24-v0": "envs.cards.points:Points24",
    "coso/SlowNumberLine-v0": "envs.adapters.latency:slow_number_line",
}

for _env_id, _entry_point in _ENTRY_POINTS.items():
    if _env_id not in gymnasium.registry:
        gymnasium.register(_env_id, entry_point=_entry_point)
