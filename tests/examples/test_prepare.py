"""The mixture of examples/checkpoint, from tiny stand-ins of its data sets."""

import dataclasses
import hashlib
import json
import math
import zipfile

import library_functions
import prepare as preparing
import pytest
from library_functions import library, packages, rows_of
from mixture_sources import MOST_CHARACTERS, OPENING, opening, running_text, sentences_of, unwrapped
from own_answers import MAX_NEW_TOKENS, own_answers, random_questions
from prepare import prepare
from transformers import AutoTokenizer

from layerskip import LayerSkipModel
from layerskip.data.readers import read_rows
from layerskip.recipe.exit_loss import IGNORED_LABEL
from layerskip.training.data import Encoding

WORDS = "the mill was built of red brick by a family of bakers who sold it after the war to a club"
LONG = f"{WORDS} and the club sold it again in 1950 ."


def modules(root):
    root.mkdir()
    for i in range(80):
        text = f'def f{i}(x):\n    """Adds {i}."""\n    return x + {i}\n'
        (root / f"m{i}.py").write_text(text)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")

    def lines(name, rows):
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    (root / "topv2").mkdir()
    for split, numbers in (("train", range(60)), ("eval", [200, 201]), ("test", range(50, 70))):
        table = [f"alarm\tcommand {i}\t[IN:X {i} ]" for i in numbers]
        text = "\n".join(["domain\tutterance\tsemantic_parse", *table, ""])
        (root / "topv2" / f"alarm_{split}.tsv").write_text(text)
    twins = [
        {"description": f"{i} {WORDS * 3}. This package has the {part}.", "summary": f"{part} {i}"}
        for i in range(90)
        for part in ("program", "documentation")
    ]
    lines(
        "debian_descriptions/descriptions.jsonl",
        [*twins, {"description": "x" * 2000, "summary": "no"}],
    )
    papers = [
        {"source": [f"Paper {i}.", WORDS * 4, WORDS * 8], "target": [f"Short  {i}.", "Second."]}
        for i in range(30)
    ]
    lines("scitldr/train.jsonl", papers[:8])
    lines("scitldr/test.jsonl", papers[10:])
    problems = [
        {
            "task_id": i,
            "text": f"Add {i}.",
            "test_list": ["assert f"],
            "code": f"def f():\r\n\treturn {i} ",
        }
        for i in range(590, 640)
    ]
    lines("mbpp/mbpp.jsonl", problems)
    sums = [
        {
            "question": f"{i} and  1?",
            "answer": f"It is {i}+1=<<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}",
        }
        for i in range(30)
    ]
    lines("gsm8k/train.jsonl", sums)
    (root / "wikitext2").mkdir()
    articles = [
        f" = Mill {i} = \n \n Mill {i} : {LONG} Of <unk> nothing is known . {LONG.capitalize()} \n"
        for i in range(20)
    ]
    (root / "wikitext2" / "valid.txt").write_text("".join(articles))
    return str(root)


def answered(data=None):
    """Twelve questions with answers, which no model has to give."""
    said = [("user", "What is {}?"), ("assistant", "{} is a number.")]
    return [
        {"messages": [{"role": role, "content": text.format(i)} for role, text in said]}
        for i in range(12)
    ], []


@pytest.fixture(autouse=True)
def small_sources(tmp_path, monkeypatch):
    """Few functions and answers in place of a whole library and a real model."""
    root = modules(tmp_path / "library")
    monkeypatch.setattr(library_functions.python_functions, "standard_library", lambda: root)
    asked = dataclasses.replace(preparing.SOURCES["own_answers"], read=answered)
    monkeypatch.setitem(preparing.SOURCES, "own_answers", asked)


def whole_opening(row):
    """Return the beginning of a row's text, as prompt and completion or as one text."""
    return whole_text(row)[:OPENING]


def whole_text(row):
    return row["text"] if "text" in row else row["prompt"] + row["completion"]


