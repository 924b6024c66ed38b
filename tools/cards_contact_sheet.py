"""Make pictures for the documentation: every card, and every game at full size and at a small model's input size.

python -m tools.cards_contact_sheet docs/images
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gymnasium
from PIL import Image, ImageDraw

import envs
from envs.cards.art import FELT, card_back, card_picture
from envs.cards.deck import RANKS, SUITS
from envs.drawing import bold_font

_GAP = 6
_SCENES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("NumberLine", {"current": 1, "target": 4}),
    ("Blackjack", {"player": ["H6", "CT"], "dealer": ["DQ"]}),
    ("Blackjack", {"player": ["H2", "C3", "DA", "S5", "S4", "H6"], "dealer": ["S9"]}),
    ("EZPoints", {"cards": ["C8", "H4"], "formula": ["4", "+"]}),
    ("Points24", {"cards": ["S7", "DK", "HA", "CT"], "formula": ["(", "7", "-", "1", ")", "*", "", "10"]}),
)


def card_sheet(width: int = 67) -> Image.Image:
    """All 52 cards face up, one suit per row, and a card's back."""
    back = card_back(width)
    column, row = width + _GAP, len(back) + _GAP
    sheet = Image.new("RGB", ((len(RANKS) + 1) * column + _GAP, len(SUITS) * row + _GAP), FELT)
    for y, suit in enumerate(SUITS):
        for x, rank in enumerate(RANKS):
            picture = Image.fromarray(card_picture(suit + rank, width))
            sheet.paste(picture, (_GAP + x * column, _GAP + y * row))
    sheet.paste(Image.fromarray(back), (_GAP + len(RANKS) * column, _GAP))
    return sheet


def game_sheet(sizes: tuple[int, ...] = (300, 96, 64), side: int = 300) -> Image.Image:
    """One column per game, one row per size (pixels) to which its scene is scaled; shown `side` pixels large."""
    sheet = Image.new("RGB", (len(_SCENES) * (side + _GAP) + _GAP, len(sizes) * (side + 30) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (game, state) in enumerate(_SCENES):
        observation, _ = gymnasium.make(f"{envs.NAMESPACE}/{game}-v0").reset(seed=0, options={"state": state})
        picture = Image.fromarray(observation["image"])
        for row, size in enumerate(sizes):
            left, top = _GAP + column * (side + _GAP), 30 + row * (side + 30)
            draw.text((left, top - 26), f"{game}, {size} × {size}", font=bold_font(18), fill="black")
            small = picture.resize((size, size), Image.Resampling.LANCZOS)
            sheet.paste(small.resize((side, side), Image.Resampling.NEAREST), (left, top))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for cards.png and games.png")
    folder = parser.parse_args().folder
    for name, sheet in (("cards.png", card_sheet()), ("games.png", game_sheet())):
        sheet.quantize(128).save(folder / name, optimize=True)
        print(folder / name)


if __name__ == "__main__":
    main()
