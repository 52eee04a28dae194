"""`layerskip export` end to end on the tiny checkpoint."""

import functools
import json
import shutil

import pytest
from tiny_tokenizers import checkpoint, metaspace

import tiny_models
from layerskip.decoding import LayerSkipModel


@pytest.fixture(scope="module")
def source(folder, tmp_path_factory):
    """The tiny checkpoint with a merge in its tokenizer: llama.cpp knows none without."""
    path = tmp_path_factory.mktemp("source") / "tiny"
    shutil.copytree(folder, path)
    described = json.loads((path / "tokenizer.json").read_text())
    vocab = described["model"]["vocab"]
    vocab["ĠĠ"] = len(vocab)
    described["model"]["merges"] = [["Ġ", "Ġ"]]
    (path / "tokenizer.json").write_text(json.dumps(described))
    tiny_models.build("llama2", vocab_size=len(vocab)).save_pretrained(path)
    return path


@pytest.fixture
def export(source, program):
    return functools.partial(program, "export", "--model", source)


@pytest.mark.parametrize(
    ("arguments", "name", "layers"),
    [
        (["--to", "hf"], "out", 4),
        (["--to", "hf-draft", "--exit-layer", "3"], "out", 3),
        (["--to", "gguf", "--weights", "f32", "--exit-layer", "3"], "out.gguf", 3),
    ],
)
def test_what_is_written_answers_as_its_source(export, source, tmp_path, arguments, name, layers):
    status, out, err = export(*arguments, tmp_path / name, "--json")
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert result["path"] == str(tmp_path / name)
    assert result["layers"] == layers
    assert result["exit_layer"] == (3 if layers == 3 else None)
    assert result["stored_as"] == {"F32": 3 + 9 * layers}
    whole = LayerSkipModel.from_pretrained(source, dtype="float32")
    made = LayerSkipModel.from_pretrained(tmp_path / name, dtype="float32")
    expected = whole.generate("Hello", mode="early-exit", exit_layer=layers, max_new_tokens=12)
    assert made.generate("Hello", mode="plain", max_new_tokens=12).text == expected.text


def test_it_says_what_it_wrote(export, tmp_path):
    status, out, err = export("--to", "gguf", "--weights", "q8_0", tmp_path / "out.gguf")
    assert (status, err) == (0, "")
    assert "4 layers" in out
    assert "30 Q8_0, 9 F32" in out
    again = export("--to", "gguf", tmp_path / "out.gguf", "--output", tmp_path / "result.json")
    assert again[0] == 1
    assert "exists; choose another name or say --overwrite" in again[2]
    arguments = ["--overwrite", "--output", tmp_path / "result.json"]
    assert export("--to", "gguf", tmp_path / "out.gguf", *arguments)[0] == 0
    assert json.loads((tmp_path / "result.json").read_text())["format"] == "gguf"


@pytest.mark.filterwarnings("always:GGUF cannot say")
def test_what_gguf_cannot_say_of_a_tokenizer_is_one_line(program, tmp_path):
    checkpoint(tmp_path / "model", metaspace("first"), unk_token="<unk>")
    flags = ("--model", tmp_path / "model", "--to", "gguf")
    status, _, err = program("export", *flags, tmp_path / "m.gguf")
    said = [line for line in err.splitlines() if line.startswith("layerskip: ")]
    assert (status, len(said)) == (0, 1)
    assert "GGUF cannot say when this tokenizer puts a space" in said[0]


def test_usage_errors(export, tmp_path, monkeypatch):
    for arguments, message in (
        (["--to", "difference", "x.safetensors"], "'difference' is not one of"),
        (["--to", "hf", "--exit-layer", "2", "out"], "--exit-layer goes with hf-draft or gguf"),
        (["--to", "hf-draft", "out"], "names no exit layer; give --exit-layer"),
        (["--to", "hf", "--weights", "q8_0", "out"], "--weights of hf is one of: f32, f16, bf16"),
        (["--to", "gguf", "out"], "has to end in .gguf"),
        (["out"], "Missing option '--to'"),
    ):
        monkeypatch.chdir(tmp_path)
        status, out, err = export(*arguments)
        assert (status, out) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_said_before_the_work(export, tmp_path):
    status, out, err = export("--to", "hf", tmp_path / "missing" / "out")
    assert (status, out) == (1, "")
    assert "make it first" in err


def test_an_exit_layer_that_is_not_there_is_one_line(export, tmp_path):
    status, _, err = export("--to", "hf-draft", "--exit-layer", "9", tmp_path / "out")
    assert status == 1
    assert err == "layerskip: the exit layer is 9, this model has exits 1 to 4\n"


def test_the_result_is_not_written_over_what_was_exported(export, tmp_path):
    made = tmp_path / "made.gguf"
    status, _, err = export("--to", "gguf", made, "--output", made)
    assert (status, "PATH and --output are both" in err) == (2, True)
    assert not made.exists()
