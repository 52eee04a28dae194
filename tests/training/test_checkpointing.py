"""The output folder: lock, settings of a resumed run, checksums and hostile checkpoints."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from layerskip.errors import TrainingWarning
from layerskip.fileio import sha256_of
from layerskip.training import TrainConfig, train
from layerskip.training.callbacks import read_log
from layerskip.training.checkpointing import (
    check_checkpoint,
    find_resume_checkpoint,
    finish_checkpoint,
    last_checkpoint,
    lock_output_dir,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="session")
def trained(model_folder, data_file, tmp_path_factory):
    """Settings, and the folder of a run of two steps."""
    settings = {"model": model_folder, "data": data_file, "regime": "task", "batch_size": 2}
    settings |= {"max_steps": 2, "save_steps": 2, "device": "cpu", "fixed_exits": [2]}
    output = tmp_path_factory.mktemp("run") / "out"
    train(TrainConfig.from_mapping({**settings, "output": str(output)}))
    return settings, output


@pytest.fixture
def checkpoint(trained, tmp_path):
    return Path(shutil.copytree(trained[1] / "checkpoint-2", tmp_path / "checkpoint-2"))


def files_of(folder):
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "trainer_state.json"):
        (folder / name).write_text(name)
    return folder


def test_the_same_step_again_is_replaced(tmp_path):
    final = files_of(tmp_path / "checkpoint-4")
    unfinished = files_of(tmp_path / ".incomplete" / "checkpoint-4")
    (unfinished / "model.safetensors").write_text("new")
    finish_checkpoint(unfinished, final)
    assert (final / "model.safetensors").read_text() == "new"
    assert last_checkpoint(tmp_path) == str(final)
    assert list((tmp_path / ".incomplete").iterdir()) == []


def test_a_run_that_is_killed_while_it_replaces_a_checkpoint_leaves_whole_ones(
    tmp_path, monkeypatch
):
    unlink = os.unlink

    def killed(*what, **where):
        unlink(*what, **where)
        raise KeyboardInterrupt

    files_of(tmp_path / "checkpoint-4")
    unfinished = files_of(tmp_path / ".incomplete" / "checkpoint-4")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            finish_checkpoint(unfinished, tmp_path / "checkpoint-4")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    [left] = tmp_path.glob("checkpoint-*")
    assert {"model.safetensors", "trainer_state.json"} <= {path.name for path in left.iterdir()}


def test_a_checkpoint_that_was_changed_is_refused(checkpoint):
    check_checkpoint(checkpoint)
    advice = r"; remove .*checkpoint-2, and --resume goes on from the one before$"
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth", "chat_template.jinja"):
        content = (checkpoint / name).read_bytes()
        flipped = bytearray(content)
        flipped[-1] ^= 1
        (checkpoint / name).write_bytes(flipped)
        with pytest.raises(ValueError, match=f"{name} is damaged .*{advice}"):
            check_checkpoint(checkpoint)
        (checkpoint / name).unlink()
        with pytest.raises(ValueError, match=f"{name} is missing{advice}"):
            check_checkpoint(checkpoint)
        (checkpoint / name).write_bytes(content)
    for name in ("trainer_state.json", "checksums.json"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[:10])
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            check_checkpoint(checkpoint)
        (checkpoint / name).write_bytes(content)
    check_checkpoint(checkpoint)


class Hostile:
    def __reduce__(self):
        return (os.system, ("touch hostile",))


@pytest.mark.parametrize(
    ("name", "dump"),
    [
        ("optimizer.pt", torch.save),
        ("rng_state.pth", lambda value, path: path.write_bytes(pickle.dumps(value))),
    ],
)
def test_a_hostile_pickle_is_refused_in_our_words(checkpoint, monkeypatch, tmp_path, name, dump):
    monkeypatch.chdir(tmp_path)
    dump(Hostile(), checkpoint / name)
    sums = json.loads((checkpoint / "checksums.json").read_text())
    sums[name] = sha256_of([checkpoint / name])
    (checkpoint / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(ValueError, match=f"{name} is refused: it has more than tensors") as error:
        check_checkpoint(checkpoint)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)
    assert not Path("hostile").exists()


def test_pickled_weights_and_links_are_refused(checkpoint, tmp_path):
    (checkpoint / "pytorch_model.bin").write_bytes(b"not opened")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is refused: a pickle may run code"):
        check_checkpoint(checkpoint)
    (checkpoint / "pytorch_model.bin").unlink()
    (checkpoint / "chat_template.jinja").rename(tmp_path / "secret")
    (checkpoint / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is a link to .*secret, outside of"):
        check_checkpoint(checkpoint)


def resume(trained, **changes):
    settings, output = trained
    values = {**settings, "output": str(output), "resume": True, **changes}
    return find_resume_checkpoint(TrainConfig.from_mapping(values), output)


def test_a_run_goes_on_with_the_settings_that_it_was_begun_with(trained):
    expected = str(trained[1] / "checkpoint-2")
    assert resume(trained) == expected
    assert resume(trained, max_steps=9, learning_rate=1e-5, save_steps=1, batch_size=1,
                  accumulation=2) == expected  # fmt: skip
    for changes, flag in (
        ({"exits": [1, 3]}, r"--exits \(none\)"),
        ({"fixed_exits": [3]}, "--fixed-exits 2"),
        ({"precision": "bfloat16"}, "--precision float32"),
        ({"lora_rank": 3}, r"--lora-rank \(none\), --lora-alpha \(none\)"),
        ({"p_max": 0.5}, "--p-max 0.2"),
    ):
        with pytest.raises(ValueError, match=f"^this run was begun with {flag}: --resume goes on"):
            resume(trained, **changes)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"seed": 3}, "seed"),
        ({"eval_rows": 4}, "eval_rows"),
        ({"model": "other/model"}, "model"),
        ({"batch_size": 1, "max_length": 9}, "max_length, rows of a step"),
    ],
)
def test_other_rows_on_resume_are_reported(trained, changes, names):
    with pytest.warns(TrainingWarning, match=f"^other than before the interruption: {names}; so"):
        resume(trained, **changes)


def test_earlier_runs_and_other_models_are_not_replaced(trained, tmp_path):
    with pytest.raises(ValueError, match="has checkpoints of an earlier run"):
        resume(trained, resume=False)
    settings = trained[0] | {"output": str(tmp_path)}
    config = TrainConfig.from_mapping(settings | {"resume": True})
    with pytest.warns(TrainingWarning, match="there is no checkpoint in .*: beginning anew"):
        assert find_resume_checkpoint(config, tmp_path) is None
    for name in ("config.json", "pytorch_model.bin", "tokenizer.json", "x.gguf"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match="has a checkpoint, which training would replace"):
            find_resume_checkpoint(config, tmp_path)
        (tmp_path / name).unlink()
    for name in ("train.json", "train_log.jsonl"):
        for field in ("data", "eval_data"):
            config = TrainConfig.from_mapping({**settings, field: str(tmp_path / name)})
            (tmp_path / name).touch()
            with pytest.raises(ValueError, match=f"training replaces .*{name}"):
                find_resume_checkpoint(config, tmp_path)


def test_a_folder_is_for_one_run_at_a_time(tmp_path):
    output = tmp_path / "out"
    with lock_output_dir(output):
        assert (output / ".lock").exists()
    assert not output.exists()  # nothing came of it
    output.mkdir()
    with (
        FileLock(output / ".lock"),
        pytest.raises(ValueError, match="another run is writing into"),
        lock_output_dir(output),
    ):
        pass
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ValueError, match="cannot be written to: choose"), lock_output_dir(path):
            pass


def test_a_link_out_of_the_output_folder_is_not_written_through(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (tmp_path / "profile").write_text("mine")
    (output / "train_log.jsonl").symlink_to(tmp_path / "profile")
    with pytest.raises(ValueError, match=r"is a link to .*profile"), lock_output_dir(output):
        pass


def test_a_log_line_that_a_crash_cut_off_is_left_out(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_log(file) == [{"step": 1}]


def test_those_who_may_read_the_config_may_read_the_weights(trained, tmp_path):
    weights = {"a": torch.ones(2)}
    save_file(weights, tmp_path / "other.safetensors")
    assert load_file(tmp_path / "other.safetensors")["a"].sum() == 2
    _, output = trained
    for folder in (output, output / "checkpoint-2"):
        modes = {(folder / name).stat().st_mode for name in ("model.safetensors", "config.json")}
        assert len(modes) == 1
