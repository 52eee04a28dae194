"""Tasks from small files of the right form: prompts, shots, draws, ends, quality."""

import dataclasses
import json
import pickle
from collections import Counter

import pytest

from layerskip.bench import sandbox
from layerskip.bench.tasks import FORMS, TASKS, Sample, Task, draw, load_task


@pytest.fixture(autouse=True)
def no_folder(monkeypatch):
    monkeypatch.delenv("LAYERSKIP_DATA", raising=False)


ARTICLE = " ".join(f"word{i}" for i in range(1, 201))
FILES = {
    "humaneval/HumanEval.jsonl": [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f'def f(x):\n    """Adds {i}."""\n',
            "entry_point": "f",
            "canonical_solution": f"    return x + {i}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {i + 1}",
        }
        for i in range(3)
    ],
    "mbpp/mbpp.jsonl": [
        {
            "task_id": i,
            "text": f"Add {i}.",
            "code": f"def f(x):\r\n  return x + {i}",
            "test_setup_code": "",
            "test_list": [f"assert f(1) == {i + 1}"],
        }
        for i in (1, 2, 3, 4, 11, 12, 510, 511, 601)
    ],
    "cnn_dailymail/test500.jsonl": [
        {"id": f"t{i}", "article": f"A{i} {ARTICLE}", "highlights": f"Sum {i} .\nMore ."}
        for i in range(4)
    ]
    + [{"id": "short", "article": "Few words.", "highlights": "Few words ."}],
    "cnn_dailymail/validation500.jsonl": [
        {"id": f"v{i}", "article": f"V{i}", "highlights": f"Shown {i} ."} for i in range(9)
    ],
    "xsum/test1000.jsonl": [{"id": 7, "document": "Long.", "summary": "Short."}],
    "gsm8k/train.jsonl": [
        {"question": f"{i} and 1?", "answer": f"So\n#### {i + 1}"} for i in range(6)
    ],
    "gsm8k/test.jsonl": [{"question": "2 and 2?", "answer": "It is\n#### 4"}],
    "mt_bench/question.jsonl": [
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]}
    ],
    "spec_bench/question.jsonl": [
        {"question_id": i, "category": category, "turns": [f"Ask {i}."]}
        for i, category in enumerate(
            ["writing", "math", "coding", "stem"] * 3
            + ["translation"] * 4
            + ["summarization"] * 4
            + ["qa"] * 4
            + ["math_reasoning"] * 4
            + ["rag"] * 4
        )
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name, rows in FILES.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "topv2").mkdir()
    for domain, count in (("alarm", 20), ("music", 3), ("weather", 5)):
        for split in ("train", "test"):
            lines = [f"{domain}\t{split} {i}\t[IN:X {i} ]" for i in range(count)]
            table = "\n".join(["domain\tutterance\tsemantic_parse", *lines, ""])
            (root / "topv2" / f"{domain}_{split}.tsv").write_text(table)
    return str(root)


def only(name, data, **options):
    (sample,) = load_task(name, data=data, samples=1, **options).samples
    return sample


def test_every_task_loads_and_is_the_same_each_time(data):
    for name in TASKS:
        task = load_task(name, data=data, allow_code_execution=True)
        assert task == load_task(name, data=data, allow_code_execution=True)
        assert task.samples, name
        assert pickle.loads(pickle.dumps(task.samples)) == task.samples
        assert len({sample.id for sample in task.samples}) == len(task.samples), name
        assert FORMS[name].shot_split != "test"


def test_rows_of_another_form_are_named(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"q": "x"}\n')
    with pytest.raises(
        ValueError, match=r"gsm8k, row 1: not as docs/how-to/bench.md has it \(KeyError: 'ques"
    ):
        load_task("gsm8k", data=str(tmp_path), n_shot=0)


