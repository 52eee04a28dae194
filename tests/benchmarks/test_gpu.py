"""A dry run of benchmarks/gpu.py on the CPU with tiny models."""

import json
import sys

import pytest

import gpu


def part(name, new_tokens=32):
    rows = []
    return dict(gpu.measure_part(name, "cpu", new_tokens, rows.append)), rows


def test_scripted_acceptance_of_a_random_shape():
    document, rows = part("tiny")
    assert {"cpu", "torch", "date"} <= document["environment"].keys()
    assert [row["mode"] for row in rows] == ["plain", "self-speculative"] * len(gpu.AGREEMENT)
    speculative = rows[1::2]
    assert [row["scripted_agreement"] for row in speculative] == [*gpu.AGREEMENT]
    assert 0 < speculative[0]["acceptance_rate"] < 1
    for row in rows:
        assert row["tokens_per_s"] > 0
        assert row["share_of_ceiling"] == pytest.approx(
            row["tokens_per_s"] / row["ceiling_tokens_per_s"]
        )


@pytest.mark.parametrize("agreement", [0.6, 0.9])
def test_scale_gives_the_wanted_agreement(agreement):
    import torch

    exit_layer = gpu.exit_layer_of("tiny")
    reference = gpu.random_model("tiny", "cpu", 1.0, compiled=False)
    scale = gpu.scale_for(reference, agreement, exit_layer)
    decoder = gpu.random_model("tiny", "cpu", scale, compiled=False).decoder
    tokens = torch.arange(512)[None]
    with torch.inference_mode():
        cache = decoder.new_cache(512)
        early = decoder.run(decoder.embed(tokens), 0, exit_layer, cache)
        last = decoder.run(early, exit_layer, len(decoder.layers), cache)
        same = decoder.logits(early).argmax(-1) == decoder.logits(last).argmax(-1)
    assert same.float().mean().item() == pytest.approx(agreement, abs=0.15)


def test_a_checkpoint_is_measured_in_each_mode(folder):
    _, rows = part(str(folder), new_tokens=16)
    assert [(row["dtype"], row["mode"]) for row in rows] == [
        (dtype, mode)
        for dtype in ("float32", "bfloat16")
        for mode in ("plain", "self-speculative", "auto")
    ]
    assert all(row["identical_to_plain"] for row in rows if row["dtype"] == "float32")


def test_whole_command_writes_the_result_though_a_part_fails(tmp_path, monkeypatch, capsys):
    output = tmp_path / "gpu.json"
    words = ["gpu.py", "--device", "cpu", "--no-install", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*words, "--models", "no-such-model", "--shapes", ""])
    parts = iter(["bandwidth", "no-such-model"])
    monkeypatch.setattr(gpu, "_parts", lambda options: ((name, 60.0) for name in parts))
    gpu.main()
    result = json.loads(output.read_text())
    bandwidth, missing = result["parts"].values()
    assert bandwidth["rows"][0]["copy_gb_per_s"] > 0
    assert "error" not in bandwidth
    assert "no-such-model" in missing["error"]


def test_a_part_that_takes_too_long_is_stopped_and_reported():
    outcome = gpu._run([sys.executable, "-c", "import time; print('begun'); time.sleep(60)"], 2)
    assert outcome["error"] == "stopped after 2 s: begun"
    assert outcome["seconds"] < 30


def test_parts_that_have_no_time_left_are_named(tmp_path, monkeypatch):
    output = tmp_path / "gpu.json"
    words = ["gpu.py", "--minutes", "0", "--device", "cpu", "--no-install"]
    monkeypatch.setattr(sys, "argv", [*words, "--output", str(output)])
    gpu.main()
    parts = json.loads(output.read_text())["parts"]
    assert list(parts)[:2] == ["bandwidth", "tests"]
    assert {part["error"] for part in parts.values()} == {"no time left"}
