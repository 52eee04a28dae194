"""OpenAI's own clients and LiteLLM's, unchanged."""

import asyncio
import itertools
import json
import os
import re
import subprocess
import sys

import openai
import pytest

MESSAGES = [{"role": "user", "content": "Hello"}]
OPTIONS = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}


@pytest.fixture
def api(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture
def expected(server):
    return server.model.generate(MESSAGES, max_new_tokens=12)


def test_chat_answer_is_that_of_generate(api, expected):
    answer = api.chat.completions.create(**OPTIONS)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason == "length"
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == expected.prompt_tokens + 12
    assert answer.model == "tiny"


def test_streamed_chat_has_the_same_text_and_usage(api, expected):
    options = {"stream_options": {"include_usage": True}}
    chunks = list(api.chat.completions.create(**OPTIONS, stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == expected.text
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-2].choices[0].finish_reason == "length"


def test_async_clients_are_answered_side_by_side(server, expected):
    async def answers():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as api:
            whole, stream = await asyncio.gather(
                api.chat.completions.create(**OPTIONS),
                api.chat.completions.create(**OPTIONS, stream=True),
            )
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return whole.choices[0].message.content, "".join(pieces)

    assert asyncio.run(answers()) == (expected.text, expected.text)


def test_logprobs_have_text_bytes_and_alternatives(api, expected):
    answer = api.chat.completions.create(**OPTIONS, logprobs=True, top_logprobs=3)
    positions = answer.choices[0].logprobs.content
    assert len(positions) == 12
    text = b"".join(bytes(position.bytes) for position in positions)
    assert text.decode(errors="replace") == expected.text
    for position in positions:
        assert position.logprob <= 0
        assert len(position.top_logprobs) == 3
        logprobs = [one.logprob for one in position.top_logprobs]
        assert logprobs == sorted(logprobs, reverse=True)


def test_json_answers_follow_their_schema(api):
    town = {"type": "string", "maxLength": 3}
    schema = {"type": "object", "properties": {"town": town, "days": {"enum": [1, 2]}}}
    schema |= {"required": ["town", "days"], "additionalProperties": False}
    named = {"type": "json_schema", "json_schema": {"name": "trip", "schema": schema}}
    options = OPTIONS | {"max_tokens": 60, "temperature": 2}
    for fields in ({"response_format": named}, {"extra_body": {"guided_json": schema}}):
        answer = api.chat.completions.create(**options, **fields)
        assert list(json.loads(answer.choices[0].message.content)) == ["town", "days"]
        assert answer.choices[0].finish_reason == "stop"
        drafted, accepted = answer.layerskip["by_source"]["grammar"]
        assert 0 < accepted <= drafted


def test_json_mode_writes_an_object(api):
    options = OPTIONS | {"max_tokens": 40, "temperature": 2}
    answer = api.chat.completions.create(**options, response_format={"type": "json_object"})
    assert answer.choices[0].message.content.startswith("{")


def test_other_grammars_are_taken_as_in_vllm(api):
    options = OPTIONS | {"max_tokens": 60, "temperature": 2, "stream": True}
    choices = ["a b-c", "(", "x\\"]
    for seed in range(3):
        chunks = api.chat.completions.create(
            **options, seed=seed, extra_body={"guided_choice": choices}
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) in choices
    chunks = api.chat.completions.create(**options, extra_body={"guided_regex": "[0-9]{3}"})
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert len(text) == 3
    assert text.isdigit()


def test_three_sampled_answers_differ_and_repeat_with_their_seed(api):
    options = {**OPTIONS, "temperature": 1.5, "n": 3, "seed": 7}
    first, second = (api.chat.completions.create(**options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert [choice.message.content for choice in second.choices] == texts
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert first.usage.completion_tokens == 36


def test_streamed_answers_are_told_apart_by_their_index(api):
    options = {**OPTIONS, "temperature": 1.5, "n": 3, "seed": 7}
    whole = api.chat.completions.create(**options)
    texts = [""] * 3
    for chunk in api.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_stop_string_ends_the_answer_before_it(api, expected):
    stop = expected.text[5:7]
    answer = api.chat.completions.create(**OPTIONS, stop=[stop, "\N{SNOWMAN}"])
    assert answer.choices[0].message.content == expected.text[: expected.text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_options_of_sampling_are_those_of_generate(api, server):
    options = {"frequency_penalty": 1.5, "presence_penalty": 0.5, "temperature": 0.8, "seed": 3}
    vllm = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2, "ignore_eos": True}
    answer = api.chat.completions.create(**{**OPTIONS, **options}, top_p=0.9, extra_body=vllm)
    expected = server.model.generate(
        MESSAGES, max_new_tokens=12, top_p=0.9, mode="plain", **options, **vllm
    )
    plain = api.chat.completions.create(
        **{**OPTIONS, **options}, top_p=0.9, extra_body={**vllm, "layerskip": {"mode": "plain"}}
    )
    assert plain.choices[0].message.content == expected.text
    assert answer.usage.completion_tokens == 12


def test_predicted_output_is_accepted_where_it_is_right(api, server):
    # Of most answers of random weights no text gives the tokens again.
    for number in itertools.count():
        messages = [{"role": "user", "content": f"Number {number}"}]
        expected = server.model.generate(messages, max_new_tokens=24).text
        if re.search(r"[ -~]{6}", expected):
            break
    answer = api.chat.completions.create(
        **{**OPTIONS, "messages": messages, "max_tokens": 24},
        prediction={"type": "content", "content": expected},
        extra_body={"layerskip": {"draft_from": "prediction"}},
    )
    assert answer.choices[0].message.content == expected
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens > 0


def test_answer_reports_its_drafts_and_their_sources(api):
    body = {"layerskip": {"mode": "self-speculative", "exit_layer": 2, "sources": True}}
    answer = api.chat.completions.create(**OPTIONS, extra_body=body)
    report = answer.layerskip
    assert report["mode"] == "self-speculative"
    assert report["drafted"] == report["by_source"]["early-exit"][0] > 0
    assert report["accepted"] == report["by_source"]["early-exit"][1]
    (runs,) = report["sources"]
    assert "".join(run["text"] for run in runs) == answer.choices[0].message.content
    assert {run["source"] for run in runs} <= {"model", "early-exit"}


def test_completions_take_texts_and_token_ids(api, server):
    texts = ["Once", "upon a"]
    ids = [server.model.tokenize(text) for text in texts]
    expected = [server.model.generate(text, max_new_tokens=16).text for text in texts]
    for prompt in (texts, ids):
        answer = api.completions.create(model="tiny", prompt=prompt, temperature=0)
        assert [choice.text for choice in answer.choices] == expected
        assert answer.usage.completion_tokens == 32


def test_completion_with_echo_and_logprobs(api):
    options = {"model": "tiny", "prompt": "Once", "temperature": 0, "max_tokens": 5}
    assert api.completions.create(**options, echo=True).choices[0].text.startswith("Once")
    choice = api.completions.create(**options, logprobs=2).choices[0]
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == 5
    assert len(choice.logprobs.top_logprobs[0]) == 2
    assert choice.logprobs.text_offset[:2] == [0, len(choice.logprobs.tokens[0])]
    pieces = api.completions.create(**options, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == choice.text


def test_models_and_errors_reach_the_client(api):
    assert [model.id for model in api.models.list()] == ["tiny"]
    assert api.models.retrieve("tiny").max_model_len == 512
    with pytest.raises(openai.NotFoundError, match="'gpt-4'"):
        api.chat.completions.create(**{**OPTIONS, "model": "gpt-4"})
    with pytest.raises(openai.BadRequestError, match="'tools' is not supported"):
        api.chat.completions.create(**OPTIONS, tools=[{"type": "function"}])


def test_litellm_streams_an_answer(server, expected):
    script = (
        "import litellm, sys\n"
        "pieces = litellm.completion(model='openai/tiny', api_base=sys.argv[1], api_key='none',"
        " messages=[{'role': 'user', 'content': 'Hello'}], max_tokens=12, temperature=0, stream=True)\n"
        "text = ''.join(piece.choices[0].delta.content or '' for piece in pieces)\n"
        "sys.stdout.buffer.write(text.encode())"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, f"{server.url}/v1"],
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True,
        check=True,
    )
    assert result.stdout.decode() == expected.text