def test_what_judging_wants_is_looked_for_before_anything_runs(tmp_path):
    for name, file, row, message in (
        ("humaneval", "HumanEval.jsonl", {"prompt": "x", "test": "y"}, "humaneval, row 1: .*setup"),
        ("mbpp", "mbpp.jsonl", {"task_id": "Mbpp/2"}, "a row's task_id is 'Mbpp/2'; it must be a"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps(row))
        with pytest.raises(ValueError, match=message):
            load_task(name, data=str(tmp_path), n_shot=0, allow_code_execution=True)


def test_rows_without_their_tests_can_be_asked_where_nothing_is_judged(tmp_path):
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "HumanEval.jsonl").write_text('{"prompt": "x"}')
    task = load_task("humaneval", data=str(tmp_path), judged=False)
    assert len(task.samples) == 1
    assert task.metrics is None  # nothing runs that the user has not allowed


def test_prompts_of_topv2(data):
    task = load_task("topv2", data=data)
    assert len(task.samples) == 28
    assert task.samples[0].prompt == "test 0\n"
    assert task.samples[0].references == ("[IN:X 0 ]",)
    assert task.stop == ("\n",)
    answers = [*("[IN:X 0 ]\nand more", "[IN:X 1 ]", "[IN:X ]"), *[""] * 25]
    assert task.quality(answers) == {"exact_match": 2 / 28}
    (shown,) = load_task("topv2", data=data, samples=1, n_shot=1).samples
    assert shown.prompt.startswith("train ")
    assert shown.prompt.count("\n") == 3


def test_humaneval_and_mbpp_run_their_tests(data):
    task = load_task("humaneval", data=data, allow_code_execution=True)
    assert task.code_execution == sandbox.isolation()
    assert task.samples[1].prompt == 'def f(x):\n    """Adds 1."""'
    right = [f"\n    return x + {i}\n\ndef other(:" for i in range(3)]
    assert task.quality(right) == {"pass@1": 1}
    assert task.quality([right[0], right[0], "\n    exit(0)"]) == {"pass@1": 1 / 3}

    task = load_task("mbpp", data=data, allow_code_execution=True)
    assert [sample.id for sample in task.samples] == ["11", "12", "510"]
    first = task.samples[0].prompt
    assert first.count("[BEGIN]\n") == 4
    assert first.count("[DONE]\n\n") == 3
    assert first.endswith(
        "Add 11. Your code should pass these tests:\n\nassert f(1) == 12\n[BEGIN]\n"
    )
    assert "\r" not in first
    answers = [f"def f(x):\n  return x + {i}\n[DONE]\nrubbish (" for i in (11, 12, 11)]
    assert task.quality(answers) == {"pass@1": 2 / 3}


def test_prompts_of_summaries(data):
    task = load_task("cnn_dm", data=data)
    assert task.n_shot == 1
    before = {sample.prompt.split("\n\n")[0] for sample in task.samples}
    (shown,) = before  # the same before all
    assert shown.startswith("Article: V")
    assert "\nSummary: Shown " in shown
    assert task.samples[0].prompt.endswith(f"Article: A0 {ARTICLE}\nSummary:")
    right = [sample.references[0] for sample in task.samples]
    assert task.quality(right) == {"rouge1": 1, "rouge2": 1, "rougeL": 1}
    assert only("cnn_dm", data, n_shot=0).prompt.count("Article: ") == 1
    assert only("xsum", data).prompt == "Article: Long.\nSummary in one sentence:"


def test_articles_to_continue_have_no_reference(data):
    task = load_task("cnn_dm_lm", data=data)
    assert len(task.samples) == 4  # the short one has nothing to continue
    assert task.samples[0].prompt == " ".join(["A0", *(f"word{i}" for i in range(1, 128))])
    assert task.quality(["anything"] * 4) == {}


def test_gsm8k_compares_the_final_number(data):
    task = load_task("gsm8k", data=data)
    assert task.samples[0].prompt.count("Question: ") == 6
    assert task.samples[0].prompt.endswith("\n\nQuestion: 2 and 2?\nAnswer:")
    assert task.quality(["2 and 2 make 4.\n\nQuestion: 9 and 9?"]) == {"exact_match": 1}
    assert task.quality(["5"]) == {"exact_match": 0}


def test_open_questions_are_asked_as_chat_where_the_model_can(data):
    sample = only("mt_bench", data)
    assert sample.prompt == ({"role": "user", "content": "Write."},)
    assert (sample.id, sample.category) == ("81", "writing")
    assert only("mt_bench", data, chat=False).prompt == "Write."
    drawn = load_task("spec_bench", data=data, samples=12).samples
    expected = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
    assert Counter(sample.category for sample in drawn) == dict.fromkeys(expected, 2)


