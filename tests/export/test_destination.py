"""Exports appear whole or not at all, and nothing of the user's is lost."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from layerskip.export import ExportError, open_source, to_gguf, to_hf
from layerskip.export import source as destination


@pytest.fixture(params=["hf", "gguf"])
def export(request, saved, tmp_path):
    """Export a tiny model under tmp_path: (the function, the place)."""
    write, name = {"hf": (to_hf, "out"), "gguf": (to_gguf, "out.gguf")}[request.param]
    place = tmp_path / name
    return lambda **options: write(open_source(saved("llama2")), place, **options), place


def test_what_is_there_is_kept_unless_told(export, tmp_path):
    write, place = export
    write()
    before = place.stat().st_mtime_ns
    with pytest.raises(ExportError, match="exists; choose another name or say --overwrite"):
        write()
    assert place.stat().st_mtime_ns == before
    assert write(overwrite=True).path == place
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


def test_an_interruption_leaves_what_was_there(export, tmp_path):
    write, place = export

    def interrupt(done, total):
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    write()
    files = place.rglob("*") if place.is_dir() else [place]
    before = {file: file.read_bytes() for file in files}
    with pytest.raises(KeyboardInterrupt):
        write(progress=interrupt, overwrite=True)
    assert {file: file.read_bytes() for file in before} == before
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


def test_a_full_disk_is_said_in_one_line(export, tmp_path):
    write, place = export

    def fill(done, total):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ExportError, match=f"{place.name} could not be written: .*No space left"):
        write(progress=fill)
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_said_before_anything_is_written(export, monkeypatch, tmp_path):
    write, _ = export
    little = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(destination.shutil, "disk_usage", lambda folder: little)
    with pytest.raises(ExportError, match=r"needs 0\.\d\d GB and .* has 0\.00 GB free"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(saved, tmp_path):
    with pytest.raises(ExportError, match="nowhere does not exist; make it first"):
        to_gguf(open_source(saved("llama2")), tmp_path / "nowhere" / "m.gguf")


@pytest.mark.parametrize("inside", ["notes.txt", "checkpoint-100/x", "config.json/x", "train.py"])
def test_a_folder_with_other_things_in_it_is_never_replaced(inside, saved, tmp_path):
    (tmp_path / "out" / inside).parent.mkdir(parents=True)
    (tmp_path / "out" / inside).touch()
    if inside == "train.py":
        (tmp_path / "out" / "config.json").touch()
    with pytest.raises(ExportError, match="not just a checkpoint and is not replaced"):
        to_hf(open_source(saved("llama2")), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / inside).exists()


def test_a_folder_that_cannot_be_renamed_is_refused_before_the_work(saved, tmp_path, monkeypatch):
    source = open_source(saved("llama2"))
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(ExportError, match="name a new folder in it"):
        to_hf(source, Path("."))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out")
    with pytest.raises(ExportError, match="name a new folder in it"):
        to_hf(source, Path("out"))


def test_an_empty_folder_is_filled(saved, tmp_path, monkeypatch):
    rename = Path.rename

    def as_on_windows(self, target):
        if Path(target).exists():
            raise FileExistsError(errno.EEXIST, "it is there", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", as_on_windows)
    (tmp_path / "out").mkdir()
    to_hf(open_source(saved("llama2")), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_folder_in_the_place_of_a_file_is_refused(saved, tmp_path):
    (tmp_path / "out.gguf").mkdir()
    with pytest.raises(ExportError, match="is a folder"):
        to_gguf(open_source(saved("llama2")), tmp_path / "out.gguf", overwrite=True)


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(saved, tmp_path, monkeypatch):
    out = tmp_path / "llama-3.2"
    to_hf(open_source(saved("llama2")), out)
    before, rename = (out / "config.json").stat().st_mtime_ns, Path.rename

    def fails_in_place_of_the_old(self, target):
        if Path(target) == out and not self.name.endswith(".old"):
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_in_place_of_the_old)
    with pytest.raises(ExportError, match="could not be written"):
        to_hf(open_source(saved("llama2")), out, overwrite=True)
    assert (out / "config.json").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
