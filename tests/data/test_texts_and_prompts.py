"""Texts and prompts of files, and the bounds of every read."""

import gzip
import json
import lzma
from pathlib import Path

import pytest

from layerskip.data import readers
from layerskip.data.readers import read_prompts, read_rows, read_text, read_text_file


def test_texts_are_read_and_cut_after_words(tmp_path, monkeypatch):
    (tmp_path / "wikitext2").mkdir()
    with lzma.open(tmp_path / "wikitext2" / "test.txt.xz", "wt") as file:
        file.write(" = Title = \n \n some words\n")
    monkeypatch.setenv("LAYERSKIP_DATA", str(tmp_path))
    assert read_text("wikitext2") == " = Title = \n \n some words\n"
    assert read_text("wikitext2", max_words=4) == " = Title = \n \n some"
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("LAYERSKIP_DATA", f"~/{tmp_path.name}")
    assert read_text("wikitext2") == " = Title = \n \n some words\n"
    assert read_text(f"~/{tmp_path.name}/wikitext2/test.txt.xz", 3) == " = Title ="
    with pytest.raises(ValueError, match=r"no\.txt cannot be read"):
        read_text(str(tmp_path / "no.txt"))


def test_wikitext_of_the_hub_is_the_same_text(monkeypatch):
    """Its rows are empty where the text has a line of one space."""
    monkeypatch.delenv("LAYERSKIP_DATA", raising=False)
    rows = [("", {"text": text}) for text in ("", " = Title = \n", "", " some words\n")]
    monkeypatch.setattr(readers, "_hub_rows", lambda *names: rows)
    assert read_text("wikitext2") == " \n = Title = \n \n some words\n"


def test_missing_wikitext_says_how_to_get_it(monkeypatch):
    def offline(*_):
        raise ValueError("no network")

    monkeypatch.delenv("LAYERSKIP_DATA", raising=False)
    monkeypatch.setattr(readers, "_hub_rows", offline)
    with pytest.raises(ValueError, match=r"put it at \$LAYERSKIP_DATA/wikitext2/test\.txt"):
        read_text("wikitext2")


def test_prompts_of_json_lines(tmp_path):
    for suffix in (".jsonl", ".JSONL", ".jsonl.gz"):
        message, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
        rows = [
            {"prompt": "a"},
            {"prompt": [1, 2]},
            {"messages": [message, answer]},
            {"messages": [message], "tools": [{"name": "f"}]},
        ]
        path = tmp_path / f"prompts{suffix}"
        with (gzip.open if suffix.endswith(".gz") else open)(path, "wt") as file:
            file.write("\n\n".join(map(json.dumps, rows)))
        assert read_prompts(path) == ["a", [1, 2], [message], rows[3]]


def test_prompts_of_lines(tmp_path):
    (tmp_path / "prompts.txt").write_text("ab\n\nc d\n")
    assert read_prompts(tmp_path / "prompts.txt") == ["ab", "c d"]


def test_bad_prompts_are_named(tmp_path):
    for name, text, message in (
        ("a.jsonl", '{"prompt": "x"}\n{"text": "x"}\n', "a.jsonl:2: `prompt`"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt"\n', "a.jsonl:2 is not JSON"),
        ("a.json", '{"prompt": "x"}', "name it .jsonl"),
        ("a.txt", "\n \n", "a.txt holds no prompt"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_prompts(tmp_path / name)


def test_a_device_without_end_is_one_line():
    for read in (read_prompts, read_text_file):
        with pytest.raises(ValueError, match=r"zero(:1)? has more than [\d,]+ characters") as error:
            read(Path("/dev/zero"))
        assert "\n" not in str(error.value)


def test_prompts_without_end_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_TEXT_CHARS", 1000)
    (tmp_path / "yes").write_text("yes\n" * 1000)
    with pytest.raises(ValueError, match="yes has more than 1,000 characters: split it"):
        read_prompts(tmp_path / "yes")


def test_a_row_that_would_fill_the_memory_is_named(tmp_path, monkeypatch):
    for name, text, where in (
        ("a.jsonl", '{"text": "x"}\n{"text": "%s"}\n', "a.jsonl:2"),
        ("a.json", '[{"text": "x"}, {"text": "%s"}]', "a.json, row 2"),
        ("a.csv", "text\nx\n%s\n", "a.csv:3"),
        ("a.tsv", "a\tb\nx\t%s\n", "a.tsv:2"),
        ("a.txt", "x\n\n%s\n", "a.txt:3"),
        ("b.txt", "x\n\n" + "%s\n" * 2, "b.txt:3"),
    ):
        monkeypatch.setattr(readers, "MAX_ROW_CHARS", 1000)
        size = 600 if name.startswith("b") else 1001
        (tmp_path / name).write_text(text.replace("%s", "x" * size))
        with pytest.raises(ValueError, match=f"{where} has more than 1,000 characters.*split it"):
            list(read_rows(str(tmp_path / name)))
