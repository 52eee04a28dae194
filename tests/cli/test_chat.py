"""`layerskip chat`: history, commands, and Ctrl-C."""

import dataclasses
import functools
import io
import json
import sys

import pytest

from layerskip import LayerSkipModel
from layerskip.cli import chat
from layerskip.decoding import PrefixCache
from layerskip.model.checkpoint import PromptForm


@pytest.fixture
def talk(run, monkeypatch):
    def call(lines, *arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run("chat", "--max-new-tokens", 4, *arguments)

    return call


def prompt_lengths(out):
    return [result["prompt_tokens"] for result in json.loads(out)]


def test_the_conversation_is_part_of_the_next_prompt(talk):
    status, out, _ = talk(["ab", "cd"], "--json")
    first, second = json.loads(out)
    history = f"user: ab\nassistant: {first['text']}\nuser: cd\nassistant: "
    assert status == 0
    assert first["prompt_tokens"] == len("user: ab\nassistant: ")
    assert second["prompt_tokens"] == len(history.encode())


def test_reset_and_quit_and_system(talk):
    lines = ["ab", "/reset", "ab", "", "/quit", "never read"]
    _, out, _ = talk(lines, "--system", "x", "--json")
    assert prompt_lengths(out) == [len("system: x\nuser: ab\nassistant: ")] * 2


def test_a_mistyped_command_is_no_turn(talk):
    _, out, err = talk(["/rest", "/etc/hosts ab"], "--json")
    assert "there is no command /rest: /reset forgets" in err
    assert prompt_lengths(out) == [len("user: /etc/hosts ab\nassistant: ")]


def test_a_byte_order_mark_is_no_part_of_the_first_turn(talk):
    _, out, _ = talk(["\ufeffab"], "--json")
    assert prompt_lengths(out) == [len("user: ab\nassistant: ")]
    _, out, _ = talk(["\ufeff/quit", "never read"], "--json")
    assert prompt_lengths(out) == []


def test_variables_of_the_template(talk, monkeypatch):
    for variables, words in (("{", "not JSON"), ("[1]", "is not an object")):
        status, _, err = talk(["ab"], "--chat-template-kwargs", variables)
        assert (status, words in err) == (2, True)
    seen, tokenize = [], LayerSkipModel.tokenize
    monkeypatch.setattr(
        LayerSkipModel, "tokenize", lambda self, asked: seen.append(asked) or tokenize(self, asked)
    )
    status, out, _ = talk(["ab"], "--json", "--chat-template-kwargs", '{"mood": 3}')
    assert (status, prompt_lengths(out)) == (0, [len("user: ab\nassistant: ")])
    assert seen[0]["chat_template_kwargs"] == {"mood": 3}
    status, _, err = talk(["ab"], "--chat-template-kwargs", '{"tokenize": true}')
    assert (status, "names tokenize, no variable of a template" in err) == (1, True)
    assert "/reset" not in err  # which forgets turns, and there are none
    assert err.endswith("layerskip: none of the turns could be answered\n")


def test_an_answer_that_is_cut_where_nobody_asked_for_it_says_so(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\n"))
    _, _, err = run("chat")
    assert err == "(cut after 256 tokens; --max-new-tokens allows more)\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\n"))
    _, _, err = run("chat", "--max-new-tokens", 3)
    assert err == ""
    monkeypatch.setattr(sys, "stdin", io.StringIO("a" * 400 + "\n"))
    _, _, err = run("chat")  # of a context of 512
    assert err.endswith(" tokens; the context is full)\n")


def test_every_turn_draws_apart(talk, monkeypatch):
    seeds, prefixes, answer = [], set(), LayerSkipModel.answer

    @functools.wraps(answer)
    def seen(self, *arguments, **options):
        seeds.append(arguments[1].seed)
        prefixes.add(options["prefix"])
        return answer(self, *arguments, **options)

    monkeypatch.setattr(LayerSkipModel, "answer", seen)
    talk(["ab", "/reset", "ab"], "--temperature", 1, "--seed", 7, "--json")
    (prefix,) = prefixes  # what the turns share is computed once
    assert isinstance(prefix, PrefixCache)
    talk(["ab"], "--json")
    assert seeds == [7, 8, None]


def test_answers_stream_and_go_to_a_file(talk, tmp_path):
    output = tmp_path / "answers.json"
    status, out, err = talk(["ab"], "--output", output, "--stats")
    assert status == 0
    assert out == json.loads(output.read_text())[0]["text"] + "\n"
    assert "n-gram (d=31) · " in err


def test_ctrl_c_stops_the_answer_and_not_the_program(talk, monkeypatch):
    real = chat.show_pieces
    calls = []

    def interrupted_once(pieces, **options):
        calls.append(1)
        if len(calls) == 1:
            next(iter(pieces))
            raise KeyboardInterrupt
        real(pieces, **options)

    monkeypatch.setattr(chat, "show_pieces", interrupted_once)
    status, out, err = talk(["ab", "cd"])
    assert status == 0
    assert len(calls) == 2
    assert "(stopped)" in err
    assert out


def test_a_conversation_that_is_too_long_can_be_reset(talk):
    status, out, err = talk(["a" * 600, "/reset", "ab"], "--json")
    assert status == 0
    assert "this model's context holds 512" in err
    assert len(json.loads(out)) == 1


def test_what_was_answered_is_not_lost_where_a_later_answer_fails(talk, monkeypatch, tmp_path):
    real, output = chat._answer, tmp_path / "answers.json"

    def fails_at_the_second(model, asked, *arguments, **options):
        if len(asked["messages"]) > 1:
            raise KeyboardInterrupt
        return real(model, asked, *arguments, **options)

    monkeypatch.setattr(chat, "_answer", fails_at_the_second)
    status, _, err = talk(["ab", "cd"], "--output", output)
    assert (status, err.strip()) == (130, "layerskip: interrupted")
    assert len(json.loads(output.read_text())) == 1


def test_a_file_of_answers_is_kept_where_there_are_none(talk, tmp_path):
    output = tmp_path / "answers.json"
    output.write_text("old")
    assert talk(["/quit"], "--output", output)[0] == 0
    assert output.read_text() == "old"


def test_a_model_that_cannot_chat_says_so_at_once(talk, monkeypatch):
    monkeypatch.setattr(LayerSkipModel, "has_chat_template", False)
    status, out, err = talk(["ab"])
    assert (status, out) == (1, "")
    assert err.endswith("has no chat template and cannot chat; use layerskip generate\n")


def test_a_checkpoint_for_other_prompts_says_so(talk, monkeypatch):
    form = PromptForm(text="a command, ending in a line break", example="Wake me\n", ending="\n")
    load = chat.config_flags.load_model

    def load_trained(config):
        model = load(config)
        return model.with_settings(dataclasses.replace(model.settings, prompt_form=form))

    monkeypatch.setattr(chat.config_flags, "load_model", load_trained)
    _, _, err = talk(["ab"])
    assert "a command, ending in a line break, and not to talk; take --model smollm2-135m" in err
