"""An engine that answers one request at a time, with what `LayerSkipModel.answer` yields."""

import itertools
import queue
import threading
import time
from collections import Counter

from layerskip.serve.engine import (
    EngineStats,
    EngineStopped,
    Failed,
    Finished,
    Handle,
    QueueFull,
    TokenLogprobs,
    Tokens,
)


class _Running(Handle):
    def __init__(self, number):
        self.request_id, self.cancelled = str(number), threading.Event()

    def cancel(self):
        self.cancelled.set()


class StandInEngine:
    """See `Engine`.

    Attributes:
        held: while it is set, no answer goes on.
        fail: the next request fails.
    """

    def __init__(self, model, *, max_queue=256):
        self._model, self._max_queue = model, max_queue
        self._queue = queue.Queue()
        self._numbers = itertools.count()
        self._stopping, self._deadline = False, float("inf")
        self._running = 0
        self._counts = Counter()
        self.resumed = threading.Event()
        self.resumed.set()
        self.fail = False
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def start(self):
        self._thread.start()

    def shutdown(self, drain_seconds):
        self._deadline = time.monotonic() + drain_seconds
        self._stopping = True
        self._queue.put(None)
        self._thread.join()

    def submit(self, request, on_event):
        if self._stopping:
            raise EngineStopped
        if self._queue.qsize() >= self._max_queue + (not self._running):
            raise QueueFull
        config = self._model.resolve(request.config)
        answer = self._model.answer(list(request.prompt), config)
        handle = _Running(next(self._numbers))
        self._queue.put((handle, request, answer, on_event))
        return handle

    def stats(self):
        none = {}
        return EngineStats(
            num_requests_running=self._running,
            num_requests_waiting=self._queue.qsize(),
            kv_cache_tokens_used=0,
            kv_cache_tokens_active=0,
            kv_cache_tokens_total=1000,
            prefix_cache_queries=0,
            prefix_cache_hits=0,
            prompt_tokens=self._counts["prompt"],
            generation_tokens=self._counts["generation"],
            num_drafts=none,
            num_draft_tokens={"n-gram": self._counts["drafted"]},
            num_accepted_tokens={"n-gram": self._counts["accepted"]},
            num_accepted_tokens_per_pos={"n-gram": (self._counts["accepted"], 0)},
        )

    def _loop(self):
        while (job := self._queue.get()) is not None:
            handle, request, answer, on_event = job
            self._running = 1
            try:
                self._answer(handle, request, answer, on_event)
            except Exception as error:
                on_event(Failed(f"{type(error).__name__}: {error}"))
            self._running = 0

    def _answer(self, handle, request, answer, on_event):
        if self.fail:
            self.fail = False
            raise RuntimeError("/a/secret/path is broken")
        cancelled = False
        for piece in answer:
            while not self.resumed.wait(0.01) and not handle.cancelled.is_set():
                pass
            if handle.cancelled.is_set() or time.monotonic() > self._deadline:
                cancelled = True
                break
            tokens = () if piece.token_id is None else (piece.token_id,)
            logprobs = None
            if request.num_logprobs is not None:
                top = tuple((i, -1.0 - i) for i in range(3, 3 + request.num_logprobs))
                logprobs = tuple(TokenLogprobs(token, -0.5, top) for token in tokens)
            on_event(Tokens(piece.text, tokens, (piece.source,) * len(tokens), logprobs))
        g = answer.generation
        self._counts.update(prompt=g.prompt_tokens, generation=g.new_tokens)
        self._counts.update(drafted=g.drafted, accepted=g.accepted)
        on_event(
            Finished(
                finish_reason="cancelled" if cancelled else g.finish_reason,
                prompt_tokens=g.prompt_tokens,
                completion_tokens=g.new_tokens,
                cached_tokens=0,
                drafted=g.drafted,
                accepted=g.accepted,
                rounds=g.rounds,
                by_source={"n-gram": (g.drafted, g.accepted)},
                accepted_prediction_tokens=0,
                rejected_prediction_tokens=0,
                ttft_s=g.ttft_s,
                decode_s=g.decode_s,
            )
        )
