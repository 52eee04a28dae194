"""`layerskip index` end to end on the tiny checkpoint."""

import json
import shutil

import pytest

from layerskip.decoding import LayerSkipModel
from layerskip.decoding.datastore import Datastore
from layerskip.model.checkpoint import DRAFT_TEXT_FILE


@pytest.fixture
def index(folder, program):
    """`index` with the tiny checkpoint's tokenizer."""
    return lambda *arguments: program("index", "--model", folder, *arguments)


def test_drafts_come_from_what_was_indexed(index, run, tmp_path):
    flags = (
        "generate",
        "--prompt",
        "abc",
        "--max-new-tokens",
        20,
        "--draft-from",
        "n-gram",
        "--json",
    )
    before = json.loads(run(*flags)[1])
    (tmp_path / "a.py").write_text((before["text"] + " ") * 9)
    table = tmp_path / "a.table"
    status, out, err = index(table, "--data", tmp_path / "*.py")
    assert (status, err) == (0, "")
    assert out.startswith(f"{table}: ")
    after = json.loads(run(*flags, "--draft-text", table)[1])
    assert after["token_ids"] == before["token_ids"]
    assert after["accepted"] > before["accepted"]


def test_of_rows_the_completions_are_taken_unless_prompts_are_asked_for(index, tmp_path, folder):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "abcd", "completion": "efgh"}) + "\n")
    (tmp_path / "more.txt").write_text("ijklmn")
    table = tmp_path / "a.table"
    model = LayerSkipModel.from_pretrained(folder, dtype="float32")
    data = ("--data", rows, "--data", tmp_path / "more.txt")
    for flags, known, unknown in (
        ((), ("efg", "klm"), "bcd"),
        (("--no-completion-only",), ("bcd", "efg", "klm"), "xyz"),
    ):
        status, out, _ = index(table, *data, *flags, "--json")
        assert status == 0
        result = json.loads(out)
        text = Datastore.load(table, model.decoder.architecture.vocab_size)
        assert result == {"path": str(table), "tokens": result["tokens"], "runs": len(text)}
        for tail in known:
            assert text.propose(model.tokenize(tail)[-3:], 1)[0]
        assert not text.propose(model.tokenize(unknown)[-3:], 1)[0]


def test_in_a_checkpoint_it_is_found(folder, program, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    (tmp_path / "text.txt").write_text("abcd " * 9)
    status, _, err = program("index", own, "--model", own, "--data", tmp_path / "text.txt")
    assert (status, err) == (0, "")
    model = LayerSkipModel.from_pretrained(own, dtype="float32")
    assert model.settings.draft_text_file == own / DRAFT_TEXT_FILE
    (own / DRAFT_TEXT_FILE).unlink()
    (own / DRAFT_TEXT_FILE).symlink_to(tmp_path / "text.txt")
    with pytest.raises(ValueError, match="is a link to"):
        LayerSkipModel.from_pretrained(own)


def test_what_cannot_be_indexed_is_said(index, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a")
    for arguments, status, message in (
        ((tmp_path / "a.safetensors", "--data", text), 2, "whose name ends in .table"),
        ((tmp_path / "no" / "a.table", "--data", text), 2, "does not exist"),
        ((tmp_path / "a.table", "--data", tmp_path / "b.txt"), 1, "there is no file"),
        ((tmp_path / "a.table", "--data", text), 1, "is too short for n-grams"),
    ):
        found, out, err = index(*arguments)
        assert (found, out) == (status, "")
        assert message in err
        assert not (tmp_path / "a.table").exists()


def test_a_link_out_of_the_folder_is_not_followed(index, folder, tmp_path):
    target, text = tmp_path / "target", tmp_path / "text.txt"
    target.write_text("mine")
    text.write_text("abcd " * 9)
    own = shutil.copytree(folder, tmp_path / "own")
    (own / DRAFT_TEXT_FILE).symlink_to(target)
    (own / "a.table").symlink_to(target)
    for path in (own, own / "a.table"):
        status, out, err = index(path, "--data", text)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert "outside of its folder" in err
    assert target.read_text() == "mine"
