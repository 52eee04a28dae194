"""Rows of files of every kind, and damaged ones named by their line."""

import gzip
import json
import lzma

import pytest

from layerskip.data.readers import read_rows

ROWS = [{"prompt": "1 plus 2 is", "completion": "3"}, {"prompt": "2 plus 2 is", "completion": "4"}]


OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def write(path, text):
    with OPENERS.get(path.suffix, open)(path, "wt") as file:
        file.write(text)
    return str(path)


JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


COMMAS = "prompt,completion\n1 plus 2 is,3\n2 plus 2 is,4\n"


def test_files_of_every_kind(tmp_path):
    for name, text in (
        ("a.jsonl", JSON_LINES),
        ("a.json", json.dumps(ROWS)),
        ("a.json.gz", "\n".join(map(json.dumps, ROWS))),
        ("a.csv.xz", COMMAS),
        ("a.tsv", COMMAS.replace(",", "\t")),
    ):
        rows = list(read_rows(write(tmp_path / name, text)))
        assert [dict(row) for _, row in rows] == ROWS


def test_text_files_and_parquet(tmp_path):
    from datasets import Dataset

    for compression in ("", ".gz"):
        path = write(tmp_path / f"a.txt{compression}", "one\ntwo\n\n\nthree\n")
        assert list(read_rows(path)) == [
            ("a.txt:1", {"text": "one\ntwo\n"}),
            ("a.txt:5", {"text": "three\n"}),
        ]
        assert next(read_rows(path, text_field="content"))[1] == {"content": "one\ntwo\n"}
        Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
        packed = tmp_path / f"b.parquet{compression}"
        with OPENERS.get(compression, open)(packed, "wb") as file:
            file.write((tmp_path / "a.parquet").read_bytes())
        assert list(read_rows(str(packed))) == [
            (f"{packed.name}:{number}", row) for number, row in enumerate(ROWS, 1)
        ]


def test_a_damaged_parquet_file_is_named(tmp_path):
    from datasets import Dataset

    for name, cut in (("a.parquet", 500), ("a.parquet.gz", 20)):
        Dataset.from_list(ROWS * 50).to_parquet(str(tmp_path / "whole"))
        whole = (tmp_path / "whole").read_bytes()
        whole = gzip.compress(whole) if name.endswith(".gz") else whole
        (tmp_path / name).write_bytes(whole[:cut] + whole[cut + 20 :])
        with pytest.raises(ValueError, match=rf"{name} cannot be read as parquet: ") as error:
            list(read_rows(str(tmp_path / name)))
        assert "\n" not in str(error.value)


def test_what_is_not_there_is_said_before_a_row_is_asked_for(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"none\.jsonl does not exist"):
        read_rows("none.jsonl")
    with pytest.raises(ValueError, match="of no known kind"):
        read_rows(write(tmp_path / "a.doc", "x"))

    def load_dataset(*_, **__):
        raise ValueError('Unknown split "tset"')

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r'it cannot be read: Unknown split "tset"'):
        read_rows("some/sums", "tset")


def test_patterns_name_several_files_and_environment_variables_folders(tmp_path, monkeypatch):
    for name in ("weather_train", "alarm_train", "alarm_eval"):
        write(tmp_path / f"{name}.tsv.xz", f"utterance\tparse\n{name}\tx\n")
    monkeypatch.setenv("TINY_DATA", str(tmp_path))
    rows = list(read_rows("$TINY_DATA/*_train.tsv.xz"))
    assert rows == [
        (f"{name}.tsv:2", {"utterance": name, "parse": "x"})
        for name in ("alarm_train", "weather_train")
    ]
    assert len(list(read_rows("${TINY_DATA}/alarm_eval.tsv.xz"))) == 1
    with pytest.raises(ValueError, match=r"none_\*\.tsv does not exist"):
        list(read_rows("$TINY_DATA/none_*.tsv"))
    monkeypatch.delenv("TINY_DATA")
    with pytest.raises(ValueError, match=r"\$TINY_DATA/a.tsv: set this environment variable"):
        next(read_rows("$TINY_DATA/a.tsv"))


def test_quotation_marks_in_tab_separated_text_are_text(tmp_path):
    path = write(tmp_path / "a.tsv", 'prompt\tcompletion\nsay "hi\t"hi\n')
    assert dict(next(read_rows(path))[1]) == {"prompt": 'say "hi', "completion": '"hi'}


def test_bad_rows_are_named_by_their_line(tmp_path):
    for name, text, message in (
        ("a.jsonl", '{"text": "x"}\n{"text"\n', "a.jsonl:2 is not JSON"),
        ("a.jsonl", '{"text": "x"}\n' + "[" * 100_000, "a.jsonl:2 is nested too deeply"),
        ("a.json", "[" * 100_000, "a.json is nested too deeply"),
        ("a.jsonl", '{"text": "x"}\n{"a": ' + "1" * 5000 + "}", "a.jsonl:2 is not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl:1 is not an object"),
        ("a.json", '{\n"a": 1}', "must hold a list"),
        ("a.tsv", "a\tb\n1\t2\n1\n", "a.tsv:3 does not have the 2 columns"),
        ("a.csv", 'a,b\n1,2\n\n"3\n4\n5"\n', "a.csv:4 does not have the 2 columns"),
        (
            "a.csv",
            'a,b\n1,"no end\n2,3\n',
            "a.csv cannot be read after line 1: unexpected end of data",
        ),
        ("a.doc", "x", "of no known kind"),
    ):
        with pytest.raises(ValueError, match=message):
            list(read_rows(write(tmp_path / name, text)))


def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path):
    whole = b'{"text": "x"}\n' * 1500 + b'{"text": "caf\xe9"}\n' + b'{"text": "x"}\n' * 10
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(ValueError, match=rf"{path.name}:1501 is no text in UTF-8"):
        list(read_rows(str(path)))


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, text in (("a.json", '[{"a": "x"}]'), ("a.csv", "a\nx\n")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert dict(next(read_rows(str(tmp_path / name)))[1]) == {"a": "x"}


def test_a_damaged_archive_is_named(tmp_path):
    for compression, damage in (
        (".gz", lambda whole: whole[:-20]),
        (".xz", lambda whole: whole[:40] + whole[60:]),
    ):
        path = write(tmp_path / f"rows.jsonl{compression}", JSON_LINES * 50)
        whole = (tmp_path / f"rows.jsonl{compression}").read_bytes()
        (tmp_path / f"rows.jsonl{compression}").write_bytes(damage(whole))
        with pytest.raises(ValueError, match=rf"rows.jsonl{compression} cannot be read as text"):
            list(read_rows(path))
