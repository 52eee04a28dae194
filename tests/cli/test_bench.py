"""`layerskip bench` on a tiny checkpoint and prompts of our own."""

import dataclasses
import json
import shutil

import pytest

from layerskip.bench.baselines import BASELINES
from layerskip.bench.systems import LayerSkipSystem
from layerskip.bench.tasks import Task
from layerskip.decoding.config import MAX_ADAPTIVE_DRAFT_TOKENS

FLAGS = ("--max-new-tokens", 10, "--draft-tokens", "2,3", "--exit-layers", "2,3")
CONTRACT = """
    system mode exit_layer draft_tokens tokens_per_s ms_per_token speedup acceptance_rate
    mean_accepted_length identical_to_plain quality peak_memory_bytes
""".split()  # noqa: SIM905


@pytest.fixture(autouse=True)
def known_bandwidth(monkeypatch):
    """Reading gigabytes is not what is tested here."""
    monkeypatch.setattr("layerskip.bench.bench.read_bandwidth", lambda device: 1e9)


@pytest.fixture
def prompts(tmp_path):
    rows = [
        {"prompt": "abc", "reference": "x", "category": "letters"},
        {"prompt": "What is two and two?", "reference": "4", "category": "numbers"},
        {"prompt": "z" * 600, "reference": "", "category": "letters"},  # longer than the context
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_task_that_is_not_there_is_told_before_a_model_is_loaded(run, monkeypatch):
    monkeypatch.setattr(
        "layerskip.cli.config_flags.load_model", lambda flags: pytest.fail("loaded")
    )
    for command, flag in (("bench", "--task"), ("tune", "--data")):
        status, _, err = run(command, flag, "humanevil")
        assert status == 1
        assert "'humanevil' is no file and no task; the tasks are topv2" in err


def test_generated_code_needs_consent_before_a_model_is_loaded(run, monkeypatch):
    def load_model(flags):
        raise ValueError("loading")

    monkeypatch.setattr("layerskip.cli.config_flags.load_model", load_model)
    status, _, err = run("bench", "--task", "humaneval")
    assert status == 1
    assert "allow it with --allow-code-execution" in err
    assert len(err.splitlines()) == 1
    for flag in ("--allow-code-execution", "--ignore-eos"):
        assert "loading" in run("bench", "--task", "humaneval", flag)[2]


@pytest.mark.parametrize("isolation", ["bubblewrap", "rlimits"])
def test_the_isolation_of_generated_code_is_reported(run, prompts, isolation, monkeypatch):
    if isolation == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap (bwrap) is not installed")
    monkeypatch.setattr("layerskip.bench.sandbox.isolation", lambda: isolation)
    row = {"prompt": "def f():", "test": "def check(f): f()", "entry_point": "f"}
    folder = prompts.parent / "humaneval"
    folder.mkdir()
    (folder / "HumanEval.jsonl").write_text(json.dumps(row))
    monkeypatch.setenv("LAYERSKIP_DATA", str(prompts.parent))
    flags = ("--allow-code-execution", "--max-new-tokens", 2, "--modes", "plain", "--json")
    status, out, err = run("bench", "--task", "humaneval", *flags)
    assert status == 0
    document = json.loads(out)
    assert document["code_execution"] == isolation
    assert document["rows"][0]["quality"] == {"pass@1": 0.0}
    assert ("no security boundary" in err) == (isolation == "rlimits")


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        ("--modes auto --draft-tokens 2 --exit-layers 2 --gguf-weights f16", 3),
        ("--modes self-speculative --draft-from n-gram --adaptive --exit-layers 2", 2),
    ],
)
def test_flags_that_change_nothing_are_named(run, prompts, flags, idle):
    status, _, err = run("bench", "--task", prompts, "--max-new-tokens", 2, *flags.split())
    assert status == 0
    named = [line.split()[1] for line in err.splitlines()]
    asked = [flag for flag in flags.split() if flag.startswith("--")]
    assert sorted(named) == sorted(asked[-idle:])


def test_one_document_with_the_rows_of_the_contract(run, prompts):
    status, out, err = run("bench", "--task", prompts, "--json", "--seed", 3, *FLAGS)
    assert err == ""
    assert status == 0
    document = json.loads(out)
    assert (document["samples"], document["skipped_too_long"], document["seed"]) == (2, 1, 3)
    assert document["environment"]["dtype"] == "float32"
    rows = document["rows"]
    assert [(r["mode"], r["exit_layer"], r["draft_tokens"]) for r in rows] == [
        ("plain", None, None),
        ("early-exit", 2, None),
        ("early-exit", 3, None),
        ("self-speculative", 2, 2),
        ("self-speculative", 2, 3),
        ("self-speculative", 3, 2),
        ("self-speculative", 3, 3),
        ("auto", None, MAX_ADAPTIVE_DRAFT_TOKENS),
    ]
    for row in rows:
        assert not [name for name in CONTRACT if name not in row]
        assert row["system"] == "layerskip"
        assert set(row["categories"]) == {"letters", "numbers"}
        if row["mode"] != "early-exit":
            assert row["identical_to_plain"] == 1.0  # float32: to the token
    assert rows[0]["speedup"] == 1.0
    assert document["ceiling_tokens_per_s"] == pytest.approx(1e9 / document["weight_bytes"])
    drafting = rows[3]
    assert drafting["mean_accepted_length"] * drafting["rounds"] == drafting["new_tokens"] - 2


