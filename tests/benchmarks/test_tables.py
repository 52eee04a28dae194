"""The tables of the pages, as benchmarks/tables.py writes them."""

import json

import pytest
import tables

ENVIRONMENT = {"date": "2026-11-30", "commit": "abc", "cpu": "AMD EPYC", "weights": "16bit"}


def bench_row(mode, tokens_per_s, *, system="layerskip", label=None, exit_layer=None):
    return {
        "system": system,
        "mode": mode,
        "label": label,
        "exit_layer": exit_layer,
        "draft_tokens": 4,
        "tokens_per_s": tokens_per_s,
        "speedup_without_loops": tokens_per_s / 100,
        "speedup_without_loops_interval": [1.5, 2.5],
    }


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_result_files(page):
    text = page.read_text()
    assert len(tables.BLOCK.findall(text)) > 1
    assert text == tables.filled(text), "run python benchmarks/tables.py"


def test_a_table_names_its_file_and_command(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"environment": ENVIRONMENT}))
    table = tables.Table(("one",), "make", lambda document: [["a", "b"], ["1", "2"]])
    expected = "|a|b|\n|---|---|\n|1|2|\n\n`benchmarks/results/one.json` (2026-11-30): `make`"
    assert tables.rendered(table, tmp_path).strip() == expected


def test_speed_has_a_row_for_each_system_and_a_column_for_the_weights():
    rows = [
        bench_row("plain", 100),
        bench_row("auto", 200),
        bench_row("auto", 150, label="drafts from n-grams"),
        bench_row("self-speculative", 50, system="transformers", exit_layer=4),
    ]
    parts = {
        "a": {"environment": ENVIRONMENT, "rows": rows},
        "b": {"environment": {"weights": "int8"}, "rows": rows[:2]},
        "c": {"error": "no such model"},
    }
    assert tables.speed({"parts": parts}) == [
        ["tokens/s, speedup", "bfloat16", "int8"],
        ["layerskip, plain", "100", "100"],
        ["layerskip, auto", "200, 2.00x (1.50-2.50)", "200, 2.00x (1.50-2.50)"],
        ["layerskip, drafts from n-grams", "150, 1.50x", ""],
        ["transformers, self-speculative, E = 4, d = 4", "50, 0.50x", ""],
    ]


def test_quality_has_the_exits_and_the_control():
    task = {"quality": {"exact_match": 0.83}, "exits": []}
    exit_ = {"exit_layer": 4, "agreement": 0.95, "acceptance_rate": 0.9}
    recipe = {"checkpoint": {"tasks": {"topv2": {**task, "exits": [exit_]}}}}
    control = {"checkpoint": {"tasks": {"topv2": task}}}
    assert tables.quality(recipe, control)[1:] == [
        ["last layer", "83.0%", "", ""],
        ["exit 4 alone", "", "95.0%", "90.0%"],
        ["control without the recipe", "83.0%", "", ""],
    ]


def test_busy_cores_have_a_column_for_each_number_of_threads():
    rows = [{"busy": 1, "work": "decoding", "tokens/s": {"1": 80.0, "2": 40.0, "chosen": 76.0}}]
    assert tables.busy_cores({"rows": rows}) == [
        ["", "busy processes", "1 thread", "2 threads", "chosen"],
        ["decoding", "1", "80", "40", "76"],
    ]


def test_serve_has_columns_for_clients_and_arrivals():
    rows = [
        {"system": s, "task": "topv2", **load, "tokens_per_s": 10 * n, "ttft_ms_p95": 5.4}
        for n, load in ((1, {"clients": 1}), (4, {"clients": 4}), (2, {"rate": 0.5}))
        for s in ("layerskip", "llama.cpp")
    ]
    lines = tables.serve({"rows": rows[:-1]})
    assert lines[0] == ["", "1 clients", "4 clients", "0.5 requests/s"]
    assert lines[1] == ["TOPv2, layerskip, tokens/s", "10", "40", "20"]
    assert lines[4] == ["TOPv2, llama.cpp, first token, ms (p95)", "5", "5", ""]


def vllm_row(mode, batch, tokens, draft_tokens=None, unit="tokens_per_s"):
    common = {"mode": mode, "batch": batch, "draft_tokens": draft_tokens, unit: tokens}
    return common | {"rss_mb": 2_000 + batch, "kv_cache_tokens": 46_592}


def test_vllm_has_the_memory_of_each_mode_beside_its_speeds():
    rows = [
        vllm_row("plain", 1, 50),
        vllm_row("plain", 4, 100),
        vllm_row("layerskip", 1, 100, 4),
        vllm_row("layerskip", 4, 150, 4),
        vllm_row("layerskip", 1, 90, [[1, 4, 2]]),
        vllm_row("layerskip", 4, 160, [[1, 4, 2]]),
    ]
    assert tables.vllm({"rows": rows}) == [
        ["tokens/s", "batch 1", "batch 4", "memory, MB", "KV cache, tokens"],
        ["plain", "50", "100", "2,004", "46,592"],
        ["layerskip", "100 (2.00x)", "150 (1.50x)", "2,004", "46,592"],
        ["layerskip, table by batch size", "90 (1.80x)", "160 (1.60x)", "2,004", "46,592"],
    ]
    busy = [vllm_row("plain", 1, 50, unit="tokens_per_cpu_s")]
    assert tables.vllm({"rows": busy}) == [["tokens per CPU second", "batch 1"], ["plain", "50"]]


def test_speed_over_llama_cpp_is_over_its_fastest_row():
    def row(mode, tokens_per_s, **system):
        more = {"tokens_per_s_with_prompt": 40.0, "vs_layerskip_plain": 2.0}
        return bench_row(mode, tokens_per_s, **system) | more

    rows = [row("plain", 50.0), row("auto", 200.0)]
    rows += [row(mode, 100.0, system="llama.cpp") for mode in ("plain", "prompt-lookup")]
    run = {"task": "topv2", "samples": 3, "rows": rows, "environment": ENVIRONMENT}
    rows[-1]["tokens_per_s"] = 80.0
    _, line = tables.llama_cpp(run)
    assert line[3:] == ["50", "200", "100", "80 (prompt-lookup, d = 4)", "1.00x", "1.00x"]
    rows[-1] |= {"tokens_per_s": 160.0, "vs_layerskip_plain": 3.2}
    _, line = tables.llama_cpp({"parts": {"": run, "failed": {"error": "no data"}}})
    assert line[-2:] == ["0.62x", "1.00x"]
