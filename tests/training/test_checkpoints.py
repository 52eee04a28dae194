import os
import shutil

import pytest

from layerskip.training.checkpointing import last_checkpoint, move_when_whole

FILES = ("model.safetensors", "optimizer.pt", "trainer_state.json")


def write(folder):
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text(name)
    return folder


def test_the_same_step_again_is_replaced(tmp_path):
    final = write(tmp_path / "checkpoint-4")
    unfinished = write(tmp_path / ".incomplete" / "checkpoint-4")
    (unfinished / FILES[0]).write_text("new")
    move_when_whole(unfinished, final)
    assert (final / FILES[0]).read_text() == "new"
    assert last_checkpoint(tmp_path) == str(final)
    assert list((tmp_path / ".incomplete").iterdir()) == []


def test_a_run_that_is_killed_while_it_replaces_one_leaves_whole_ones(tmp_path, monkeypatch):
    unlink = os.unlink

    def killed(*what, **where):
        unlink(*what, **where)
        raise KeyboardInterrupt

    write(tmp_path / "checkpoint-4")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            move_when_whole(
                write(tmp_path / ".incomplete" / "checkpoint-4"), tmp_path / "checkpoint-4"
            )
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    for found in tmp_path.glob("checkpoint-*"):
        assert sorted(path.name for path in found.iterdir()) == sorted(FILES)
    shutil.rmtree(tmp_path / ".incomplete")