def test_shots_are_drawn_by_the_seed_and_prompts_do_not_change_with_them(data):
    task, other = (load_task("gsm8k", data=data, n_shot=3, seed=seed) for seed in (0, 1))
    assert task.samples[0].prompt != other.samples[0].prompt
    assert task.samples[0].id == other.samples[0].id


def test_a_larger_draw_contains_the_smaller_one_and_keeps_the_order():
    items = list(range(50))
    draws = [draw(items, count, seed=3, group=lambda x: x % 3) for count in (5, 20, None)]
    assert set(draws[0]) < set(draws[1]) < set(draws[2])
    assert all(drawn == sorted(drawn) for drawn in draws)
    assert draws[0] == draw(items, 5, seed=3, group=lambda x: x % 3)
    assert draws[0] != draw(items, 5, seed=4, group=lambda x: x % 3)


# --- own files


def own(tmp_path, *rows, name="mine.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_own_file_without_references(tmp_path):
    messages = [{"role": "user", "content": "Hello"}]
    answered = [*messages, {"role": "assistant", "content": "Hi"}]
    task = load_task(own(tmp_path, {"prompt": "one", "reference": None}, {"messages": messages}))
    assert [sample.prompt for sample in task.samples] == ["one", messages]
    assert [sample.id for sample in task.samples] == ["mine.jsonl:1", "mine.jsonl:2"]
    assert task.quality(["a", "b"]) == {}
    (sample,) = load_task(own(tmp_path, {"messages": answered})).samples
    assert sample.prompt == messages
    assert sample.references == ("Hi",)


def test_own_file_with_references(tmp_path):
    path = own(
        tmp_path,
        {"prompt": "1", "reference": "a b", "id": "first", "category": "x"},
        {"prompt": "2", "references": ["c", "d"]},
        {"prompt": "3", "completion": "e f"},
        {"prompt": "4"},
    )
    task = load_task(path)
    assert (task.samples[0].id, task.samples[0].category) == ("first", "x")
    # One exact, one of several, one of two words, and the last does not count
    found = task.quality(["a b", "d", "e", "?"])
    assert found["exact_match"] == 2 / 3
    assert found["rouge1"] == pytest.approx((1 + 1 + 2 / 3) / 3)


def test_text_file_has_a_prompt_a_paragraph(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("one\ntwo\n\nthree\n")
    assert [sample.prompt for sample in load_task(str(path)).samples] == ["one\ntwo", "three"]
    path.write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n")
    assert [sample.prompt for sample in load_task(str(path)).samples] == ["one\ntwo", "three"]
    assert len(load_task(str(path), samples=1).samples) == 1


def test_bad_requests_say_what_is_wrong(data):
    for name, options, message in (
        ("nonsense", {}, "is no file and no task; the tasks are topv2"),
        ("humaneval", {"n_shot": 1}, "humaneval takes no shots"),
        ("humaneval", {}, "allow it with --allow-code-execution"),
        ("gsm8k", {"n_shot": 7}, "gsm8k has 6 examples to show"),
        ("gsm8k", {"n_shot": -1}, "cannot be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            load_task(name, data=data, **options)


def test_bad_own_files_are_named_by_their_line(tmp_path):
    for rows, options, message in (
        ([], {}, "holds no prompts"),
        ([{"prompt": "x"}, {"question": "x"}], {}, r"mine.jsonl:2 needs `prompt`"),
        ([{"prompt": ["x"]}], {}, "needs `prompt`"),
        ([{"prompt": "x", "reference": 7}], {}, "mine.jsonl:1 has references that are no texts"),
        ([{"prompt": "x"}], {"n_shot": 1}, "shots are for named tasks"),
    ):
        with pytest.raises(ValueError, match=message):
            load_task(own(tmp_path, *rows), **options)


def test_answers_and_prompts_have_to_match():
    task = Task(name="x", samples=(Sample(id="1", prompt="p"),), max_new_tokens=1)
    with pytest.raises(ValueError, match="2 answers to 1 prompts"):
        task.quality(["a", "b"])
    assert dataclasses.replace(task, stop=("END",)).quality(["a"]) == {}