def test_flags_reach_the_rows(run, prompts):
    flags = ("--modes", "self-speculative", *FLAGS, "--exit-layers", 2, "--draft-tokens", 2)
    more = ("--draft-from", "both", "--draft-vocabulary", 20, "--adaptive", "--ablation")
    status, out, _ = run("bench", "--task", prompts, "--json", *flags, *more)
    assert status == 0
    names = ("draft_from", "draft_vocabulary", "adaptive", "draft_tokens", "label")
    assert [[row[name] for name in names] for row in json.loads(out)["rows"][1:]] == [
        ["both", None, False, 2, None],
        ["both", 20, False, 2, None],
        ["both", None, True, MAX_ADAPTIVE_DRAFT_TOKENS, None],
        ["n-gram", None, False, 5, "without adaptive"],  # auto has n-grams alone here
    ]


def test_sampled_answers_are_repeatable_and_not_compared(run, prompts):
    def document(*more):
        flags = ("--modes", "self-speculative", *FLAGS, "--temperature", 1.3, "--top-k", 9, *more)
        status, out, err = run("bench", "--task", prompts, "--json", *flags)
        assert (status, err) == (0, "")
        return json.loads(out)

    found = document()
    assert found["sampling"] == {
        "temperature": 1.3,
        "top_k": 9,
        "top_p": None,
        "min_p": None,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
    }
    for row in found["rows"]:
        assert row["identical_to_plain"] is None
        assert [part["identical_to_plain"] for part in row["categories"].values()] == [None] * 2
        assert row["speedup"] > 0
    counts = [[row["accepted_by_position"] for row in d["rows"]] for d in (found, document())]
    assert (
        counts[0]
        == counts[1]
        != [row["accepted_by_position"] for row in document("--seed", 1)["rows"]]
    )


def test_sampling_and_what_does_not_go_with_it(run, prompts):
    status, _, err = run("bench", "--task", prompts, "--temperature", 1, "--peers", "transformers")
    assert (status, err.count("other systems answer greedily here")) == (2, 1)
    small = ("--max-new-tokens", 2, "--modes", "plain")
    status, out, err = run("bench", "--task", prompts, "--top-p", 0.5, *small)
    assert (status, err.split()[:5]) == (0, ["layerskip:", "--top-p", "has", "no", "effect:"])
    assert "2 new tokens, greedy, batch 1" in " ".join(out.split())


def test_flags_reach_the_prompts(run, monkeypatch):
    asked = []

    def load_task(name, **options):
        asked.append((name, options))
        raise ValueError("seen")

    monkeypatch.setattr("layerskip.cli.bench.load_task", load_task)
    monkeypatch.setattr("layerskip.cli.bench.check_task", lambda name, **options: None)
    flags = ("--n-shot", 2, "--seed", 7, "--samples", 9)
    assert run("bench", "--task", "topv2", *flags)[0] == 1
    [(name, options)] = asked
    assert (name, options["n_shot"], options["seed"], options["samples"]) == ("topv2", 2, 7, 9)


@pytest.mark.parametrize("when", ["answering", "scoring"])
def test_an_interrupt_loses_nothing(run, prompts, when, tmp_path, raise_at):
    call = {"answering": (LayerSkipSystem, "answer", 6), "scoring": (Task, "quality", 1)}[when]
    raise_at(*call, KeyboardInterrupt)
    file = tmp_path / "bench.json"
    flags = ("--modes", "plain,self-speculative", *FLAGS, "--exit-layers", 2, "--draft-tokens", 2)
    status, out, err = run("bench", "--task", prompts, "--output", file, *flags)
    assert (status, err.strip()) == (130, "layerskip: interrupted")
    document = json.loads(file.read_text())
    assert document["interrupted"] is True
    assert document["samples"] == (1 if when == "answering" else 2)
    assert document["skipped_too_long"] == 1
    assert [row["quality"] for row in document["rows"]] == [{}, {}]
    assert document["rows"][0]["new_tokens"] > 0
    assert "interrupted: the prompts answered so far, not scored" in " ".join(out.split())


def test_quantized_weights(run, prompts):
    weights = "int8"
    flags = ("--modes", "plain,self-speculative", "--weights", weights, *FLAGS)
    status, out, _ = run("bench", "--task", prompts, "--json", *flags)
    assert status == 0
    document = json.loads(out)
    assert document["environment"]["weights"] == weights
    assert [row["identical_to_plain"] for row in document["rows"]] == [1.0] * len(document["rows"])


