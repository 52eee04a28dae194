"""Prompts: texts, token ids, conversations, lists of them, and what is none."""

import copy

import numpy
import pytest
import torch
from scripted import OTHER_END, TOKENIZER, encode, scripted_model
from tiny_decoders import model_of, tiny_decoder
from tokenizers.processors import TemplateProcessing

import tiny_checkpoint
from layerskip import LayerSkipModel
from layerskip.decoding import PromptError

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    "{{ 'assistant:' if add_generation_prompt }}"
)
MESSAGES = [{"role": "user", "content": "hi"}]


def chat_model(template=TEMPLATE):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    return scripted_model(encode("ab"), tokenizer=tokenizer)


def test_kinds_of_prompts():
    for prompt, tokens in (
        ("hey", encode("hey")),
        ([5, 6], [5, 6]),
        ((5, 6), [5, 6]),
        (list(numpy.array([5, 6])), [5, 6]),
        (MESSAGES, encode("user:hi;assistant:")),
    ):
        model = chat_model()
        assert model.tokenize(prompt) == tokens
        one = model.generate(prompt, max_new_tokens=3)
        assert one.prompt_tokens == len(tokens)
        several = model.generate([prompt, prompt], max_new_tokens=3)
        assert [each.token_ids for each in several] == [one.token_ids] * 2


def test_values_that_are_no_prompt():
    for prompt, message in (
        (None, "a prompt is"),
        ({"role": "user", "content": "hi"}, "a prompt is"),
        ([1.5], "a prompt is"),
        ([{"role": "user"}], "a prompt is"),
        (torch.tensor([1, 2]), "a prompt is"),
        (b"hi", "a prompt is"),
        (MESSAGES, "no chat template"),
        ("", "the prompt is empty"),
        ("x \ud83d", "cannot be tokenized"),
    ):
        with pytest.raises(ValueError, match=message):
            scripted_model(encode("ab")).generate(prompt)


def test_a_bad_prompt_of_a_list_is_named(monkeypatch):
    for bad in ("", 5, [0, 10**6]):
        model = scripted_model(encode("ab"))
        monkeypatch.setattr(model.decoder, "run", None)
        with pytest.raises(PromptError, match=r"^prompt 3: "):
            model.generate(["one", "two", bad, ""])


def test_half_an_emoji_is_refused_by_a_real_tokenizer(tmp_path):
    model = LayerSkipModel.from_pretrained(tiny_checkpoint.save(tmp_path), compile=False)
    with pytest.raises(PromptError, match="cannot be tokenized"):
        model.tokenize("x \ud83d")


def test_special_tokens_are_added_once():
    """The tokenizer's before a text, the template's before messages."""
    model = chat_model()
    begin = model.tokenizer.convert_ids_to_tokens(OTHER_END)
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[begin, "$A"], special_tokens=[(begin, OTHER_END)]
    )
    assert model.tokenize("hey") == [OTHER_END, *encode("hey")]
    assert model.tokenize("") == [OTHER_END]
    model.tokenizer.bos_token = begin
    assert model.tokenize(f"{begin}hey") == [OTHER_END, *encode("hey")]  # one is enough
    assert model.tokenize(MESSAGES) == encode("user:hi;assistant:")


def test_a_conversation_may_have_tools_and_variables_of_the_template():
    model = chat_model(
        "{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}{{ mood or '' }}"
        "{% for m in messages %}{{ m.content or m.tool_calls }};{% endfor %}"
    )
    prompt = {"messages": MESSAGES, "tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "!"}}
    assert model.tokenize(prompt) == encode("[f]!hi;")
    assert model.tokenize({"messages": MESSAGES}) == model.tokenize(MESSAGES) == encode("hi;")
    call = [*MESSAGES, {"role": "assistant", "tool_calls": "f()"}]
    assert model.tokenize(call) == encode("hi;f();")
    one, other = model.generate([prompt, {"messages": MESSAGES}], max_new_tokens=1)
    assert (one.prompt_tokens, other.prompt_tokens) == (7, 3)
    as_json = {"tools": '[{"name": "f"}]', "chat_template_kwargs": '{"mood": "!"}'}
    assert model.tokenize({"messages": MESSAGES, **as_json}) == encode("[f]!hi;")
    for more in ({"tools": "["}, {"tools": [1]}, {"chat_template_kwargs": {"tokenize": True}}):
        with pytest.raises(PromptError, match="the chat template refuses these messages: "):
            model.tokenize({**prompt, **more})
    for wrong in ({"messages": MESSAGES, "tool": []}, {"messages": "hi"}, {"messages": []}, {}):
        with pytest.raises(ValueError, match=r"a prompt is a text, token ids, messages .* dict"):
            model.tokenize(wrong)


def test_messages_that_the_template_refuses():
    for template, messages, reason in (
        ("{{ raise_exception('no system message') }}", MESSAGES, "no system message"),
        (
            "{{ 'user: ' + messages[0].content }}",
            [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "can only concatenate str",
        ),
    ):
        with pytest.raises(ValueError, match=f"refuses these messages: {reason}"):
            chat_model(template).generate(messages)


def test_texts_need_a_tokenizer():
    for prompt in ("text", MESSAGES):
        with pytest.raises(ValueError, match="no tokenizer"):
            model_of(tiny_decoder("llama2")).generate(prompt)


def test_prompts_of_a_list_are_tokenized_once(monkeypatch):
    model, texts = scripted_model(encode("ab")), []
    original = model.tokenizer.encode

    def record(text, **options):
        texts.append(text)
        return original(text, **options)

    monkeypatch.setattr(model.tokenizer, "encode", record)
    model.generate(["one", "two"], max_new_tokens=2)
    assert texts == ["one", "two"]
