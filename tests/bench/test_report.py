"""Tables, pictures and the report, from a document written by hand."""

import copy

import pytest

from layerskip.bench.report import (
    as_text,
    categories,
    conditions,
    draw_by_group,
    markdown,
    markdown_table,
    table,
    write_report,
)


def a_row(mode, **figures):
    return {
        "system": "layerskip",
        "mode": mode,
        "exit_layer": None,
        "draft_tokens": None,
        "draft_from": None,
        "adaptive": False,
        "draft_vocabulary": None,
        "tokens_per_s": 50.0,
        "ms_per_token_median": 20.0,
        "ttft_s": 0.0504,
        "speedup": 1.0,
        "speedup_interval": [1.0, 1.0],
        "speedup_mean_of_prompts": 1.0,
        "acceptance_rate": None,
        "accepted_by_position": [],
        "mean_accepted_length": None,
        "identical_to_plain": 1.0,
        "quality": {"exact_match": 0.8},
        "peak_memory_bytes": 700 * 2**20,
        "share_of_bandwidth": 0.5,
        **figures,
    }


DRAFTING = {
    "exit_layer": 8,
    "draft_tokens": 2,
    "draft_from": "early-exit",
    "tokens_per_s": 81.25,
    "speedup": 1.625,
    "speedup_interval": [1.5, 1.75],
    "acceptance_rate": 0.705,
    "accepted_by_position": [0.8, 0.6],
    "mean_accepted_length": 2.4,
}
DOCUMENT = {
    "environment": {
        "device": "cpu",
        "threads": 2,
        "dtype": "bfloat16",
        "weights": "16bit",
        "cpu": "A Processor",
        "cpu_capability": "AVX512",
        "system": "Linux x86_64",
        "date": "2026-01-02",
        "layerskip": "0.1",
        "torch": "2.13",
    },
    "model": "mine",
    "n_layers": 30,
    "task": "topv2",
    "samples": 3,
    "skipped_too_long": 0,
    "interrupted": False,
    "prompt_tokens_mean": 12.0,
    "max_new_tokens": 64,
    "ignore_eos": False,
    "repeats": 2,
    "read_bandwidth_bytes_per_s": 27e9,
    "ceiling_tokens_per_s": 100.4,
    "gguf_weights": None,
    "rows": [
        a_row("plain"),
        a_row("early-exit", exit_layer=8, quality={"exact_match": 0.25}, speedup=3.0),
        a_row("self-speculative", **DRAFTING),
    ],
}


def with_peer():
    document = copy.deepcopy(DOCUMENT)
    document["gguf_weights"] = "bf16"
    peer = {"system": "llama.cpp", "mode": "prompt-lookup", "error": "no such luck"}
    nothing = {"exit_layer": None, "draft_tokens": None, "draft_from": None, "adaptive": False}
    nothing["draft_vocabulary"] = None
    document["rows"] += [
        a_row("plain", system="llama.cpp", vs_layerskip_plain=0.9),
        {**peer, **nothing},
    ]
    return document


def column(lines, heading):
    return [line[lines[0].index(heading)] for line in lines[1:]]


def test_table_shows_the_figures_of_the_document():
    lines = table(DOCUMENT)
    assert column(lines, "mode") == ["plain", "early-exit E=8", "self-speculative E=8 d=2"]
    assert column(lines, "tokens/s") == ["50.0", "50.0", "81.2"]
    assert column(lines, "speedup (95%)") == ["1.00x", "3.00x (1.00-1.00)", "1.62x (1.50-1.75)"]
    assert column(lines, "accepted") == ["", "", "70%"]
    assert column(lines, "tokens a round") == ["", "", "2.40"]
    assert column(lines, "exact match") == ["0.800", "0.250", "0.800"]
    assert column(lines, "peak memory") == ["700 MiB"] * 3
    assert column(lines, "first token") == ["50 ms"] * 3
    assert "vs layerskip" not in lines[0]  # nothing to say
    assert len({len(line) for line in lines}) == 1


def test_a_terminal_shows_less_and_one_system_at_a_time():
    lines = table(with_peer(), brief_of="llama.cpp")
    assert column(lines, "mode") == ["plain"]
    assert column(lines, "vs layerskip") == ["0.90x"]
    lines = table(with_peer(), brief_of="layerskip")
    assert len(lines) == 4
    assert not {"peak memory", "vs layerskip"} & set(lines[0])


