"""Replacing files and folders in one step: a crash leaves the old one or the new one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.errors import CosoError


def replace_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a file aside and put it in the place of `path`. Raises `OSError`.

    Nothing is written through a link: the folder may be a run folder of somebody else, with a link to a file of ours.
    """
    aside = path.with_suffix(".tmp")
    aside.unlink(missing_ok=True)
    handle = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY, 0o666)
    with os.fdopen(handle, "w", encoding="utf-8", errors=errors) as file:
        file.write(text)
    aside.rename(path)


@contextmanager
def replaced_folder(folder: Path, what: str, mark: str, overwrite: bool | None) -> Iterator[Path]:
    """Yields an empty folder to write to; at the end of the block it takes the place of `folder`.

    A link stays a link: the folder that it leads to is replaced. If the block raises, `folder` is as it was. If the new
    folder cannot be put in place, it is kept, and the error says where.

    what: for messages; mark: a file that folders of this kind have: others are not replaced; overwrite: None where the
    command has no such option. Raises `CosoError`, before the block where the destination cannot be written.
    """
    place = folder.absolute().resolve()
    if place.exists() or folder.is_symlink():
        if not overwrite:
            way = (
                "choose another, or remove it first" if overwrite is None else "keep it, or replace it with --overwrite"
            )
            raise CosoError(f"{what} {folder} exists; {way}")
        if place.exists() and not (place / mark).exists() and not _is_empty(place):
            raise CosoError(f"{folder} is not a {what} (it has no {mark}), so --overwrite does not replace it")
        if place.is_mount():
            raise CosoError(f"{folder} is where a disk is mounted, which cannot be replaced; name a folder below it")
    aside, former = (place.with_name(f"{place.name}.{end}") for end in ("partial", "former"))
    made = [parent for parent in aside.parents if not parent.exists()]
    try:
        for left in (aside, former):
            if left.exists():
                shutil.rmtree(left)
        aside.mkdir(parents=True)
    except OSError as error:
        raise CosoError(f"{what} {folder} cannot be written: {error}") from None
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise
    try:
        if place.exists():
            place.rename(former)
        aside.rename(place)
    except OSError as error:
        if former.exists() and not place.exists():
            former.rename(place)
        raise CosoError(f"{what} {folder} cannot be replaced ({error}); the new one is kept in {aside}") from None
    shutil.rmtree(former, ignore_errors=True)


def _is_empty(place: Path) -> bool:
    return place.is_dir() and not any(place.iterdir())
