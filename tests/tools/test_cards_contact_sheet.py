"""The pictures of the documentation can be drawn anew, and those in the repository are what the code draws."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import cards_contact_sheet

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def test_the_pictures_in_the_documentation_are_of_this_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["cards_contact_sheet", str(tmp_path)])
    cards_contact_sheet.main()
    for name in ("cards.png", "games.png"):
        drawn, kept = (np.asarray(Image.open(folder / name).convert("RGB"), np.int16) for folder in (tmp_path, IMAGES))
        assert drawn.shape == kept.shape
        # Not to the last bit: scaling and palette may differ by a shade between versions of Pillow.
        assert (np.abs(drawn - kept).max(axis=-1) > 48).mean() < 0.01, f"draw {name} anew"
