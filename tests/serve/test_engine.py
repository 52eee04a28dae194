"""`Engine`: many requests at once, in a thread, reported as events."""

import dataclasses
import queue
import random
import threading

import pytest
from scripted import OTHER_END, encode, scripted_model
from tiny_decoders import FREE, PLAIN, model_of, random_prompt, tiny_decoder

from layerskip.decoding import DecodingConfig, PromptError
from layerskip.serve.engine import (
    Engine,
    EngineStopped,
    Failed,
    Finished,
    QueueFull,
    Request,
    Tokens,
)

SECONDS = 60  # that a test waits for an event at most
SPECULATIVE = DecodingConfig(mode="self-speculative", exit_layer=2, draft_tokens=4)
AUTO = DecodingConfig(exit_layer=1)


class Client:
    """A request, and the events that have come."""

    def __init__(self, engine, prompt, config=PLAIN, **options):
        self.events = queue.Queue()
        self.prompt, self.config = tuple(prompt), config
        self.tokens, self.text, self.sources, self.logprobs = [], "", [], []
        request = Request(prompt=self.prompt, config=config, **options)
        self.handle = engine.submit(request, self.events.put)

    def next(self):
        event = self.events.get(timeout=SECONDS)
        if isinstance(event, Tokens):
            assert len(event.token_ids) == len(event.sources)
            self.tokens += event.token_ids
            self.sources += event.sources
            self.text += event.text
            self.logprobs += event.logprobs or ()
        return event

    def end(self):
        """Return the last event."""
        while isinstance(event := self.next(), Tokens):
            pass
        assert self.events.empty()
        return event


def limited(config, n, **options):
    return dataclasses.replace(config, max_new_tokens=n, **options)


@pytest.fixture
def started():
    """Return a function that starts an engine, which is shut down at the end."""
    engines = []

    def start(model, **options):
        engine = Engine(model, **{"kv_cache_tokens": 4000, **options})
        engines.append(engine)
        engine.start()
        return engine

    yield start
    for engine in engines:
        engine.shutdown(0)
        assert not engine._thread.is_alive()


@pytest.fixture
def model():
    return model_of(tiny_decoder("llama3.1"), measured=FREE)


@pytest.fixture
def paused(model, monkeypatch):
    """A lock that holds the engine's thread back before each round."""
    lock, embed = threading.Lock(), model.decoder.embed

    def waiting(tokens):
        with lock:
            return embed(tokens)

    monkeypatch.setattr(model.decoder, "embed", waiting)
    return lock


