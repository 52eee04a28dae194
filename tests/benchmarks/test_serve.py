"""Figures of a load, and the outcomes of a soak."""

import asyncio

import serve
from serve import Prompt, Reply


def test_row_has_throughput_percentiles_and_errors():
    replies = [
        Reply(submitted=1.0, tokens=11, times=[1.1, 1.6, 2.1]),
        Reply(submitted=1.0, tokens=21, times=[1.3, 3.3]),
        Reply(submitted=1.0, error="status 429: full"),
    ]
    row = serve.row_of(replies, seconds=4.0)
    assert (row["requests"], row["tokens"], row["tokens_per_s"]) == (3, 32, 8.0)
    assert (row["ttft_ms_p50"], row["ttft_ms_p95"]) == (200.0, 290.0)
    assert row["inter_token_ms_p50"] == 100.0
    assert row["errors"] == {"status 429: full": 1}


def test_closed_loop_answers_each_prompt_once(monkeypatch):
    running, most, asked = 0, 0, []

    async def ask(port, model, prompt):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        asked.append(prompt)
        return Reply(0.0)

    monkeypatch.setattr(serve, "ask", ask)
    prompts = [Prompt([i], 1, ()) for i in range(7)]
    replies = asyncio.run(serve.closed_loop(0, "m", prompts, 3))
    assert len(replies) == 7
    assert sorted(one.ids for one in asked) == [[i] for i in range(7)]
    assert most == 3
