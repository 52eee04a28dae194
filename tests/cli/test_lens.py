"""`layerskip lens`: one document, files, tables that fit, rounds, and bad input."""

import importlib.util
import io
import json
import sys

import pytest

import layerskip.cli.lens as lens_command
from layerskip.lens import lens as lens_module

SHORT = ("--max-new-tokens", 6)
SPECULATIVE = ("--mode", "self-speculative", "--exit-layer", 3, "--draft-tokens", 2)


def test_json_is_one_document(run):
    status, out, err = run("lens", "--prompt", "abc", *SHORT, *SPECULATIVE, "--json")
    result = json.loads(out)
    assert (status, err) == (0, "")
    assert list(result) == [
        "model", "token_ids", "prompt_tokens", "generation", "rounds", "agreement", "positions",
    ]  # fmt: skip
    made = result["generation"]
    assert result["token_ids"][3:] == made["token_ids"]
    assert len(result["rounds"]) == made["rounds"]
    assert [place["position"] for place in result["positions"]] == list(range(1, 9))
    for place in result["positions"]:
        layers = place["layers"]
        assert [layer["exit_layer"] for layer in layers] == [1, 2, 3, 4]
        last = layers[-1]["top"][0]["token_id"]
        if place["in_answer"]:
            assert last == place["token_id"]
        saturated = place["saturation_layer"]
        assert place["settled_layer"] == saturated  # the older name
        above = [layer["agrees"] for layer in layers if layer["exit_layer"] >= saturated]
        assert all(above)
        assert saturated == 1 or not layers[saturated - 2]["agrees"]
    answer = [place for place in result["positions"] if place["in_answer"]]
    for layer in result["agreement"]["layers"]:
        e = layer["exit_layer"]
        agreeing = sum(place["layers"][e - 1]["agrees"] for place in answer)
        assert layer["agreement"] == agreeing / len(answer)


def test_files(run, tmp_path):
    page, picture, document = (tmp_path / name for name in ("a.html", "a.png", "a.json"))
    files = ("--html", page, "--png", picture, "--output", document)
    status, out, err = run("lens", "--prompt", "abc", *SHORT, "--positions", "2-4", *files)
    assert (status, err) == (0, "")
    assert page.read_text().startswith("<!doctype html>")
    assert picture.read_bytes().startswith(b"\x89PNG")
    positions = json.loads(document.read_text())["positions"]
    assert [place["position"] for place in positions] == [2, 3, 4]
    assert "layer" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.json", "a.png"]