def rows_in(folder, name="train.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_shares_are_those_of_the_table_and_scarce_rows_stand_twice(data, tmp_path):
    summary = prepare(tmp_path / "a", 200, data=data)
    rows = rows_in(tmp_path / "a")
    counts = {name: sum(row["source"] == name for row in rows) for name in preparing.SHARES}
    assert counts == {
        "topv2": 90,
        "debian": 34,
        "scitldr": 8,
        "python": 30,
        "mbpp": 1,
        "gsm8k": 3,
        "wikitext2": 10,
        "own_answers": 24,
    }
    assert summary["rows"] == len(rows) == 200
    scarce = summary["sources"]["own_answers"]
    assert (scarce["wanted"], scarce["available"], scarce["twice"]) == (24, 12, 12)
    assert summary["sources"]["topv2"]["twice"] == 90 - 50
    assert summary["sources"]["debian"]["twice"] == 0
    assert summary == json.loads((tmp_path / "a" / "mixture.json").read_text())
    order = [row["source"] for row in rows]
    assert order != sorted(order, key=list(preparing.SHARES).index)


def test_the_seed_decides_everything(data, tmp_path):
    files = [
        prepare(tmp_path / name, 100, seed, data)["files"]
        for name, seed in zip("abc", (1, 1, 2), strict=True)
    ]
    assert files[0] == files[1]
    assert files[0]["train.jsonl"]["sha256"] != files[2]["train.jsonl"]["sha256"]
    for name, file in files[0].items():
        assert hashlib.sha256((tmp_path / "a" / name).read_bytes()).hexdigest() == file["sha256"]
        assert len(rows_in(tmp_path / "a", name)) == file["rows"]


def test_no_row_begins_like_one_that_is_held_back(data, tmp_path):
    summary = prepare(tmp_path / "a", 2000, data=data)
    trained = {whole_opening(row) for row in rows_in(tmp_path / "a") if "messages" not in row}
    held = {name for name in summary["files"] if name.startswith("test-")}
    assert held == {f"test-{name}.jsonl" for name in ("topv2", "debian", "scitldr", "python")}
    for name in held:
        rows = rows_in(tmp_path / "a", name)
        assert rows
        held_out = tuple(opening(row) for row in rows)
        assert not any(text.startswith(held_out) for text in trained)
        assert all(row["prompt"] and row["reference"] for row in rows)
    # Commands 50 to 59 are in both files of the data set, 200 and 201 in that for evaluation.
    assert {row["prompt"] for row in rows_in(tmp_path / "a") if row["source"] == "topv2"} == {
        f"command {i}\n" for i in range(50)
    }
    # Of two descriptions that begin alike one is taken.
    debian = rows_in(tmp_path / "a", "test-debian.jsonl")
    assert len(debian) == 90 - summary["sources"]["debian"]["available"]
    assert not any("documentation" in row["prompt"] for row in debian)


def test_rows_of_every_source(data, tmp_path):
    prepare(tmp_path / "a", 2000, data=data)
    rows = rows_in(tmp_path / "a")
    first = {
        name: min((r for r in rows if r["source"] == name), key=str) for name in preparing.SHARES
    }
    summaries = {whole_text(row) for row in rows if row["source"] == "scitldr"}
    paper = f"Paper 0. {WORDS * 4}\n\nSummary: Short 0."  # the third sentence is too long
    assert paper in summaries
    assert first["mbpp"]["prompt"].endswith("\n[BEGIN]\n")
    numbers = {row["completion"] for row in rows if row["source"] == "mbpp"}
    assert numbers <= {f"def f():\n    return {i}" for i in range(601, 640)}
    assert first["gsm8k"]["messages"] == [
        {"role": "user", "content": "0 and 1?"},
        {"role": "assistant", "content": "It is 0+1=1.\nThe answer is 1."},
    ]
    # The sentence that has an unknown word is left out between its neighbours.
    known = f"{LONG} {LONG.capitalize()}".replace(" .", ".")
    texts = {row["text"] for row in rows if row["source"] == "wikitext2"}
    assert texts == {f"Mill {i}: {known}" for i in range(20)}
    lengths = [len(whole_text(row)) for row in rows if "messages" not in row]
    assert max(lengths) <= MOST_CHARACTERS


def test_every_second_row_is_running_text(data, tmp_path):
    prepare(tmp_path / "a", 200, data=data)
    for source in ("debian", "scitldr", "python"):
        found = [row for row in rows_in(tmp_path / "a") if row["source"] == source]
        running = [row for row in found if "text" in row]
        asked = [row for row in found if "text" not in row]
        assert len(asked) == len(running) > 0
        for row in running:
            assert set(row) <= {"source", "text", "category"}
            assert source == "python" or row["text"].count("\n\nSummary: ") == 1


def test_running_text_is_prompt_and_completion_as_they_follow():
    row = {"prompt": "a b\n c\n\nSummary:", "completion": " i", "category": "x"}
    assert running_text(row) == {"text": "a b\n c\n\nSummary: i", "category": "x"}


def test_all_rows_are_ones_to_train_on(data, folder, tmp_path):
    prepare(tmp_path / "a", 200, data=data)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encode = Encoding(tokenizer=tokenizer, max_length=2 * MOST_CHARACTERS)
    for where, row in read_rows(str(tmp_path / "a" / "train.jsonl")):
        encoded = encode(where, row)
        labels = [x for x in encoded["labels"] if x != IGNORED_LABEL]
        if "text" in row:  # whose first token nothing predicts
            labels = [encoded["input_ids"][0], *labels]
        learnt = row.get("completion") or row.get("text")
        expected = learnt or row["messages"][-1]["content"]
        assert tokenizer.decode(labels, skip_special_tokens=True).rstrip("\n") == expected


def test_functions_are_cut_after_their_docstring_or_a_third(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        "x = 1\n\f\nclass A:\n    @property\n"
        '    def f(self):\n        """Says x.\n\n        Twice.\n        """\n\n'
        "        def inner():\n            return 1\n        return 'x'\n\n"
        '    def only_text(self):\n        """Nothing else."""\n\n'
        "    def short(self):\n        return 1\n\n"
        "async def g(a):\n    b = a\n    c = b\n    # why\n    d = c\n    return d\n\n"
        "def h(a):\n    return '''\nleft'''\n"
    )
    assert [(row["prompt"], row["completion"]) for row in rows_of(path)] == [
        (
            'def f(self):\n    """Says x.\n\n    Twice.\n    """',
            "\n\n    def inner():\n        return 1\n    return 'x'",
        ),
        ("async def g(a):\n    b = a", "\n    c = b\n    # why\n    d = c\n    return d"),
    ]


def test_tests_and_faulty_files_are_left_out(tmp_path):
    root = tmp_path / "modules"
    for name in ("test/a.py", "pkg/tests/b.py", "site-packages/c.py", "pkg/d.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f'def f():\n    """{name}"""\n    return 1\n')
    (root / "bad.py").write_text("def (:\n")
    train, held_out = library(root)
    assert [row["prompt"] for row in train + held_out] == ['def f():\n    """pkg/d.py"""']


def test_packages_are_those_whose_hashes_are_written_down(tmp_path, monkeypatch):
    wheel = tmp_path / "few-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as members:
        members.writestr("few/a.py", 'def f():\n    """Few."""\n    return 1\n')
        members.writestr("few/tests/b.py", 'def g():\n    """Test."""\n    return 1\n')
        about = "few-1.0.dist-info"
        members.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: few\nVersion: 1.0\n")
        members.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        members.writestr(f"{about}/RECORD", "")
    listed = tmp_path / "packages.txt"
    monkeypatch.setattr(library_functions, "PACKAGES", listed)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    listed.write_text(f"few==1.0 --hash=sha256:{digest}\n")
    train, held_out = packages()
    assert [row["prompt"] for row in train + held_out] == ['def f():\n    """Few."""']
    listed.write_text(f"few==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(ValueError, match=r"pip could not fetch packages\.txt"):
        packages()


def test_text_is_set_as_people_write_it():
    line = (
        ' " Mill " cost £ 2 @,@ 300 ( a lot ) . It opened at 9 : 30 ,'
        ' " said J. Smith " . <unk> did . '
    )
    assert sentences_of(line) == [
        '"Mill" cost £2,300 (a lot).',
        'It opened at 9:30, "said J. Smith".',
        "<unk> did.",
    ]
    wrapped = "one\ntwo:\n * a\n * b\n\nthree\nfour\n1. five"
    assert unwrapped(wrapped) == "one two:\n * a\n * b\n\nthree four\n1. five"


def test_what_cannot_be_prepared_is_said(data, tmp_path):
    for options, message in (
        ({"rows": 0}, "at least 1"),
        ({"shares": {"topv2": 60, "debian": 30}}, "90 percent"),
        ({"shares": {"topv2": 60, "debian": math.nan}}, "nan percent"),
        ({"shares": {"topv2": 120, "debian": -20}}, "not above 0"),
        ({"data": "/nowhere"}, "topv2 .* is not here"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(tmp_path / "a", **{"rows": 10, "data": data, **options})
        assert not (tmp_path / "a").exists()


def test_own_answers_are_the_models_and_end_by_themselves(folder, monkeypatch):
    model = LayerSkipModel.from_pretrained(folder, dtype="float32")
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ messages[0]['content'] }}")
    first = model.generate(
        [{"role": "user", "content": random_questions(1)[0]}],
        mode="plain",
        max_new_tokens=MAX_NEW_TOKENS,
    )
    assert first.finish_reason == "length"  # a random model says no end token, so:
    ends = dataclasses.replace(model.settings, end_tokens=(first.token_ids[3],))
    monkeypatch.setattr(model, "settings", ends)
    monkeypatch.setattr(LayerSkipModel, "from_pretrained", lambda name: model)
    rows, held_out = own_answers(questions=3)
    assert not held_out
    assert all(question["role"] == "user" for question, _ in (row["messages"] for row in rows))
    answers = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows}
    expected = model.generate(
        [{"role": "user", "content": random_questions(1)[0]}],
        mode="plain",
        max_new_tokens=MAX_NEW_TOKENS,
    )
    assert expected.finish_reason == "stop"
    assert answers[random_questions(1)[0]] == expected.text.strip()
    monkeypatch.setattr(model, "settings", dataclasses.replace(ends, end_tokens=()))
    assert own_answers(questions=3) == ([], [])


def test_a_folder_with_files_is_refused(data, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        prepare(tmp_path, 10, data=data)


def test_shares_can_be_given_on_the_command_line(data, tmp_path, monkeypatch):
    folder = tmp_path / "a"
    arguments = [
        str(folder),
        "--data",
        str(data),
        "--rows",
        "20",
        "--shares",
        "topv2=75, debian=25",
    ]
    monkeypatch.setattr("sys.argv", ["prepare.py", *arguments])
    preparing.main()
    sources = json.loads((folder / "mixture.json").read_text())["sources"]
    assert {name: source["wanted"] for name, source in sources.items()} == {
        "topv2": 15,
        "debian": 5,
    }


def test_shares_that_cannot_be_read_are_said():
    for text in ("nothing=100", "topv2", "topv2=many"):
        with pytest.raises(ValueError, match="topv2"):
            preparing.read_shares(text)
