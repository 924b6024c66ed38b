"""A folder that takes another one's place: checked before the work, and nothing that was made is lost."""

from pathlib import Path

import pytest

from cluster.errors import CosoError
from cluster.replacing import replace_text, replaced_folder


def old(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "mark").write_text("old")
    return path


def write(folder: Path, overwrite: bool | None = True) -> None:
    with replaced_folder(folder, "thing", "mark", overwrite) as aside:
        (aside / "mark").write_text("new")


def test_a_folder_is_made_or_replaced_as_a_whole(tmp_path: Path) -> None:
    write(tmp_path / "a" / "new")
    write(old(tmp_path / "b"))
    write(old(tmp_path / "b" / "c"))
    assert (tmp_path / "a" / "new" / "mark").read_text() == (tmp_path / "b" / "c" / "mark").read_text() == "new"
    assert {path.name for path in tmp_path.rglob("*") if path.is_dir()} == {"a", "new", "b", "c"}


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    target, link = old(tmp_path / "disk" / "target"), tmp_path / "link"
    link.symlink_to(target)
    write(link)
    assert link.is_symlink() and (target / "mark").read_text() == "new"


def test_a_link_to_a_folder_that_is_not_there_yet_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "target")
    with pytest.raises(CosoError, match="--overwrite"):
        write(tmp_path / "link", overwrite=False)
    write(tmp_path / "link")
    assert (tmp_path / "disk" / "target" / "mark").read_text() == "new"


@pytest.mark.parametrize("kind", ["file", "other folder", "below a file", "existing"])
def test_a_destination_that_cannot_be_replaced_is_refused_before_the_work(tmp_path: Path, kind: str) -> None:
    folder, overwrite = tmp_path / "folder", kind != "existing"
    if kind == "other folder":
        folder.mkdir()
        (folder / "photos").touch()
    elif kind == "existing":
        old(folder)
    else:
        folder.touch()
        folder = folder / "below" if kind == "below a file" else folder
    with pytest.raises(CosoError, match="folder"), replaced_folder(folder, "thing", "mark", overwrite):
        raise AssertionError("the work began")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_work_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    folder = old(tmp_path / "folder")
    with pytest.raises(RuntimeError), replaced_folder(folder, "thing", "mark", True):
        raise RuntimeError
    assert (folder / "mark").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(RuntimeError), replaced_folder(tmp_path / "a" / "b" / "new", "thing", "mark", True):
        raise RuntimeError
    assert len(list(tmp_path.iterdir())) == 1


def test_what_was_made_is_kept_where_it_cannot_be_put_in_place(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(CosoError, match="kept in") as told, replaced_folder(folder, "thing", "mark", False) as aside:
        (aside / "mark").write_text("new")
        old(folder / "of somebody else")
        folder.rename(tmp_path / "folder.former")  # so that the rename meets a folder that is not empty
        folder.touch()
        (tmp_path / "folder.former" / "x").touch()
    assert str(aside) in str(told.value) and (aside / "mark").read_text() == "new"


def test_what_was_there_comes_back_where_the_new_one_cannot_be_put(tmp_path: Path) -> None:
    folder = old(tmp_path / "folder")
    with pytest.raises(CosoError, match="kept in"), replaced_folder(folder, "thing", "mark", True) as aside:
        aside.rename(tmp_path / "somewhere else")
    assert (folder / "mark").read_text() == "old"


def test_a_mounted_disk_is_refused_before_the_work() -> None:
    with pytest.raises(CosoError, match="mounted"), replaced_folder(Path("/proc"), "thing", "self", True):
        raise AssertionError("the work began")


def test_a_text_is_not_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("report.html", "report.tmp"):
        (tmp_path / name).symlink_to(victim)
    replace_text(tmp_path / "report.html", "\ud83d", errors="replace")
    assert victim.read_text() == "mine" and (tmp_path / "report.html").read_text() == "?"
    assert {path.name for path in tmp_path.iterdir()} == {"victim", "report.html"}
