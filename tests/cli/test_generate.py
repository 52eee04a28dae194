"""`layerskip generate`: results, streams, files of prompts, and bad input."""

import errno
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import types

import click
import pytest
import torch

from layerskip import LayerSkipModel
from layerskip.cli import config_flags, output
from layerskip.data.readers import prompt_of
from layerskip.decoding import Answer, Piece
from layerskip.model import native
from layerskip.model.checkpoint import SettingsWarning
from layerskip.model.native import build

SPECULATIVE = ("--mode", "self-speculative", "--exit-layer", 3, "--draft-tokens", 2)
FIELDS = """
    text token_ids finish_reason prompt_tokens new_tokens mode exit_layer draft_tokens rounds
    drafted accepted acceptance_rate mean_accepted_length accepted_by_position ttft_s decode_s
    tokens_per_s
""".split()  # noqa: SIM905


def test_json_is_one_document_with_the_fields_of_the_contract(run):
    status, out, err = run(
        "generate", "--prompt", "abc", "--max-new-tokens", 9, "--json", *SPECULATIVE
    )
    result = json.loads(out)
    assert (status, err) == (0, "")
    assert list(result) == FIELDS
    assert (result["mode"], result["exit_layer"], result["draft_tokens"]) == (
        "self-speculative",
        3,
        2,
    )
    assert result["new_tokens"] == len(result["token_ids"])
    assert result["new_tokens"] == 1 + result["rounds"] + result["accepted"]


@pytest.mark.parametrize(
    "switches",
    [
        (),
        ("--draft-from", "early-exit", "--exit-layer", 1),
        ("--exit-layer", 1, "--draft-vocabulary", 20, "--no-adaptive"),
    ],
)
def test_each_part_of_auto_can_be_switched_alone_and_the_answer_stays(run, switches):
    flags = ("generate", "--prompt", "abc abc", "--max-new-tokens", 12, "--json")
    plain = json.loads(run(*flags, "--mode", "plain")[1])
    status, out, err = run(*flags, *switches)
    assert (status, err) == (0, "")
    assert json.loads(out)["mode"] == (
        "self-speculative" if "--exit-layer" in switches else "n-gram"
    )
    assert json.loads(out)["token_ids"] == plain["token_ids"]


def test_a_draft_text_is_a_file_or_none(run, tmp_path):
    text, flags = tmp_path / "text.txt", ("generate", "--prompt", "abc", "--max-new-tokens", 20)
    plain = json.loads(run(*flags, "--mode", "plain", "--json")[1])
    text.write_text((plain["text"] + " ") * 9)
    drafted = {}
    for name in (text, "none"):
        status, out, err = run(*flags, "--draft-text", name, "--draft-from", "n-gram", "--json")
        assert (status, err) == (0, "")
        answer = json.loads(out)
        assert answer["token_ids"] == plain["token_ids"]
        drafted[name] = answer["accepted"]
    assert drafted[text] > drafted["none"]
    status, _, err = run(*flags, "--draft-text", tmp_path / "nothing.txt")
    assert status == 2
    assert "nothing.txt cannot be read" in err


