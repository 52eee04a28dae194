"""What bits cost a difference, measured on a tiny checkpoint."""

import json

import difference_bits
import pytest

import differences


def test_more_bits_are_nearer_to_the_checkpoint(tmp_path, monkeypatch):
    base = differences.base(tmp_path / "base")
    trained = differences.trained(base, tmp_path / "trained", change=0.1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (trained / name).write_bytes((base / name).read_bytes())
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    arguments = [str(trained), "--base", str(base), "--text", str(tmp_path / "text.txt")]
    arguments += ["--words", "200", "--dtype", "float32", "--output", str(tmp_path / "out.json")]
    monkeypatch.setattr("sys.argv", ["difference_bits.py", *arguments])
    difference_bits.main()
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["exit_layer"] == 2
    whole, _, two, one, mixed, four = result["rows"]
    assert (mixed["bits"], mixed["draft_bits"]) == (1, 4)
    assert one["bytes"] < two["bytes"] < four["bytes"]
    # Exit 2 and all that it runs have the same 4 bits in both.
    assert mixed["exit_2"] == four["exit_2"]
    errors = [
        abs(row["exit_4"]["nats_per_token"] - whole["exit_4"]["nats_per_token"])
        for row in (four, one)
    ]
    assert errors[0] < errors[1]
    assert four["exit_4"]["nats_per_token"] == pytest.approx(
        whole["exit_4"]["nats_per_token"], rel=0.05
    )
