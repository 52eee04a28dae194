"""`layerskip adapt`, and `--adapter` of the commands that decode."""

import json

import pytest

from layerskip.adapt import train
from layerskip.cli import adapt as adapt_command

SMALL = ("--round-tokens", 300, "--max-new-tokens", 16, "--max-length", 48, "--eval-prompts", 2)
SMALL += ("--draft-vocabulary", 100, "--exit-layer", 1, "--patience", 1, "--learning-rate", 1e-9)


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    prompts = [{"prompt": f"Count to {n}."} for n in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*prompts, {"text": "1, 2, 3"}]))
    return file


def test_an_adapter_is_trained_used_and_uploaded(run, rows, tmp_path, monkeypatch):
    output = tmp_path / "adapter"
    status, out, err = run("adapt", "--data", rows, "--output", output, *SMALL, "--json")
    assert status == 0
    result = json.loads(out)
    assert result["adapter"] == str(output / "exit_adapter.safetensors")
    assert result["speeds"][0]["source"] == "n-gram"
    assert err.count("held-out agreement by depth") == len(result["history"]) == 2

    plain = run(
        "generate", "--prompt", "Count.", "--max-new-tokens", 12, "--mode", "plain", "--json"
    )
    drafted = run(
        "generate", "--prompt", "Count.", "--max-new-tokens", 12, "--adapter", output, "--json"
    )
    answers = [json.loads(out) for status, out, _ in (plain, drafted)]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    assert answers[1]["mode"] == "exit-adapter+n-gram"

    calls = []
    monkeypatch.setattr(train, "create_repository", lambda *a, **k: calls.append((*a, k)))
    monkeypatch.setattr(
        train, "upload", lambda *a: calls.append(a) or "https://hub.example/me/mine"
    )
    to_hub = ("--push-to-hub", "me/mine", "--private")
    status, out, _ = run("adapt", "--data", rows, "--output", output, "--resume", *SMALL, *to_hub)
    assert status == 0
    assert "exit-adapter+n-gram" in out
    assert out.endswith("\nhttps://hub.example/me/mine\n")
    files = ["exit_adapter.safetensors", "README.md"]
    assert calls == [("me/mine", {"private": True}), (output, files, "me/mine")]


def test_settings_come_from_a_file_and_flags_override_them(
    program, folder, rows, tmp_path, monkeypatch
):
    calls = []

    def stop(name, config, *_, **loading):
        calls.append((name, config, loading["dtype"]))
        raise ValueError("enough")

    monkeypatch.setattr(adapt_command, "adapt", stop)
    file = tmp_path / "adapt.yaml"
    file.write_text(f"model: {folder}\ndtype: float32\ndata: {rows}\nmax-minutes: 5\ndepths: 3\n")
    program("adapt", file, "--depths", 1)
    ((name, config, dtype),) = calls
    assert (name, dtype) == (str(folder), "float32")
    assert (config.data, config.max_minutes, config.depths) == ((str(rows),), 5.0, 1)
    file.write_text("depth: 3\n")
    status, _, err = program("adapt", file)
    assert status == 2
    assert "there is no setting 'depth'" in err


def test_an_output_folder_with_a_run_is_refused_without_resume(run, rows, tmp_path):
    (tmp_path / train._STATE).write_text("{}")
    status, _, err = run("adapt", "--data", rows, "--output", tmp_path, *SMALL)
    assert status == 1
    assert "holds a run already: give --resume" in err


def test_an_upload_without_a_token_is_refused_before_the_run(run, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    output = tmp_path / "x"
    status, _, err = run("adapt", "--data", rows, "--output", output, "--push-to-hub", "me/mine")
    assert status == 1
    assert err.count("\n") == 1
    assert "needs a token of the Hugging Face hub: set HF_TOKEN" in err
    assert not output.exists()


def test_ctrl_c_says_how_to_go_on(run, rows, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(adapt_command, "adapt", interrupted)
    status, _, err = run("adapt", "--data", rows, "--output", tmp_path / "x", *SMALL)
    assert status == 130
    assert "--resume goes on" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--adapter", "nowhere"), "there is no exit adapter nowhere"),
        (("--draft-from", "exit-adapter"), "has no exit adapter"),
    ],
)
def test_a_missing_adapter_is_refused_in_one_line(run, flags, message):
    status, _, err = run("generate", "--prompt", "Count.", *flags)
    assert status == 1
    assert message in err
    assert "Traceback" not in err