def test_names_of_rows():
    for figures, name in (
        ({"draft_from": "both"}, "self-speculative E=8 d=2 both"),
        ({"adaptive": True, "draft_tokens": 12}, "self-speculative E=8 d=12 adaptive"),
        ({"draft_vocabulary": 4000}, "self-speculative E=8 d=2 V=4000"),
        ({"mode": "n-gram", "draft_from": "n-gram", "exit_layer": None}, "n-gram d=2"),
        ({"mode": "auto", "label": "without n-grams"}, "auto without n-grams"),
    ):
        row = a_row(**{"mode": "self-speculative", **DRAFTING, **figures})
        assert column(table({**DOCUMENT, "rows": [row]}), "mode") == [name]


def test_categories():
    document = copy.deepcopy(DOCUMENT)
    assert categories(document) == [["mode"]]
    document["rows"][2]["categories"] = {
        "qa": {"speedup": 1.5, "acceptance_rate": 0.5},
        "chat": {"speedup": None, "acceptance_rate": None},
    }
    assert categories(document) == [
        ["mode", "qa", "chat"],
        ["self-speculative E=8 d=2", "1.50x (50%)", ""],
    ]


def test_conditions_name_what_was_left_out():
    document = {**DOCUMENT, "skipped_too_long": 4, "ignore_eos": True}
    text = "; ".join(conditions(document))
    assert "4 prompts too long for the context left out" in text
    assert "are not scored" in text
    assert "27 GB/s: at most 100 tokens/s plain" in text


def test_the_report_refers_to_pictures_that_are_there(tmp_path):
    written = write_report(with_peer(), tmp_path / "new")
    text = written.read_text()
    pictures = {"speedup.png", "acceptance.png", "quality.png"}
    assert {path.name for path in written.parent.iterdir()} == pictures | {"report.md"}
    for picture in pictures:
        assert f"]({picture})" in text
        assert (written.parent / picture).read_bytes().startswith(b"\x89PNG")
    assert "| self-speculative E=8 d=2 | " in text.replace("layerskip self", "self")
    assert "llama.cpp prompt-lookup: no such luck" in text
    assert "llama.cpp on bf16 weights" in text
    write_report(with_peer(), tmp_path / "new")  # over the old one


def test_a_report_does_not_write_through_links_out_of_its_folder(tmp_path):
    private = tmp_path / "private"
    private.write_text("as it was")
    for name in ("report.md", "speedup.png"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).symlink_to(private)
        with pytest.raises(ValueError, match="outside of its folder"):
            write_report(DOCUMENT, folder)
        assert [path.name for path in folder.iterdir()] == [name]
    assert private.read_text() == "as it was"


def test_answers_that_loop_are_a_column():
    looping = a_row("auto", speedup=3.0, looping=0.25, echoing=0.0, speedup_without_loops=1.5)
    lines = table({**DOCUMENT, "rows": [a_row("plain", looping=0.0, echoing=0.0), looping]})
    assert column(lines, "looping") == ["", "25%"]
    assert column(lines, "without these") == ["", "1.50x"]
    assert "echoing" not in lines[0]


def test_a_picture_without_anything_to_show_is_not_drawn(tmp_path):
    document = {**DOCUMENT, "rows": DOCUMENT["rows"][:1]}
    written = write_report(document, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "speedup.png"}
    assert "quality.png" not in written.read_text()


def test_picture_of_groups():
    groups = [
        {"task": name, "rows": [a_row("plain"), a_row("auto", tokens_per_s=speed)]}
        for name, speed in (("parse", 80.0), ("code", None))  # None: no answer had a second token
    ]
    assert draw_by_group(groups).startswith(b"\x89PNG")


def test_a_table_shows_texts_as_they_are():
    lines = [["a", "b"], ["x|<img src=y>\nz", "1 & 2"]]
    assert markdown_table(lines).splitlines()[-1] == "| x\\|&lt;img src=y> z | 1 &amp; 2 |"


def test_a_report_shows_names_of_others_as_they_are():
    row = a_row("plain", categories={"![x](http://a/b)|*_`": {"acceptance_rate": None}})
    document = {**DOCUMENT, "task": "[a](b)", "rows": [row]}
    text = markdown(document, [])
    assert text.startswith("# Benchmark of mine on \\[a\\](b)\n")
    assert "| mode | !\\[x\\](http://a/b)\\|\\*\\_\\` |" in text
    assert as_text("a\\|b") == "a\\\\\\|b"
