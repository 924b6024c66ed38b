"""The families that are checked, by the `model_type` of their config."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tools.families import gemma, idefics, llava, others, qwen
from tools.families.parts import SMALL, TinyVlm

FAMILIES: dict[str, Callable[[Path], TinyVlm]] = {
    "idefics3": partial(idefics.make_idefics3, options=SMALL),
    "smolvlm": idefics.make_smolvlm,
    "idefics2": idefics.make_idefics2,
    "qwen2_vl": qwen.make_qwen2_vl,
    "qwen2_5_vl": qwen.make_qwen2_5_vl,
    "qwen3_vl": qwen.make_qwen3_vl,
    "llava": llava.make_llava,
    "llava_next": llava.make_llava_next,
    "llava_onevision": llava.make_llava_onevision,
    "internvl": llava.make_internvl,
    "gemma3": gemma.make_gemma3,
    "paligemma": gemma.make_paligemma,
    "aria": others.make_aria,
    "paddleocr_vl": others.make_paddleocr_vl,
    "ernie4_5_vl_moe": others.make_ernie4_5_vl_moe,
    "blip-2": others.make_blip2,
}
