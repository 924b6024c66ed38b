"""Draw the reference screen anew: python -m tools.reference_screen (after a change of fonts or of the page)."""

from __future__ import annotations

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from envs.android.reference_screen import REFERENCE, draw_reference


def main() -> None:
    screen, version = draw_reference()
    about = PngInfo()
    about.add_text("Software", version)
    Image.fromarray(screen).save(REFERENCE, pnginfo=about)
    print(f"{REFERENCE}: {version}")


if __name__ == "__main__":
    main()
