"""A picture's key depends on its pixels alone, and its PNG bytes give exactly these pixels to any reader."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from actors.images import RecentImages, decode_png, encode_png, image_hash


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def screen(height: int, width: int) -> np.ndarray:
    """Flat areas with an edge that no row shares with the next."""
    rows, columns = np.indices((height, width))
    return np.stack([rows > columns, columns > 7, rows % 3 == 0], axis=2).astype(np.uint8) * 200


@given(height=st.integers(1, 40), width=st.integers(1, 40), kind=st.sampled_from([noise, screen]), turned=st.booleans())
def test_png_bytes_give_the_same_pixels_back(height, width, kind, turned):
    image = kind(height, width)
    if turned:
        image = image.transpose(1, 0, 2)  # not contiguous
    png = encode_png(image)
    np.testing.assert_array_equal(np.asarray(decode_png(png)), image)
    assert png == encode_png(np.ascontiguousarray(image))
    with Image.open(io.BytesIO(png)) as opened:
        opened.verify()  # the checksums
        assert (opened.format, opened.mode) == ("PNG", "RGB")


def test_a_screen_is_compressed_and_noise_is_stored():
    assert len(encode_png(screen(300, 200))) < 300 * 200 * 3 / 20
    noisy = noise(300, 200)
    assert noisy.nbytes < len(encode_png(noisy)) < noisy.nbytes + 1000


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 5), np.uint8), np.zeros((4, 5, 4), np.uint8), np.zeros((4, 5, 3)), np.zeros((0, 5, 3), np.uint8)],
)
def test_another_array_is_refused(image):
    with pytest.raises(ValueError, match=r"uint8 array \(H, W, 3\), not"):
        encode_png(image)


def test_the_key_is_blake3_of_shape_and_pixels():
    """It must stay so: a resumed run stores an image again if its key is another."""
    assert image_hash(np.zeros((2, 3, 3), np.uint8)) == "bfce294ddcb3c93d0c31a76d62c14449"


def test_recent_images_forget_the_least_recently_used_and_keep_the_last():
    recent: RecentImages[str] = RecentImages(10)
    recent.put("a", "A", 4)
    recent.put("b", "B", 4)
    assert recent.get("a") == "A"
    recent.put("c", "C", 4)
    assert (recent.get("a"), recent.get("b"), recent.get("c")) == ("A", None, "C")
    recent.put("large", "L", 99)
    assert (recent.get("a"), recent.get("c"), recent.get("large")) == (None, None, "L")
