"""Processed images: each once, in bounded room, and the same tensors wherever they are kept."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.chat import ChatProcessor
from actors.images import PngEncoder, decode_png
from learner.policy import image_tensors
from learner.policy.image_tensors import ImageTensors, nbytes
from tests.tiny_models import make_qwen2_5_vl, picture


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatProcessor:
    return make_qwen2_5_vl(tmp_path_factory.mktemp("qwen")).chat


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    """Pictures whose tensors take 74 kB each."""
    return dict(PngEncoder().encode(picture(number, 280, 350)) for number in range(6))


@pytest.fixture(autouse=True)
def these_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_tensors, "LARGE_BYTES", 70_000)


def assert_equal(chat: ChatProcessor, got: dict, png: bytes) -> None:
    expected = chat.encode_image(decode_png(png))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


def test_large_images_are_kept_in_files_without_names_and_come_back_as_they_were(
    chat: ChatProcessor, images: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tensors = ImageTensors(chat, file_bytes=1 << 30)
    for _ in range(2):
        for key, png in images.items():
            assert_equal(chat, tensors.of(key, png), png)
    assert tensors.encoded == len(images)
    assert list(tmp_path.iterdir()) == []
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(mapped) == len(images)


def test_room_in_files_is_bounded_and_given_back(chat: ChatProcessor, images: dict[str, bytes], tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    one = nbytes(chat.encode_image(decode_png(next(iter(images.values())))))
    tensors = ImageTensors(chat, file_bytes=3 * one)
    for key, png in [*images.items(), *images.items()]:
        assert_equal(chat, tensors.of(key, png), png)
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
        assert len(mapped) <= 3


def test_ahead_of_use_half_of_the_room_is_filled(chat: ChatProcessor, images: dict[str, bytes]) -> None:
    one = nbytes(chat.encode_image(decode_png(next(iter(images.values())))))
    tensors = ImageTensors(chat, file_bytes=4 * one)
    tensors.prepare(images)
    assert tensors.encoded == 3  # the third one found half of the room taken
    tensors.of(*next(iter(images.items())))
    assert tensors.encoded == 3


def test_two_threads_process_each_image_once(chat: ChatProcessor, images: dict[str, bytes]) -> None:
    tensors = ImageTensors(chat, file_bytes=1 << 30)
    ahead = threading.Thread(target=tensors.prepare, args=(images,))
    ahead.start()
    for key, png in reversed(images.items()):
        assert_equal(chat, tensors.of(key, png), png)
    ahead.join()
    assert tensors.encoded == len(images)


@pytest.mark.parametrize("ahead", [True, False])
def test_threads_process_images_at_the_same_time_and_each_once(
    chat: ChatProcessor, images: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    three_at_once, encode = threading.Barrier(3), ChatProcessor.encode_image

    def encoded(self: ChatProcessor, image: Any) -> Any:
        three_at_once.wait(timeout=60)
        return encode(self, image)

    tensors = ImageTensors(chat, file_bytes=1 << 30, threads=3)
    with monkeypatch.context() as patch:
        patch.setattr(ChatProcessor, "encode_image", encoded)
        if ahead:
            tensors.prepare(images)
        found = tensors.of_all(images)
    assert tensors.encoded == len(images) == len(found)
    for key, png in images.items():
        assert_equal(chat, found[key], png)


def test_an_image_that_the_processor_refuses_fails_for_all_that_wait_and_is_tried_again(
    chat: ChatProcessor, images: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> Any:
        raise ValueError("no such picture")

    tensors, (key, png) = ImageTensors(chat, file_bytes=1 << 30, threads=2), next(iter(images.items()))
    with monkeypatch.context() as patch:
        patch.setattr(ChatProcessor, "encode_image", refused)
        for _ in range(2):
            with pytest.raises(ValueError, match="no such picture"):
                tensors.of_all({key: png})
    assert_equal(chat, tensors.of(key, png), png)


def test_a_full_disk_is_named(chat: ChatProcessor, images: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for \d+ bytes of a processed image.*learner.image_cache_bytes"):
        ImageTensors(chat, file_bytes=1 << 30).of(*next(iter(images.items())))


def test_small_images_need_no_file(chat: ChatProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    key, png = PngEncoder().encode(picture(0, 20, 20))
    tensors = ImageTensors(chat, file_bytes=0)
    assert tensors.of(key, png) is tensors.of(key, png)
    assert_equal(chat, tensors.of(key, png), png)
