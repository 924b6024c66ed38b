"""Tiny random vision-language models for the tests; `tools/families/` makes them."""

from tools.families.catalogue import FAMILIES as ALL_FAMILIES
from tools.families.gemma import make_gemma3
from tools.families.idefics import make_idefics3
from tools.families.llava import make_llava_next
from tools.families.parts import PROMPT, SMALL, TEXTS, TINY, TinyVlm, picture
from tools.families.qwen import make_qwen2_5_vl

__all__ = [
    "ALL_FAMILIES",
    "FAMILIES",
    "PROMPT",
    "SMALL",
    "TEXTS",
    "TINY",
    "TinyVlm",
    "make_idefics3",
    "make_llava_next",
    "make_qwen2_5_vl",
    "picture",
]

#: The families that differ most in their tensors; the tests of single parts take these.
FAMILIES = {
    "idefics3": make_idefics3,
    "qwen2_5_vl": make_qwen2_5_vl,
    "llava_next": make_llava_next,
    "gemma3": make_gemma3,
}
