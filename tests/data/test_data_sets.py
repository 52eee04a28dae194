"""Rows of a data set, from a folder or the hub, and what is said where there are none."""

import json
import lzma

import pytest

from layerskip.data.readers import DataSet

SET = DataSet(
    folder="sums",
    files={"train": "*_train.jsonl*", "test": "*_test.jsonl*"},
    hub="somebody/sums",
    config="plain",
    hub_splits={"test": "held-out"},
    origin="https://example.org/sums",
)


@pytest.fixture(autouse=True)
def no_folder(monkeypatch):
    monkeypatch.delenv("LAYERSKIP_DATA", raising=False)


def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    with (lzma.open if path.suffix == ".xz" else open)(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_all_files_of_a_split_in_alphabetical_order(tmp_path, monkeypatch):
    write(tmp_path / "sums" / "b_test.jsonl", {"a": 3})
    write(tmp_path / "sums" / "a_test.jsonl.xz", {"a": 1}, {"a": 2})
    write(tmp_path / "sums" / "a_train.jsonl", {"a": 4})
    expected = [{"a": 1}, {"a": 2}, {"a": 3}]
    assert SET.rows("test", str(tmp_path)) == expected
    monkeypatch.setenv("LAYERSKIP_DATA", str(tmp_path))
    assert SET.rows("test") == expected
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("LAYERSKIP_DATA", f"~/{tmp_path.name}")
    assert SET.rows("test") == SET.rows("test", f"~/{tmp_path.name}") == expected


def test_a_file_that_is_there_in_two_forms_is_read_once(tmp_path):
    write(tmp_path / "sums" / "a_test.jsonl.xz", {"a": 1})
    write(tmp_path / "sums" / "a_test.jsonl", {"a": 1})  # as `unxz -k` leaves it
    (tmp_path / "sums" / "a_test.jsonl.bak").write_text("what an editor left")
    assert SET.rows("test", str(tmp_path)) == [{"a": 1}]


def test_splits_of_one_file_by_id(tmp_path):
    ids = {"test": range(2, 4), "prompt": range(1, 2)}
    one = DataSet(folder="one", files=dict.fromkeys(ids, "x.jsonl"), origin="here", ids=ids)
    write(tmp_path / "one" / "x.jsonl", *({"task_id": i} for i in range(1, 6)))
    assert one.rows("test", str(tmp_path)) == [{"task_id": 2}, {"task_id": 3}]
    assert one.rows("prompt", str(tmp_path)) == [{"task_id": 1}]


def test_the_hub_is_asked_by_its_own_names(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return [{"a": 1}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert SET.rows("test") == [{"a": 1}]
    assert SET.rows("train") == [{"a": 1}]
    assert asked == [
        (("somebody/sums", "plain"), {"split": "held-out"}),
        (("somebody/sums", "plain"), {"split": "train"}),
    ]


def test_what_cannot_be_reached_says_how_to_get_it(tmp_path, monkeypatch):
    import datasets

    def unreachable(*names, **options):
        raise ConnectionError("no route\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match="sums") as error:
        SET.rows("test")
    message = str(error.value)
    assert "\n" not in message
    for part in (
        "sums (test) is not here",
        "https://example.org/sums",
        "$LAYERSKIP_DATA/sums/*_test.jsonl*, with LAYERSKIP_DATA naming the folder above",
        "pip install 'layerskip[bench]'",
        "somebody/sums",
        "no route",
    ):
        assert part in message
    own = DataSet(folder="own", files={"test": "x.tsv*"}, origin="the makers")
    with pytest.raises(ValueError, match=f"get it from the makers and put it at {tmp_path}"):
        own.rows("test", str(tmp_path))
    with pytest.raises(ValueError, match="own has no train split"):
        own.rows("train")
