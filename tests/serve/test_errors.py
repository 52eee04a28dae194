"""Requests that are refused: OpenAI's error object, the right status, and nothing internal."""

import pytest
from running_server import CHAT, error_of

from layerskip.serve.protocol import NEUTRAL_VALUES


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.json_schema"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": "root ::= a"}, "guided_grammar"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"temprature": 1}, "temprature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty"),
        ({"n": 17}, "n"),
        ({"max_tokens": 1 << 20}, "max_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"top_logprobs": 2}, None),
        ({"layerskip": {"exit_layer": 99}}, None),
        ({"layerskip": {"mode": "plain", "draft_tokens": 2}}, None),
        ({"layerskip": {"draft_from": "nothing"}}, None),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
    ],
    ids=str,
)
def test_field_is_refused_by_name(client, server, fields, param):
    error = error_of(client.post(CHAT, json=server.chat(**fields)), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    if param:
        assert param.split("[")[0] in error["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guided_regex": "("}, "unclosed group"),
        ({"guided_json": "{"}, "not JSON"),
        ({"guided_json": {"type": "text"}}, "Invalid type"),
        ({"guided_regex": "a" * 70_000}, "the limit is 65536"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "give one of response_format"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_grammar_is_refused_in_one_line(client, server, fields, message):
    error = error_of(client.post(CHAT, json=server.chat(**fields)), 400)
    assert message in error["message"]
    assert "\n" not in error["message"]


def test_values_that_ask_for_nothing_are_taken(client, server):
    fields = {name: values[0] for name, values in NEUTRAL_VALUES.items()}
    ignored = {"user": "me", "metadata": {"a": 1}, "seed": None, "suffix": None}
    answer = {"role": "assistant", "content": "Hi", "tool_calls": None, "refusal": None}
    messages = [{"role": "developer", "content": "Be brief."}, answer]
    messages.append({"role": "user", "content": [{"type": "text", "text": "Hello"}]})
    body = server.chat(**fields, **ignored) | {"messages": messages}
    assert client.post(CHAT, json=body).status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff\xfe",
        b'{"messages": ' + b"[" * 100_000,
        b'{"' + b"x" * 100_000 + b'": 1}',
        b'{"seed": ' + b"1" * 6_000 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"\\ud800": 1, "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
        b'{"temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
    ],
    ids=lambda content: str(content[:20]),
)
def test_malformed_body_is_refused(client, content):
    response = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    error_of(response, 404 if b"model" in content else 400)
    assert len(response.content) < 2_000


def test_body_of_another_type_is_refused(client, server):
    # A page of another site may send text without asking first.
    error_of(client.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"}), 400)


def test_prompt_longer_than_the_context_is_refused(client, server):
    error = error_of(client.post(CHAT, json=server.chat("x" * 600)), 400)
    assert error["code"] == "context_length_exceeded"
    body = {"prompt": [300, 1], "max_tokens": 4}
    error_of(client.post("/v1/completions", json=body), 400)
    error_of(client.post("/v1/completions", json={"prompt": []}), 400)


def test_unknown_model_address_and_method(client, server):
    assert (
        error_of(client.post(CHAT, json=server.chat(model="x")), 404)["code"] == "model_not_found"
    )
    error_of(client.get("/v1/models/x"), 404)
    error_of(client.get("/nothing"), 404)
    error_of(client.get(CHAT), 405)


def test_failure_of_one_request_names_nothing_internal_and_ends_nothing_else(client, server):
    server.engine.fail = True
    error = error_of(client.post(CHAT, json=server.chat()), 500)
    assert error["type"] == "server_error"
    assert "secret" not in error["message"]
    assert any("secret" in line for line in server.log)
    server.engine.fail = True
    events = client.post(CHAT, json=server.chat(stream=True)).text.split("\n\n")
    assert '"error"' in events[-3]
    assert events[-2] == "data: [DONE]"
    assert client.post(CHAT, json=server.chat()).status_code == 200


def test_tokenize_and_back(client, server):
    answer = client.post("/tokenize", json={"prompt": "Hi there"}).json()
    assert answer["tokens"] == server.model.tokenize("Hi there")
    assert (answer["count"], answer["max_model_len"]) == (8, 512)
    text = client.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert text == {"prompt": "Hi there"}
    messages = [{"role": "user", "content": "Hi"}]
    chat = client.post("/tokenize", json={"messages": messages}).json()
    assert chat["tokens"] == server.model.tokenize(messages)
    error_of(client.post("/tokenize", json={}), 400)
    error_of(client.post("/detokenize", json={"tokens": [999]}), 400)
