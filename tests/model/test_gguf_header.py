"""Our reading of a GGUF file's head against GGML's own reader."""

import gguf
import numpy as np
import pytest

from layerskip.fileio import CheckpointError
from layerskip.model.weights import GgufFile, GgufHeader


@pytest.fixture
def file(tmp_path):
    """A file with every kind of value, and tensors of plain and quantized kinds."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"whole.{kind}", 7)
    writer.add_float32("number.small", 0.1)
    writer.add_float64("number.large", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("words", "über alles: 深い")
    writer.add_array("texts", ["a", "", "ß" * 300])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("fractions", [0.5, 0.25])
    random = np.random.default_rng(0)
    floats = random.standard_normal((6, 64)).astype(np.float32)
    writer.add_tensor("plain", floats)
    writer.add_tensor("half", floats[0].astype(np.float16))
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blocks", gguf.quants.quantize(floats, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_fields_and_tensors_are_those_of_the_reader_of_ggml(file):
    ours, theirs = GgufHeader(file), gguf.GGUFReader(file)

    expected = {key: f for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
    assert {key: f.value for key, f in ours.fields.items()} == {
        key: f.contents() for key, f in expected.items()
    }
    assert {key: f.types for key, f in ours.fields.items()} == {
        key: f.types for key, f in expected.items()
    }
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert (found.kind, list(found.shape)) == (tensor.tensor_type, tensor.shape.tolist()[::-1])
        assert found.data.dtype == tensor.data.dtype
        assert np.array_equal(found.data, tensor.data)


def test_a_file_cut_anywhere_is_called_damaged(file, tmp_path):
    whole = file.read_bytes()
    end_of_tensors = GgufHeader(file).tensors["blocks"].data.nbytes
    for length in [0, *range(1, len(whole) - end_of_tensors, 37)]:
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf is damaged or incomplete"):
            GgufFile(cut)


def test_other_formats_and_versions_are_refused(file):
    whole = file.read_bytes()
    for at, value, said in (
        (0, b"GGML", "no GGUF file"),
        (4, b"\1\0\0\0", "no GGUF file"),
        (4, b"\0\0\0\3", "no GGUF"),
    ):
        content = bytearray(whole)
        content[at : at + 4] = value
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            GgufFile(file)


def test_a_name_that_comes_twice_is_refused(file):
    content = file.read_bytes()
    file.write_bytes(content.replace(b"number.small", b"number.large"))
    with pytest.raises(CheckpointError, match=r"holds number\.large twice"):
        GgufFile(file)


def test_tensors_that_overlap_are_refused(file):
    """Some bytes could be said to be any number of large tensors."""
    content = bytearray(file.read_bytes())
    (_, _, _, first), (_, _, _, second) = [
        (t.name, t.tensor_type, t.shape, int(t.field.parts[-1][0]))
        for t in gguf.GGUFReader(file).tensors[:2]
    ]
    at = content.index(b"half") + len("half") + 4 + 8 + 4
    assert int.from_bytes(content[at : at + 8], "little") == second != first
    content[at : at + 8] = (first + 64).to_bytes(8, "little")
    file.write_bytes(content)
    with pytest.raises(ValueError, match="tensors overlap"):
        GgufHeader(file)