def test_a_prediction_is_a_file_or_standard_input(run, tmp_path, monkeypatch):
    text, flags = tmp_path / "text.txt", ("generate", "--prompt", "abc", "--max-new-tokens", 20)
    plain = json.loads(run(*flags, "--mode", "plain", "--json")[1])
    text.write_text(plain["text"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(plain["text"]))
    flags += ("--mode", "self-speculative", "--draft-from", "prediction")
    for name in (text, "-"):
        status, out, err = run(*flags, "--prediction", name, "--json")
        assert (status, err) == (0, "")
        answer = json.loads(out)
        assert answer["token_ids"] == plain["token_ids"]
        assert answer["mode"] == "prediction"
        assert answer["drafted"] > 0


def test_a_prediction_that_cannot_be_read_is_refused(run, tmp_path):
    status, out, err = run("generate", "--prediction", "-")
    assert (status, out) == (2, "")
    assert "--prediction - reads standard input, which is the prompt" in err
    status, out, err = run("generate", "--prompt", "a", "--prediction", tmp_path / "no.txt")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "no.txt" in err


def test_an_answer_follows_a_schema_file_or_a_regex(run, tmp_path):
    file, flags = tmp_path / "schema.json", ("generate", "--prompt", "abc", "--temperature", 2)
    file.write_text('{"enum": ["one", "two"]}')
    assert run(*flags, "--json-schema", file)[:2] in ((0, '"one"\n'), (0, '"two"\n'))
    status, out, err = run(*flags, "--regex", "[0-9]{5}")
    assert (status, len(out), err) == (0, 6, "")
    assert out.strip().isdigit()
    file.write_text("{")
    status, _, err = run(*flags, "--json-schema", file)
    assert (status, "the JSON schema is not JSON" in err) == (2, True)
    status, _, err = run(*flags, "--json-schema", tmp_path / "no.json")
    assert (status, "no.json cannot be read" in err) == (2, True)


def test_a_draft_vocabulary_is_a_number_or_none(run):
    status, _, err = run("generate", "--prompt", "abc", "--draft-vocabulary", "some")
    assert status == 2
    assert "'some' is not a valid integer" in err


def test_what_is_streamed_is_the_text_of_the_library(run, folder):
    flags = ("--max-new-tokens", 12, "--temperature", 0.8, "--seed", 3, "--ignore-eos")
    status, out, _ = run("generate", "--prompt", "abc", *flags)
    model = LayerSkipModel.from_pretrained(folder, dtype="float32")
    answer = model.generate("abc", max_new_tokens=12, temperature=0.8, seed=3, ignore_eos=True)
    assert status == 0
    assert out == answer.text + "\n"


def test_a_file_of_prompts_gives_a_list(run, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.json"
    rows = [{"prompt": "abc"}, {"messages": [{"role": "user", "content": "abc"}]}]
    prompts.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    status, out, _ = run(
        "generate", "--prompts", prompts, "--output", output, "--max-new-tokens", 3
    )
    results = json.loads(output.read_text())
    assert (status, out) == (0, "")
    assert [r["prompt_tokens"] for r in results] == [3, len("user: abc\nassistant: ")]
    assert set(tmp_path.iterdir()) == {prompts, output}


def test_prompts_of_a_file_may_be_lists(run, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    message = {"role": "user", "content": "abc"}
    rows = [{"prompt": [5, 6]}, {"prompt": [message]}, {"prompt": "abc", "messages": []}]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    results = json.loads(run("generate", "--prompts", prompts, "--json", "--max-new-tokens", 2)[1])
    counts = [r["prompt_tokens"] for r in results]
    assert counts == [2, len("user: abc\nassistant: "), 3]
    row = {"prompt": [message], "tools": [{"name": "look"}], "source": "mine"}
    assert prompt_of(row) == ({"messages": [message], "tools": row["tools"]}, None)


def test_a_conversation_that_ends_with_an_answer_is_asked_without_it(run, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    asked = [{"role": "user", "content": "abc"}]
    rows = [{"messages": asked}, {"messages": [*asked, {"role": "assistant", "content": "d"}]}]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    flags = ("--prompts", prompts, "--json", "--max-new-tokens", 3)
    first, second = json.loads(run("generate", *flags)[1])
    assert (first["text"], first["prompt_tokens"]) == (second["text"], second["prompt_tokens"])
    prompts.write_text(json.dumps({"messages": [{"role": "user"}]}))
    status, _, err = run("generate", *flags)
    assert status == 1
    assert "prompts.jsonl:1: `prompt` (a text) or `messages` (role and content)" in err


def test_files_of_prompts_may_be_compressed(run, tmp_path):
    prompts = tmp_path / "prompts.txt.gz"
    with gzip.open(prompts, "wt") as file:
        file.write("abc\n\nde\n")
    results = json.loads(run("generate", "--prompts", prompts, "--json", "--max-new-tokens", 2)[1])
    assert [r["prompt_tokens"] for r in results] == [3, 2]


def test_only_line_breaks_part_lines(run, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a\u2028b"}\r\n{"prompt": "c"}\n', encoding="utf-8", newline="")
    results = json.loads(run("generate", "--prompts", prompts, "--json", "--max-new-tokens", 2)[1])
    assert len(results) == 2


def test_a_prompt_that_cannot_be_used_is_named_and_loses_no_answer(run, tmp_path):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "answers.json"
    prompts.write_text("ab\n" + "abc" * 200 + "\nabcd\n")
    flags = ("--prompts", prompts, "--output", output, "--max-new-tokens", 2)
    status, _, err = run("generate", *flags)
    assert status == 1
    assert "prompt 2: " in err
    assert [row["prompt_tokens"] for row in json.loads(output.read_text())] == [2]


def test_a_link_stays_and_what_is_no_file_is_written_to(run, tmp_path):
    target, link = tmp_path / "first.json", tmp_path / "latest.json"
    link.symlink_to(target)
    flags = ("generate", "--prompt", "abc", "--max-new-tokens", 2, "--output")
    assert run(*flags, link)[0] == 0
    assert link.is_symlink()
    assert json.loads(target.read_text())["new_tokens"] == 2
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8") as reader:
        assert run(*flags, pipe)[0] == 0
        assert json.load(reader)["new_tokens"] == 2
    assert pipe.is_fifo()


def in_a_process(*arguments, **how):
    """The program in a process of its own, with streams of its own."""
    command = [sys.executable, "-m", "layerskip", *map(str, arguments)]
    return subprocess.run(command, check=False, **how)


@pytest.mark.parametrize("command", ["generate --ignore-eos --json", "lens"])  # and a table
def test_a_reader_that_leaves_is_no_error_and_no_success(
    command, main, folder, tmp_path, monkeypatch
):
    file = tmp_path / "result.json"
    flags = ("--model", folder, "--prompt", "abc", "--output", file, "--no-compile")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(*command.split(), *flags) == (141, "")
    assert json.loads(file.read_text())


@pytest.mark.parametrize("flags", [(), ("--version",)])
def test_a_reader_of_a_help_text_may_leave(flags):
    reader, writer = os.pipe()
    os.close(reader)
    done = in_a_process(*flags, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_a_full_disk_behind_a_help_text_is_one_line():
    with open("/dev/full", "w") as full:
        done = in_a_process(stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_a_full_disk_behind_stdout_is_one_line(main, folder, monkeypatch):
    flags = ("--model", folder, "--prompt", "abc", "--max-new-tokens", 3, "--json", "--no-compile")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        status, err = main("generate", *flags)
    assert (status, err.count("\n")) == (1, 1)
    assert "No space left on device" in err


def test_standard_input_is_one_prompt(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\ncd\n"))
    result = json.loads(run("generate", "--json", "--max-new-tokens", 2)[1])
    assert result["prompt_tokens"] == len("ab\ncd")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffab\n"))  # as some editors begin a file
    result = json.loads(run("generate", "--json", "--max-new-tokens", 2)[1])
    assert result["prompt_tokens"] == len("ab")


def test_lines_of_standard_input_end_as_those_of_files_do(main, folder, tmp_path, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"ab\r\ncd\r\n"), newline="\n")
    monkeypatch.setattr(sys, "stdin", stdin)
    file = tmp_path / "answer.json"
    assert main("generate", "--model", folder, "--output", file, "--max-new-tokens", 1)[0] == 0
    assert json.loads(file.read_text())["prompt_tokens"] == len("ab\ncd")


def test_a_conversation_of_a_file_has_its_tools_and_variables(run, tmp_path, folder, monkeypatch):
    seen, tokenize = [], LayerSkipModel.tokenize

    def noted(self, prompt):
        seen.append(prompt)
        return tokenize(self, prompt)

    monkeypatch.setattr(LayerSkipModel, "tokenize", noted)
    messages = [{"role": "user", "content": "ab"}]
    rows = [
        {"messages": messages, "tools": [{"name": "f"}]},
        {"messages": messages, "chat_template_kwargs": {"mood": "a"}},
        {"prompt": "ab"},
    ]
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = ("--max-new-tokens", 1, "--json")
    assert run("generate", "--prompts", file, *few)[0] == 0
    assert seen == [*rows[:2], "ab"]
    seen.clear()
    more = ("--chat-template-kwargs", '{"mood": "b", "x": 1}')
    status, _, err = run("generate", "--prompts", file, *few, *more)
    assert (status, err) == (0, "")
    assert [row["chat_template_kwargs"] for row in seen[:2]] == [
        {"mood": "b", "x": 1},
        {"mood": "a", "x": 1},
    ]
    _, _, err = run("generate", "--prompt", "ab", *few, *more)
    assert "--chat-template-kwargs has no effect: no prompt is a conversation" in err


def test_flags_of_sampling_without_a_temperature_are_named(run):
    flags = ("--max-new-tokens", 1, "--top-k", 3, "--top-p", 0.5, "--seed", 1)
    _, _, err = run("generate", "--prompt", "ab", *flags)
    assert [line.split()[1] for line in err.splitlines()] == ["--top-k", "--top-p", "--seed"]
    assert "without --temperature decoding is greedy" in err
    _, _, err = run("generate", "--prompt", "ab", *flags, "--temperature", 1)
    assert err == ""


def test_chat_applies_the_template(run):
    result = json.loads(
        run("generate", "--chat", "--prompt", "abc", "--json", "--max-new-tokens", 1)[1]
    )
    assert result["prompt_tokens"] == len("user: abc\nassistant: ")


def test_stop_is_not_part_of_the_text(run):
    arguments = ("generate", "--prompt", "abc", "--json", "--max-new-tokens", 20, "--ignore-eos")
    text = json.loads(run(*arguments)[1])["text"]
    stop = text[4:6]
    result = json.loads(run(*arguments, "--stop", stop)[1])
    assert result["text"] == text[: text.index(stop)]
    assert result["finish_reason"] == "stop"


def test_show_draft_brackets_what_was_drafted(run):
    arguments = ("generate", "--prompt", "abc", "--max-new-tokens", 16, "--ignore-eos")
    full_depth = ("--mode", "self-speculative", "--exit-layer", 4, "--draft-tokens", 3)
    status, out, err = run(*arguments, *full_depth, "--show-draft", "--stats")
    plain = run(*arguments)[1]
    assert status == 0
    assert out.count("[") > plain.count("[")
    assert out.translate(NO_BRACKETS) == plain.translate(NO_BRACKETS)
    assert "acceptance 100%" in err


NO_BRACKETS = str.maketrans("", "", "[]")


def test_marks_leave_tabs_and_carriage_returns_alone(capsys):
    pieces = [Piece(text="\tif\r\n", drafted=True), Piece(text="\t\tx")]
    output.show_pieces(pieces, show_draft=True)
    assert capsys.readouterr().out == "[\tif\r\n]\t\tx\n"


def test_no_color_is_heeded(capsys, monkeypatch):
    for no_color, shown in (("", "\x1b[32mif\x1b[0m\n"), ("1", "[if]\n")):
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("NO_COLOR", no_color)
        output.show_pieces([Piece(text="if", drafted=True)], show_draft=True)
        assert capsys.readouterr().out == shown


def test_bad_input_is_one_clear_line(run):
    for arguments, status, words in (
        (
            ["--prompt", "abc", "--exit-layer", "9"],
            1,
            "out of range: this model has 1 to 4",
        ),
        (["--prompt", "abc", "--mode", "fast"], 2, "'fast' is not one of"),
        (
            ["--prompt", "abc", "--mode", "plain", "--draft-tokens", "2"],
            2,
            "plain decoding drafts nothing",
        ),
        (
            ["--prompt", "abc", "--weights", "3bit"],
            2,
            "'3bit' is not one of 'stored', '16bit', 'int8', 'int4'",
        ),
        (["--prompt", "abc", "--bogus"], 2, "No such option"),
        (["--prompt", "abc", "--temperature", "inf"], 2, "temperature is inf"),
        (["--prompt", "abc", "--stop", "\ud83d"], 1, "a stop string cannot be made tokens of"),
        (["--prompt", ""], 1, "the prompt is empty"),
        (["--prompt", "abc" * 200], 1, "this model's context holds 512"),
        (["--prompt", "abc", "--device", "abacus"], 2, "the device 'abacus' is unknown"),
        (["--prompt", "abc", "--stop", ""], 2, "a stop string has to be a text that is not empty"),
        (["--prompt", "abc", "--output", "no/such/folder/x.json"], 2, "does not exist"),
        (["--prompt", "abc", "--prompts", __file__], 2, "exclude each other"),
        (["--prompts", "no-such-file"], 2, "does not exist"),
    ):
        got, out, err = run("generate", *arguments)
        assert (got, out) == (status, "")
        assert words in err
        assert err.startswith("layerskip: ")
        assert err.count("\n") == 1


def test_flags_that_contradict_each_other_are_reported_before_a_model_is_loaded(run, monkeypatch):
    for command, flags, words in (
        ("generate", ("--mode", "plain", "--exit-layer", 2), "plain decoding drafts nothing"),
        ("chat", ("--mode", "early-exit", "--draft-tokens", 2), "early exit drafts nothing"),
        ("lens", ("--draft-from", "n-gram", "--exit-layer", 4), "have no exit layer"),
    ):
        monkeypatch.setattr(config_flags, "load_model", lambda config: pytest.fail("loaded"))
        status, out, err = run(command, *flags)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert words in err


def test_a_gpu_that_stays_idle_is_named(run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    flags = ("--prompt", "abc", "--max-new-tokens", 2, "--json")
    _, out, err = run("generate", *flags)
    assert err == "layerskip: a GPU is here: --device cuda uses it\n"
    assert json.loads(out)["new_tokens"] == 2
    assert run("generate", *flags, "--device", "cpu")[2] == ""


def test_weights_that_save_no_memory_or_time_are_told_of(capsys):
    for weights, device, dtype, kernels, said in (
        ("int8", "cuda", "bfloat16", "torch.compile", "int8 takes more memory than 16bit"),
        ("int8", "cpu", "float32", "compiled", ""),
        ("int4", "cpu", "float32", "pytorch", "kernels --weights int4 is slower than 16bit"),
    ):
        decoder = types.SimpleNamespace(
            weights=weights,
            device=torch.device(device),
            dtype=getattr(torch, dtype),
            kernels=kernels,
        )
        config_flags.note_weights(decoder)
        err = capsys.readouterr().err
        assert said in err
        assert bool(said) == bool(err)


def test_threads_are_no_more_than_a_container_has(run, monkeypatch):
    asked, flags = [], ("--prompt", "abc", "--max-new-tokens", 2)
    monkeypatch.setattr("layerskip.model.native.num_threads_to_use", lambda: 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    run("generate", *flags)
    run("generate", *flags, "--threads", 3)
    assert asked == [1, 3]


def test_a_bad_row_is_named_by_its_line(run, tmp_path):
    for row, words in (
        ("{", "prompts.jsonl:2 is not JSON"),
        ("[" * 100_000, "prompts.jsonl:2 is nested too deeply"),
        ('{"prompt": 7}', "prompts.jsonl:2: `prompt` (a text)"),
    ):
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text('{"prompt": "abc"}\n' + row + "\n")
        status, _, err = run("generate", "--prompts", prompts, "--json")
        assert status == 1
        assert words in err


def test_a_model_that_is_nowhere(run):
    for model in ("no-such-model", "no/such/file.gguf"):
        status, _, err = run("generate", "--prompt", "abc", "--model", model)
        assert status == 1
        assert model in err
        assert err.count("\n") == 1


def test_debug_shows_the_traceback(run):
    with pytest.raises(ValueError, match="out of range"):
        run("generate", "--debug", "--prompt", "abc", "--exit-layer", "9")


def test_a_failed_write_leaves_the_old_file(run, tmp_path, monkeypatch):
    output = tmp_path / "answers.json"
    output.write_text("old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    status, _, err = run("generate", "--prompt", "abc", "--max-new-tokens", 2, "--output", output)
    assert (status, output.read_text()) == (1, "old")
    assert "No space left on device" in err
    assert list(tmp_path.iterdir()) == [output]


def test_answers_that_cannot_be_stored_are_printed(run, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output, "replace", full_disk)
    flags = ("--prompt", "abc", "--max-new-tokens", 3, "--output", tmp_path / "a.json")
    status, out, err = run("generate", *flags)
    assert (status, err.count("\n")) == (1, 1)
    assert json.loads(out)["new_tokens"] == 3


def test_ctrl_c_leaves_the_answer_as_far_as_it_came(run, monkeypatch):
    note, calls = Answer._receive, []

    def interrupted(self, step):
        note(self, step)
        calls.append(step)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Answer, "_receive", interrupted)
    flags = ("--prompt", "abc", "--mode", "plain", "--ignore-eos", "--json")
    status, out, err = run("generate", *flags)
    assert (status, err.strip()) == (130, "layerskip: interrupted")
    result = json.loads(out)
    assert (result["new_tokens"], result["finish_reason"]) == (3, "interrupted")


def test_without_a_tokenizer_token_ids_are_shown(run, folder, tmp_path, monkeypatch):
    file = tmp_path / "ids.jsonl"
    file.write_text('{"prompt": [5, 6, 7]}\n')
    load = config_flags.load_model

    def without(flags):
        model = load(flags)
        model.tokenizer = None
        return model

    monkeypatch.setattr(config_flags, "load_model", without)
    flags = ("--prompts", file, "--max-new-tokens", 3, "--ignore-eos")
    shown = run("generate", *flags)[1]
    assert [int(token) for token in shown.split()] == json.loads(
        run("generate", *flags, "--json")[1]
    )[0]["token_ids"]


def test_a_file_of_json_is_no_list_of_prompts(run, tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text('[\n{"prompt": "abc"}\n]\n')
    status, _, err = run("generate", "--prompts", file)
    assert (status, err.count("\n")) == (1, 1)
    assert "name it .jsonl" in err
    file = file.rename(tmp_path / "PROMPTS.JSONL")
    file.write_text('{"prompt": "abc"}\n')
    answers = json.loads(run("generate", "--prompts", file, "--json", "--max-new-tokens", 1)[1])
    assert answers[0]["prompt_tokens"] == 3


def test_compiling_the_kernels_says_so_once(run, compiled_kernels, monkeypatch, tmp_path):
    """It takes some seconds, of which nobody should think that the program hangs."""
    real = build.target()
    monkeypatch.setattr(build, "target", lambda: tmp_path / "kernels" / "made.so")

    def compiled(command, **_):
        shutil.copyfile(real, command[-1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(build.subprocess, "run", compiled)
    asked = ("generate", "--prompt", "abc", "--max-new-tokens", 2)
    assert run(*asked)[2].splitlines()[0] == "compiling kernels for this machine (once) ..."
    assert "compiling" not in run(*asked)[2]


def test_no_kernels_are_needed(run, monkeypatch):
    monkeypatch.delattr(native, "prepare")
    status, _, err = run("generate", "--prompt", "abc", "--max-new-tokens", 4, "--no-compile")
    assert status == 0, err


def test_without_a_prompt_nobody_waits_at_a_terminal(run, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    status, out, err = run("generate")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "give a prompt" in err


def test_a_terminal_obeys_no_answer(capsys, monkeypatch):
    for is_terminal in (True, False):
        text = "a\x1b]52;c;eA==\x07b\tc\n\x9b2J"
        monkeypatch.setattr(sys.stdout, "isatty", lambda yes=is_terminal: yes)
        output.show_pieces([Piece(text=text)], show_draft=False)
        shown = "a\\x1b]52;c;eA==\\x07b\tc\n\\x9b2J" if is_terminal else text
        assert capsys.readouterr().out == shown + "\n"


def test_no_message_is_obeyed_either(run):
    status, _, err = run("bench", "--task", "a\x1b]0;title\x07.jsonl")
    assert status == 1
    assert "a\\x1b]0;title\\x07.jsonl" in err.replace("\\\\", "\\")
    assert "\x1b" not in err


def test_a_folder_in_the_place_of_a_built_in_model_is_said(run, folder, tmp_path, monkeypatch):
    (tmp_path / "smollm2-135m").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    flags = ("--prompt", "ab", "--max-new-tokens", 1, "--model", "smollm2-135m")
    status, _, err = run("generate", *flags)
    assert status == 0
    assert "smollm2-135m is taken from the folder of that name here" in err


def test_no_output_takes_the_place_of_what_is_read_or_of_another_output(run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\n")
    text = ("eval", "--perplexity", prompts)
    for flags in (
        ("generate", "--prompts", prompts, "--output", prompts),
        ("generate", "--prompt", "a", "--draft-text", prompts, "--output", prompts),
        ("chat", "--draft-text", prompts, "--output", prompts),
        ("lens", "--data", prompts, "--output", tmp_path / "." / "prompts.txt"),
        (*text, "--output", prompts),
        (*text, "--output", tmp_path / "a", "--plot", tmp_path / "a"),
        ("bench", "--task", prompts, "--output", prompts),
        ("tune", "--data", prompts, "--output", prompts),
        ("demo", "--output", tmp_path / "a", "--picture", tmp_path / "a"),
    ):
        status, _, err = run(*flags)
        assert (status, "would replace what this call reads or writes" in err) == (2, True), flags
    assert prompts.read_text() == "abc\n"
    assert list(tmp_path.iterdir()) == [prompts]


def test_a_result_does_not_replace_what_makes_the_checkpoint(folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    (own / "bench.json").write_text("{}")  # of an earlier call
    output.check_outputs({"--output": own / "bench.json"}, beside=(own,))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        with pytest.raises(click.UsageError, match="would replace"):
            output.check_outputs({"--output": own / name}, beside=(str(own),))


@pytest.mark.parametrize("flags", [("generate", "--prompt", "a"), ("chat",)])
def test_drafts_that_nobody_is_shown(run, flags, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    _, _, err = run(*flags, "--json", "--show-draft", "--max-new-tokens", 2)
    assert "--show-draft has no effect" in err


def test_standard_input_that_is_no_text_is_named(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    status, _, err = run("generate")
    assert (status, "standard input is no text in utf-8" in err) == (1, True)


@pytest.fixture
def one_form(folder, tmp_path):
    """The checkpoint, trained for prompts that end in a line break."""
    path = tmp_path / "one-form"
    shutil.copytree(folder, path)
    form = {"text": "a command, ending in a line break", "example": "Wake me\n", "ending": "\n"}
    settings = {"eos_token_id": 2, "layerskip": {"prompt_form": form}}
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


def test_a_prompt_of_another_form_is_warned_of_once(program, one_form, tmp_path):
    flags = ("--model", one_form, "--dtype", "float32", "--max-new-tokens", 2)
    _, _, err = program("generate", *flags, "--prompt", "abc\n")
    assert "trained" not in err
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\ndef\n")
    _, _, err = program("generate", *flags, "--prompts", prompts)
    assert err.count("trained for prompts of one form, a command, ending in a line break") == 1
    assert r"--prompt $'Wake me\n'" in err


@pytest.mark.parametrize("form", ["a command", {"text": 1, "example": "a"}, {"name": "a"}])
def test_a_form_that_cannot_be_read_is_left_out(one_form, form):
    settings = {"layerskip": {"prompt_form": form}}
    (one_form / "generation_config.json").write_text(json.dumps(settings))
    with pytest.warns(SettingsWarning, match="needs the texts `text`, `example` and `ending`"):
        model = LayerSkipModel.from_pretrained(one_form, dtype="float32")
    assert model.settings.prompt_form is None
