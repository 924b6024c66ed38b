"""The embedded phone's page: one HTML text with style, scripts and data, without access to the network."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

from envs.android.phone.content import page_data

_SCRIPTS = ("core.js", "apps.js", "shops.js")
#: The page may fetch nothing: no scripts, images or connections of any origin.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@cache
def phone_html() -> str:
    """The whole page. It defines `phone.load(state)`, `phone.key(name)` and `phone.inspect()`."""
    folder = resources.files("envs.android.phone")
    style = (folder / "style.css").read_text("utf-8")
    # "</" would end the surrounding script element.
    data = json.dumps(page_data()).replace("</", "<\\/")
    scripts = "\n".join((folder / name).read_text("utf-8") for name in _SCRIPTS)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Phone</title><style>{style}</style></head><body></body>"
        f"<script>const DATA = {data};\n{scripts}</script></html>"
    )