@pytest.mark.parametrize("columns", [40, 200])
def test_table_fits_the_terminal(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    status, out, _ = run("lens", "--prompt", "abc", "--max-new-tokens", 20)
    assert status == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= columns
    assert [line.split()[0] for line in lines[2:6]] == ["4", "3", "2", "1"]
    shown = len(lines[0].split())
    assert shown == min(20, max(1, (columns - 16) // 10))
    assert ("--positions" in out) == (shown < 20)


@pytest.mark.parametrize("no_color", ["", "1"])
def test_what_has_saturated_is_told_where_colours_are_off(run, monkeypatch, no_color):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", no_color)
    _, out, _ = run("lens", "--prompt", "abc", *SHORT)
    assert ("= saturated" in out) == bool(no_color)


def test_positions_asked_for_are_all_shown(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = run("lens", "--prompt", "abc", "--max-new-tokens", 10, "--positions", "all")
    headings = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()]
    rows = [words for words in headings if all(word.isdigit() for word in words)]
    assert [int(word) for words in rows for word in words] == list(range(1, 13))


def test_layers(run):
    _, out, _ = run("lens", "--prompt", "abc", *SHORT, "--layers", "1,2-3", "--json")
    layers = json.loads(out)["positions"][0]["layers"]
    assert [layer["exit_layer"] for layer in layers] == [1, 2, 3, 4]
    _, out, _ = run("lens", "--prompt", "abc", *SHORT, "--layers", "2", "--json")
    result = json.loads(out)
    assert {place["saturation_layer"] for place in result["positions"]} <= {2, 4}
    assert [layer["exit_layer"] for layer in result["agreement"]["layers"]] == [2, 4]


def test_a_given_continuation(run):
    _, out, _ = run("lens", "--prompt", "abc", "--continuation", "de", "--json")
    result = json.loads(out)
    assert result["generation"] is None
    assert [place["symbol"] for place in result["positions"]] == ["b", "c", "d", "e"]


def test_prompt_from_standard_input(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("abcd\n"))
    _, out, _ = run("lens", *SHORT, "--json")
    assert json.loads(out)["prompt_tokens"] == 4


def test_rounds_are_printed(run):
    _, out, _ = run("lens", "--prompt", "abc", *SHORT, *SPECULATIVE)
    _, document, _ = run("lens", "--prompt", "abc", *SHORT, *SPECULATIVE, "--json")
    made = json.loads(document)["generation"]
    text = " ".join(out.split())
    rounds = f"{made['rounds']} rounds, E=3, d=2, drafts of layers 1 to 3:"
    assert f"{rounds} {made['accepted']} of {made['drafted']}" in text
    assert "E 3" in text


def test_prompts_that_cannot_be_answered_are_left_out(run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("abc", "x" * 2000, "de")))
    status, _, err = run("lens", "--data", file, *SHORT, "--json")
    assert status == 0
    assert "1 prompts were left out; the last: " in err
    assert "shorten the prompt" in err
    file.write_text(json.dumps({"prompt": "x" * 2000}) + "\n")
    status, _, err = run("lens", "--data", file, *SHORT, "--json")
    assert (status, "shorten the prompt" in err) == (1, True)


def test_agreement_over_a_file_of_prompts(run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\nhello\nnever looked at\n")
    files = ("--html", tmp_path / "a.html", "--png", tmp_path / "a.png")
    flags = ("--data", prompts, "--samples", 2, *SHORT)
    status, out, _ = run("lens", *flags, *files, "--json")
    assert status == 0
    total = json.loads(out)["agreement"]
    assert total["prompts"] == 2
    alone = []
    for prompt in ("abc", "hello"):
        _, document, _ = run("lens", "--prompt", prompt, *SHORT, "--json")
        alone.append(json.loads(document)["agreement"])
    assert total["positions"] == sum(one["positions"] for one in alone)
    for i, layer in enumerate(total["layers"]):
        agreeing = sum(one["layers"][i]["agreement"] * one["positions"] for one in alone)
        assert layer["agreement"] == pytest.approx(agreeing / total["positions"])
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    _, table, _ = run("lens", *flags)
    assert "2 prompts" in table


def test_bad_input(run):
    for flags, status, words in (
        (("--layers", "5-3"), 2, "is not a list of layers"),
        (("--layers", "9"), 1, "this model has 1 to 4"),
        (("--positions", "0-3"), 2, "neither 'all' nor positions"),
        (("--positions", "50-60"), 1, "positions 50 to 60 are not there"),
        (("--continuation", ""), 1, "the answer is empty"),
        (("--continuation", "x", "--exit-layer", "2"), 2, "--exit-layer would have no effect"),
        (("--samples", "2"), 2, "--samples needs --data"),
        (("--data", __file__), 2, "--data excludes --prompt"),
    ):
        short = () if "--continuation" in flags else SHORT
        result, out, err = run("lens", "--prompt", "abc", *short, *flags)
        assert (result, out) == (status, "")
        assert words in err
        assert len(err.splitlines()) == 1


def test_a_picture_without_matplotlib_says_what_to_install(run, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    status, _, err = run("lens", "--prompt", "abc", "--png", tmp_path / "a.png")
    assert status == 1
    assert "pip install 'layerskip[plot]'" in err


def test_where_drafts_come_from_is_heeded(run):
    drafting = ("--mode", "self-speculative", "--draft-from", "n-gram", "--json")
    status, out, _ = run("lens", "--prompt", "abcabc", *SHORT, *drafting)
    assert status == 0
    assert json.loads(out)["generation"]["exit_layer"] is None
    _, out, _ = run("lens", "--prompt", "abcabc", *SHORT, *drafting[:-1])
    assert "E=" not in out
    assert "rounds, d=" in out


def test_an_answer_is_looked_at_in_a_cache_as_large_as_it_was_made_in(run, monkeypatch):
    """Some rotary embeddings turn by how long a text may become."""
    capacities, walk = [], lens_module.iter_exit_hidden_states

    def seen(decoder, tokens, exits, capacity):
        capacities.append(capacity)
        return walk(decoder, tokens, exits, capacity)

    monkeypatch.setattr(lens_module, "iter_exit_hidden_states", seen)
    assert run("lens", "--prompt", "abc", "--max-new-tokens", 12)[0] == 0
    assert run("lens", "--prompt", "abc", "--continuation", "de")[0] == 0
    assert capacities == [3 + 12 - 1, None]


def test_ctrl_c_leaves_what_was_looked_at(run, tmp_path, raise_at):
    file, output = tmp_path / "prompts.txt", tmp_path / "lens.json"
    file.write_text("abc\nde\nfgh\n")
    raise_at(lens_command, "_look", 3, KeyboardInterrupt)
    status, out, err = run("lens", "--data", file, *SHORT, "--output", output)
    assert (status, err.strip()) == (130, "layerskip: interrupted")
    assert "2 prompts" in out
    document = json.loads(output.read_text())
    assert (document["agreement"]["prompts"], document["interrupted"]) == (2, True)
