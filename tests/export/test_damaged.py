"""Damaged or hostile sources: refused with one line, and nothing is left behind."""

import io
import json
import math
import shutil
import sys

import gguf_files
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from layerskip import cli
from layerskip.cli.output import bars
from layerskip.export import open_source, to_gguf, to_hf
from layerskip.model import CheckpointError

EXPORTS = pytest.mark.parametrize("write", [to_hf, to_gguf])


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of the tiny checkpoint, with other fields in its config."""

    def copy(**fields):
        folder = tmp_path / "in"
        shutil.copytree(saved("llama2"), folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        return folder

    return copy


def with_tensor(folder, name, change):
    state = load_file(folder / "model.safetensors")
    state[name] = change(state.get(name))
    if state[name] is None:
        del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def refused(write, source, message, tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message) as error:
        write(open_source(source), tmp_path / "out.gguf")
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


@EXPORTS
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.1.mlp.down_proj.weight", lambda _: None),
        ("model.extra.weight", lambda _: torch.ones(3)),
    ],
)
def test_tensors_that_do_not_fit_are_named(name, change, write, copied, tmp_path):
    folder = copied()
    with_tensor(folder, name, change)
    refused(write, folder, name.removeprefix("model.layers.1."), tmp_path)


@EXPORTS
def test_non_finite_weights_are_named(write, copied, tmp_path):
    name, folder = "model.layers.2.self_attn.o_proj.weight", copied()

    def damage(tensor):
        tensor[3, 5] = math.inf
        return tensor

    with_tensor(folder, name, damage)
    refused(write, folder, f"{name} holds NaN or infinite values", tmp_path)


@EXPORTS
def test_weights_that_are_not_floating_point_are_named(write, copied, tmp_path):
    folder = copied()
    with_tensor(folder, "model.norm.weight", lambda tensor: tensor.to(torch.int64))
    refused(write, folder, "model.norm.weight is stored as", tmp_path)


@pytest.mark.parametrize(
    ("kind", "write"), [(gguf_files.KINDS[0], to_gguf), (gguf_files.KINDS[-1], to_hf)]
)
def test_non_finite_blocks_of_a_gguf_file_are_named(kind, write, tmp_path):
    model = tiny_models.build("llama2", hidden_size=128, intermediate_size=96)
    model.model.layers[1].mlp.up_proj.weight.data[0] = math.nan
    with np.errstate(all="ignore"):
        gguf_files.write(tmp_path / "m.gguf", model, kind=kind)
    refused(write, tmp_path / "m.gguf", "layers.1.mlp.up_proj.weight holds NaN", tmp_path)


@EXPORTS
@pytest.mark.parametrize("size", [-1, 128])
def test_a_vocabulary_of_another_size_is_refused(size, write, copied, tmp_path):
    refused(write, copied(vocab_size=size), r"embed_tokens|vocab_size", tmp_path)


@EXPORTS
def test_an_mlp_of_another_size_is_refused(write, copied, tmp_path):
    refused(write, copied(intermediate_size=128), "transformers expects", tmp_path)


@EXPORTS
def test_metadata_that_no_model_has_is_refused(write, tmp_path):
    model, fields = tiny_models.reference("llama2"), {"llama.context_length": 1}
    gguf_files.write(tmp_path / "m.gguf", model, extra_fields=fields)
    refused(write, tmp_path / "m.gguf", "the context length is 1", tmp_path)


def test_layers_that_the_configuration_does_not_name_are_refused(copied, tmp_path):
    layers = tiny_models.LAYERS
    folder = copied(num_hidden_layers=layers - 1)
    refused(to_hf, folder, f"has layer {layers - 1}, its .* {layers - 1} layers", tmp_path)


@EXPORTS
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "additional_chat_templates/tool_use.jinja",
    ],
)
def test_a_file_outside_the_folder_is_not_passed_on(name, write, copied, tmp_path):
    folder, secret = copied(), tmp_path / "secret"
    file = folder / name
    secret.write_text(file.read_text() if file.is_file() else "{}")
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    file.symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"is a link to .*, outside of its folder"):
        write(open_source(folder), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_link_to_itself_is_no_destination(copied, tmp_path, capsys):
    loop, command = tmp_path / "loop.gguf", ["export", "--model", str(copied()), "--to", "gguf"]
    loop.symlink_to(loop)
    assert cli.run([*command, str(loop)]) == 1
    assert "loop.gguf exists; choose another name" in capsys.readouterr().err
    assert cli.run([*command, str(tmp_path / "out.gguf"), "--output", str(loop)]) == 2
    assert "loop.gguf cannot be written: a link to itself" in capsys.readouterr().err


@pytest.mark.filterwarnings("always::UserWarning")
def test_a_setting_that_cannot_be_read_is_one_line(copied, tmp_path, capsys):
    folder = copied()
    (folder / "generation_config.json").write_text('{"layerskip": {"costs": [{}]}}')
    command = ["export", "--model", folder, "--to", "gguf", tmp_path / "out.gguf"]
    assert cli.run([str(word) for word in command]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("layerskip: costs in ")


def test_a_progress_bar_shows_control_characters_as_codes(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with bars() as report:
        report("writing o\x1b]0;owned\x07", 1, 2)
    assert "\x1b]0;" not in terminal.getvalue()
    assert "\\x1b]0;owned\\x07" in terminal.getvalue()
