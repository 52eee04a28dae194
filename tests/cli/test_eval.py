"""`layerskip eval` on a tiny checkpoint and local task files."""

import json
import sys

import pytest

import tiny_tasks
from layerskip.cli import eval as evaluate

pytestmark = pytest.mark.filterwarnings("ignore:::lm_eval", "ignore:::datasets", "ignore:::dill")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return tiny_tasks.write(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("Some words that are to be predicted, one after the other.")
    return file


def test_one_document_with_tasks_and_perplexity_at_every_exit(run, tasks, text, tmp_path):
    arguments = ["--tasks", "tiny_choice,tiny_writing", "--include-path", tasks, "--json"]
    arguments += ["--perplexity", text, "--exit-layers", "1,4", "--plot", tmp_path / "exits.png"]
    arguments += ["--mode", "early-exit", "--mode", "plain", "--limit", "2", "--num-fewshot", "1"]
    status, out, err = run("eval", *arguments, "--apply-chat-template")
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert set(result) == {
        *("environment", "model", "layers", "seed", "tasks", "interrupted", "rows"),
    }
    assert result["interrupted"] is False
    assert result["environment"]["dtype"] == "float32"
    assert result["tasks"]["tiny_choice"] == {"documents": 2, "num_fewshot": 1}
    early, last, plain = result["rows"]
    assert [row["exit_layer"] for row in result["rows"]] == [1, 4, None]
    assert set(plain["results"]) == {"text.txt", "tiny_choice", "tiny_writing"}
    assert set(plain["results"]["tiny_choice"]["acc"]) == {"value", "stderr", "higher_is_better"}
    assert last["results"] == plain["results"]
    assert early["results"]["text.txt"] != plain["results"]["text.txt"]
    assert (tmp_path / "exits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("ending", "status"), [(KeyboardInterrupt, 130), (MemoryError, 1)])
def test_what_ends_it_leaves_what_there_is(run, text, tmp_path, raise_at, ending, status):
    other, output = tmp_path / "other.txt", tmp_path / "result.json"
    other.write_text("Other words to be predicted.")
    raise_at(evaluate, "perplexity", 2, ending)
    flags = ("--perplexity", text, "--perplexity", other, "--exit-layers", 2, "--output", output)
    got, out, err = run("eval", *flags)
    assert (got, err.strip().count("\n")) == (status, 0)
    assert "token_perplexity" in out
    result = json.loads(output.read_text())
    assert result["interrupted"] is True
    assert [list(row["results"]) for row in result["rows"]] == [["text.txt"]]


def test_a_task_that_was_interrupted_leaves_its_facts(run, tasks, tmp_path, raise_at):
    import lm_eval

    output = tmp_path / "result.json"
    raise_at(lm_eval, "evaluate", 2, KeyboardInterrupt)
    flags = ("--tasks", "tiny_choice", "--include-path", tasks, "--limit", 2, "--output", output)
    status, _, _ = run("eval", *flags, "--exit-layers", "1,2")
    result = json.loads(output.read_text())
    assert (status, result["interrupted"]) == (130, True)
    assert [list(row["results"]) for row in result["rows"]] == [["tiny_choice"], []]
    assert result["tasks"] == {"tiny_choice": {"documents": 2, "num_fewshot": 0}}


def test_a_result_that_cannot_be_written_costs_no_picture(run, text, tmp_path, raise_at):
    plot = tmp_path / "exits.png"
    raise_at(evaluate, "deliver", 1, OSError("No space left on device"))
    status, out, err = run("eval", "--perplexity", text, "--exit-layers", 2, "--plot", plot)
    assert (status, "No space left" in err, "token_perplexity" in out) == (1, True, True)
    assert plot.exists()


def test_table_over_all_exits(run, text, tmp_path):
    output = tmp_path / "result.json"
    arguments = ["--perplexity", text, "--exit-layers", "all", "--window", "8", "--output", output]
    status, out, err = run("eval", *arguments)
    assert (status, err) == (0, "")
    assert [line.split("│")[4].strip() for line in out.splitlines() if "│" in line][:4] == [*"1234"]
    assert "token_perplexity ↓" in out
    assert len(json.loads(output.read_text())["rows"]) == 4


def test_flags_that_change_nothing_are_named(run, text):
    for flags, said in (
        (["--draft-tokens", 4], "--draft-tokens has no effect: no --mode here drafts"),
        (["--mode", "plain", "--exit-layers", 2], "--exit-layers has no effect: plain decoding"),
        (["--seed", 3], "--seed has no effect: there are no --tasks"),
        (
            ["--mode", "self-speculative", "--draft-from", "n-gram", "--exit-layers", 2],
            "--exit-layers has no effect: drafts from n-grams have no exit",
        ),
    ):
        status, _, err = run("eval", "--perplexity", text, "--window", 8, *flags)
        assert (status, err.count("\n")) == (0, 1)
        assert err.startswith(f"layerskip: {said}")


def test_names_are_shown_as_they_are(run, tmp_path):
    file = tmp_path / "notes[draft].txt"
    file.write_text("Some words.")
    assert "notes[draft].txt" in run("eval", "--perplexity", file, "--window", 8)[1]


def test_early_exit_has_quarters_of_the_layers_by_default(run, text):
    _, out, _ = run("eval", "--perplexity", text, "--max-words", "3", "--json")
    rows = json.loads(out)["rows"]
    assert [(row["mode"], row["exit_layer"]) for row in rows] == [
        ("early-exit", e) for e in (1, 2, 3, 4)
    ]


def test_bad_input_is_one_line(run, text, tasks):
    for arguments, status, words in (
        ([], 2, "give --tasks or --perplexity"),
        (["--perplexity", "no.txt"], 1, "no.txt cannot be read"),
        (["--perplexity", "TEXT", "--exit-layers", "9"], 1, "exit layer 9 is out of range"),
        (["--perplexity", "TEXT", "--plot", "/nowhere/x.png"], 2, "folder of --plot"),
        (["--perplexity", "TEXT", "--window", "4", "--stride", "5"], 2, "--stride 5 is more"),
        (["--tasks", "unsafe", "--include-path", "TASKS"], 1, "would run generated code"),
        (["--tasks", "broken", "--include-path", "TASKS"], 1, "give task files with local data"),
    ):
        choice = (tasks / "choice.yaml").read_text()
        broken = choice.replace("tiny_choice", "broken").replace("rows.json", "no_rows.json")
        (tasks / "broken.yaml").write_text(broken)
        (tasks / "unsafe.yaml").write_text(
            choice.replace("tiny_choice", "unsafe") + "unsafe_code: true\n"
        )
        given = {"TEXT": text, "TASKS": tasks}
        found, out, err = run("eval", *(given.get(a, a) for a in arguments))
        assert (found, out) == (status, "")
        assert words in err
        assert len(err.splitlines()) == 1


def test_missing_extra_is_named(run, monkeypatch):
    for name in ("lm_eval", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("layerskip.bench.harness", "layerskip.bench.harness_tasks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    status, out, err = run("eval", "--tasks", "x")
    assert (status, out) == (1, "")
    assert "pip install 'layerskip[eval]'" in err
    assert len(err.splitlines()) == 1


@pytest.mark.long
def test_unknown_task_is_named_after_the_harness_was_asked(run, tasks):
    status, _, err = run("eval", "--tasks", "tiny_choice,no_task", "--include-path", tasks)
    assert status == 1
    assert "unknown tasks: no_task;" in err