@pytest.mark.parametrize("seed", range(3))
def test_requests_of_many_threads_get_the_answers_of_generate(started, model, seed):
    engine, clients, failures = started(model, max_num_seqs=4, prefill_chunk=16), [], []

    def send(thread):
        choose = random.Random(10 * seed + thread)
        for i in range(5):
            prompt = random_prompt(model.decoder, choose.randint(1, 40), seed=100 * thread + i)
            config = choose.choice([PLAIN, SPECULATIVE, AUTO])
            client = Client(engine, prompt, limited(config, choose.randint(1, 30)))
            if choose.random() < 0.2:
                client.next()
                client.handle.cancel()
            try:
                clients.append((client, client.end()))
            except queue.Empty as error:
                failures.append(error)

    threads = [threading.Thread(target=send, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(clients) == 20
    for client, event in clients:
        assert isinstance(event, Finished)
        n = client.config.max_new_tokens
        if event.finish_reason == "cancelled":
            assert len(client.tokens) <= n
        else:
            assert (event.finish_reason, len(client.tokens)) == ("length", n)
        assert event.completion_tokens == len(client.tokens)
        whole = model.generate(list(client.prompt), client.config).token_ids
        assert client.tokens == whole[: len(client.tokens)]
    stats = engine.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting) == (0, 0)
    assert stats.kv_cache_tokens_active == 0
    assert stats.generation_tokens == sum(len(client.tokens) for client, _ in clients)
    drafted = sum(event.drafted for _, event in clients)
    assert drafted == sum(stats.num_draft_tokens.values()) > 0
    for source, by_pos in stats.num_accepted_tokens_per_pos.items():
        assert sum(by_pos) == stats.num_accepted_tokens[source]


def test_sources_and_counts_tell_where_tokens_came_from(started, model):
    client = Client(started(model), random_prompt(model.decoder, 6) * 4, limited(AUTO, 40))
    event = client.end()
    accepted = sum(n for _, n in event.by_source.values())
    assert event.accepted == accepted == len(client.tokens) - client.sources.count("model")
    assert event.drafted == sum(n for n, _ in event.by_source.values())
    assert {*client.sources} - {"model"} <= {*event.by_source} <= {"early-exit", "n-gram"}
    assert accepted
    assert 0 < event.rounds < 40
    assert event.ttft_s >= 0 <= event.decode_s


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(started):
    model = scripted_model(encode("one two STOP three"), prompt_tokens=1)
    engine = started(model, kv_cache_tokens=100)
    for config in (PLAIN, DecodingConfig(exit_layer=2)):
        client = Client(engine, [0], limited(config, 20, stop=("STOP",)))
        assert client.end().finish_reason == "stop"
        assert client.text == "one two "
        assert client.tokens == encode("one two STOP")
    client = Client(engine, [0], limited(PLAIN, 7))
    assert client.end().finish_reason == "length"
    assert client.text == "one two"


def test_an_end_token_ends_an_answer(started):
    model = scripted_model([*encode("ab"), OTHER_END], end_tokens=(OTHER_END,), prompt_tokens=1)
    client = Client(started(model, kv_cache_tokens=100), [0], limited(PLAIN, 20))
    assert client.end().finish_reason == "stop"
    assert (client.text, client.tokens) == ("ab", [*encode("ab"), OTHER_END])


def test_the_next_turn_of_a_conversation_reuses_the_last(started, model):
    engine, prompt = started(model), random_prompt(model.decoder, 40)
    first = Client(engine, prompt, limited(PLAIN, 10))
    assert first.end().cached_tokens == 0
    second = Client(engine, [*prompt, *first.tokens, 3, 4], limited(PLAIN, 10))
    assert second.end().cached_tokens == 49
    stats = engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (40 + 52, 49)
    assert stats.kv_cache_tokens_used >= 61


def test_log_probabilities_come_with_the_tokens(started, model):
    client = Client(started(model), [5, 6], limited(SPECULATIVE, 8), num_logprobs=2)
    client.end()
    assert [one.token_id for one in client.logprobs] == client.tokens
    for one in client.logprobs:
        assert len(one.top) == 2
        assert one.top[0] == (one.token_id, pytest.approx(one.logprob))  # greedy


def test_a_cancelled_request_ends_in_one_round(started, model, paused):
    engine = started(model, max_num_seqs=1)
    running = Client(engine, [5], limited(PLAIN, 50))
    waiting = Client(engine, [6], limited(PLAIN, 50))
    running.next()
    with paused:
        before = len(running.tokens) + running.events.qsize()
        waiting.handle.cancel()
        running.handle.cancel()
    for client in (running, waiting):
        assert client.end().finish_reason == "cancelled"
    assert len(running.tokens) <= before + 1
    assert waiting.tokens == []
    running.handle.cancel()  # once more, without effect
    assert Client(engine, [5], limited(PLAIN, 2)).end().finish_reason == "length"


def test_the_queue_is_bounded(started, model, paused):
    engine = started(model, max_num_seqs=1, max_queue=2)
    with paused:
        clients = [Client(engine, [5], limited(PLAIN, 2))]
        while engine.stats().num_requests_running == 0:
            pass
        clients += [Client(engine, [5], limited(PLAIN, 2)) for _ in range(2)]
        assert engine.stats().num_requests_waiting == 2
        with pytest.raises(QueueFull, match="2 requests are waiting"):
            Client(engine, [5])
    assert {client.end().finish_reason for client in clients} == {"length"}


def test_requests_that_can_never_be_answered_are_refused(started, model):
    engine = started(model, kv_cache_tokens=50)
    for prompt, config, message in (
        ([5] * 40, limited(PLAIN, 20), "may have 59 tokens, the KV cache holds 50"),
        ([], PLAIN, "the prompt is empty"),
        ([10**6], PLAIN, "outside the vocabulary"),
        ([5], DecodingConfig(exit_layer=99), "exit layer 99 is out of range"),
        ([5], limited(PLAIN, 5, stop=("x",)), "stop strings need a tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            Client(engine, prompt, config)
    assert issubclass(PromptError, ValueError)


def test_an_error_ends_one_request_alone(started, model, monkeypatch):
    def broken(tokens):
        raise RuntimeError("broken\nmask")

    engine = started(model)
    good = Client(engine, [5, 6], limited(SPECULATIVE, 40))
    bad = Client(engine, [7], limited(PLAIN, 40), logits_mask=broken)
    assert bad.end() == Failed("RuntimeError: broken")
    assert good.end().finish_reason == "length"
    assert good.tokens == model.generate([5, 6], max_new_tokens=40, mode="plain").token_ids


def test_a_client_that_raises_is_dropped(started, model):
    def raises(event):
        raise OSError("gone")

    engine = started(model)
    engine.submit(Request(prompt=(5,), config=limited(PLAIN, 40)), raises)
    assert Client(engine, [6], limited(PLAIN, 20)).end().finish_reason == "length"
    assert engine.stats().num_requests_running == 0


def test_a_failing_round_ends_its_requests_and_the_engine_goes_on(started, model, monkeypatch):
    engine = started(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(engine._batch), "schedule", lambda self: 1 / 0)
        client = Client(engine, [5], limited(PLAIN, 4))
        assert client.end() == Failed("ZeroDivisionError: division by zero")
    assert Client(engine, [6], limited(PLAIN, 4)).end().finish_reason == "length"


def test_shutdown_finishes_running_answers_and_refuses_new_ones(model):
    engine = Engine(model, kv_cache_tokens=1000)
    with pytest.raises(EngineStopped):
        Client(engine, [5])
    engine.start()
    client = Client(engine, [5], limited(PLAIN, 30))
    engine.shutdown(SECONDS)
    assert client.end().finish_reason == "length"
    with pytest.raises(EngineStopped, match="shutting down"):
        Client(engine, [5])


def test_shutdown_cancels_what_takes_too_long(model, paused):
    engine = Engine(model, kv_cache_tokens=1000)
    engine.start()
    client = Client(engine, [5], limited(PLAIN, 60))
    with paused:
        stopping = threading.Thread(target=engine.shutdown, args=(0,))
        stopping.start()
        while engine._accepts:
            pass
    stopping.join()
    assert client.end().finish_reason == "cancelled"