def test_table_report_and_file(run, prompts, tmp_path):
    output, report = tmp_path / "r.json", tmp_path / "report"
    flags = ("--output", output, "--report", report, "--repeats", 2, "--ignore-eos")
    status, out, err = run(
        "bench", "--task", prompts, "--samples", 2, "--modes", "plain", *flags, *FLAGS
    )
    assert status == 0
    assert [line.split()[1] for line in err.splitlines()] == ["--draft-tokens", "--exit-layers"]
    assert "plain" in out
    assert "read bandwidth" in " ".join(out.split())
    document = json.loads(output.read_text())
    assert [row["mode"] for row in document["rows"]] == ["plain"]
    # Both answers of 10 tokens, whatever they are, and no judgement of their text.
    row = document["rows"][0]
    assert row["new_tokens"] == 10 * document["samples"]
    assert row["quality"] == {}
    assert "# Benchmark of" in (report / "report.md").read_text()


def test_a_terminal_obeys_no_category(run, tmp_path):
    names = ("\x1b]52;c;x\x07", "[/b]")
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "abc", "category": name}) for name in names))
    flags = ("--modes", "plain", "--max-new-tokens", 3)
    status, out, err = run("bench", "--task", path, *flags)
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    assert "\\x1b]52;c;x\\x07" in out
    assert "[/b]" in out


def test_peers_stand_beside_our_rows(run, prompts, monkeypatch):
    """transformers really runs; llama.cpp is taken for absent, which is rows all the same."""
    absent = dataclasses.replace(BASELINES["llama.cpp"], package="no_such_package")
    monkeypatch.setitem(BASELINES, "llama.cpp", absent)
    flags = ("--peers", "transformers,llama.cpp", "--samples", 1, "--modes", "self-speculative")
    small = ("--max-new-tokens", 6, "--draft-tokens", 2, "--exit-layers", 3)
    status, out, err = run("bench", "--task", prompts, "--json", *flags, *small)
    assert status == 0
    rows = json.loads(out)["rows"]
    assert err.count("layerskip: not measured: ") == 5
    named = [(row["system"], row["mode"]) for row in rows]
    assert named == [
        ("layerskip", "plain"),
        ("layerskip", "self-speculative"),
        ("transformers", "plain"),
        ("transformers", "self-speculative"),
        ("transformers", "self-speculative"),  # as it does unless told otherwise
        ("transformers", "prompt-lookup"),
        ("llama.cpp", "plain"),
        ("llama.cpp", "prompt-lookup"),
        ("llama.cpp", "prompt-lookup"),
        ("llama.cpp", "ngram-mod"),
        ("llama.cpp", "ngram-map-k"),
    ]
    for row in rows[2:6]:
        assert "error" not in row
        assert row["identical_to_layerskip_plain"] == 1.0
    assert rows[2]["speedup"] == 1.0
    assert all("is not installed" in row["error"] for row in rows[6:])


def test_bad_input_is_one_clear_line(run, prompts):
    for arguments, status, words in (
        (["--modes", "fast"], 2, "'fast' is not one of"),
        (["--exit-layers", "9"], 1, "exit layer 9 is out of range: this model has 1 to 4"),
        (["--max-new-tokens", "4000"], 1, "no prompt of"),
    ):
        got, out, err = run("bench", "--task", prompts, *arguments)
        assert (got, out) == (status, "")
        assert words in err
        assert err.count("\n") == 1


def test_a_task_is_needed(run):
    status, _, err = run("bench")
    assert status == 2
    assert "--task" in err


def what_a_failure_leaves(run, prompts, tmp_path, said):
    """The document of a run that ends with these words."""
    file = tmp_path / "bench.json"
    flags = ("--modes", "plain", "--max-new-tokens", 4, "--output", file)
    status, _, err = run("bench", "--task", prompts, *flags)
    assert (status, err.strip()) == (1, f"layerskip: {said}")
    return json.loads(file.read_text())


def test_answers_that_cannot_be_judged_are_kept_and_it_is_said(run, prompts, tmp_path, monkeypatch):
    def fails(self, answers):
        raise RuntimeError("no judge today")

    monkeypatch.setattr(Task, "quality", fails)
    said = "could not score the answers (RuntimeError: no judge today)"
    document = what_a_failure_leaves(run, prompts, tmp_path, said)
    assert document["not_scored"] == "RuntimeError: no judge today"
    assert not document["interrupted"]
    assert document["rows"][0]["new_tokens"] > 0


def test_an_error_leaves_what_was_measured(run, prompts, tmp_path, raise_at):
    # After a warm-up and the first prompt.
    raise_at(LayerSkipSystem, "answer", 3, MemoryError("no room"))
    said = "measuring ended early (MemoryError: no room)"
    document = what_a_failure_leaves(run, prompts, tmp_path, said)
    assert (document["interrupted"], document["samples"]) == (True, 1)
