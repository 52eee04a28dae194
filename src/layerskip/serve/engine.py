"""`Engine`: answers many requests at once in a thread of its own, and reports their tokens as events.

Its loop is `Engine._work`. A round is `Batch.step` in `decoding/batch.py`: schedule, run, postprocess.
"""

import collections
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch

from layerskip.decoding import DecodingConfig, LayerSkipModel, Step
from layerskip.decoding.batch import Batch, Output
from layerskip.decoding.controller import time_passes
from layerskip.decoding.generate import Row
from layerskip.decoding.sampling import LogitsMask, TokenLogprobs
from layerskip.decoding.streaming import TextStream
from layerskip.model import Decoder

FinishReason = Literal["stop", "length", "cancelled"]

logger = logging.getLogger(__name__)
_MEMORY_SHARE = 0.25  # of the free memory, for the KV cache


class QueueFull(Exception):  # noqa: N818
    """As many requests as `max_queue` are waiting already."""


class EngineStopped(Exception):  # noqa: N818
    """The engine is shutting down and takes no more requests."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how to continue it.

    Attributes:
        prompt: token ids.
        config: options of decoding; those left open are resolved for the model.
        num_logprobs: number of most likely tokens to report at each position; 0 reports the chosen
            token's alone, None nothing.
        continues: whether the text goes on where the prompt's ends (a completion), or begins anew (a
            chat turn).
        logits_mask: the tokens that may follow, where the config has no grammar; called in the engine's
            thread.
    """

    prompt: tuple[int, ...]
    config: DecodingConfig = dataclasses.field(default_factory=DecodingConfig)
    num_logprobs: int | None = None
    continues: bool = False
    logits_mask: LogitsMask | None = None


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Event: tokens that one round added to an answer.

    Attributes:
        text: what they release; it may be empty or belong to earlier tokens, since text is held back
            while a character is incomplete or a stop string may begin. The last event of an answer may
            have text without tokens.
        token_ids: the new tokens. An end token is among them; tokens of a stop string may be.
        sources: for each token the drafter that proposed it ("early-exit", "n-gram", "datastore",
            "prediction", ...), or "model".
        logprobs: one for each token, where the request asks for them.
    """

    text: str
    token_ids: tuple[int, ...]
    sources: tuple[str, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Finished:
    """Event: the end of an answer; no other follows.

    Attributes:
        finish_reason: "stop" at an end token or stop string, "length" at max_new_tokens or at the end
            of the context, "cancelled".
        prompt_tokens: number of tokens of the prompt.
        completion_tokens: number of tokens of the answer, an end token included.
        cached_tokens: number of prompt tokens whose keys and values were reused.
        drafted: number of drafted tokens.
        accepted: number of drafted tokens that the model agreed with.
        rounds: passes after the prompt's own, with drafts or without.
        by_source: (drafted, accepted) of each source of drafts.
        accepted_prediction_tokens: tokens of the request's prediction that are in the answer.
        rejected_prediction_tokens: tokens of the prediction that were drafted and not accepted.
        ttft_s: seconds from submission to the first token; those to the end if there was none.
        decode_s: seconds from the first token to the last.
    """

    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    drafted: int
    accepted: int
    rounds: int
    by_source: Mapping[str, tuple[int, int]]
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    ttft_s: float
    decode_s: float


@dataclasses.dataclass(frozen=True)
class Failed:
    """Event: an internal error of this request alone; no other event follows.

    Attributes:
        message: one line for the log.
    """

    message: str


Event = Tokens | Finished | Failed


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Gauges, and counters since the start.

    Attributes:
        num_requests_running: answers that are being computed.
        num_requests_waiting: requests in the queue.
        kv_cache_tokens_used: positions held by running answers and by prefixes kept for reuse.
        kv_cache_tokens_active: those of running answers alone.
        kv_cache_tokens_total: positions that the cache holds.
        prefix_cache_queries: prompt tokens that were looked up.
        prefix_cache_hits: prompt tokens that were reused.
        prompt_tokens: tokens of admitted prompts.
        generation_tokens: tokens of answers.
        num_drafts: for each source, rounds of a request in which it drafted.
        num_draft_tokens: for each source, drafted tokens.
        num_accepted_tokens: for each source, those accepted.
        num_accepted_tokens_per_pos: for each source, accepted tokens by position in the draft.
    """

    num_requests_running: int
    num_requests_waiting: int
    kv_cache_tokens_used: int
    kv_cache_tokens_active: int
    kv_cache_tokens_total: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    prompt_tokens: int
    generation_tokens: int
    num_drafts: Mapping[str, int]
    num_draft_tokens: Mapping[str, int]
    num_accepted_tokens: Mapping[str, int]
    num_accepted_tokens_per_pos: Mapping[str, tuple[int, ...]]


class Handle:
    """A submitted request.

    Attributes:
        request_id: unique in the engine.
    """

    def __init__(self, request_id: str, cancel: Callable[[], None]) -> None:
        self.request_id, self._cancel = request_id, cancel

    def cancel(self) -> None:
        """End the answer within one round; thread-safe, and without effect once it has ended.

        `Finished("cancelled", ...)` follows.
        """
        self._cancel()


class _Speculation:
    """Counts of drafts by source."""

    def __init__(self) -> None:
        self.drafts: collections.Counter[str] = collections.Counter()
        self.drafted: collections.Counter[str] = collections.Counter()
        self.accepted: collections.Counter[str] = collections.Counter()
        self.accepted_per_pos: dict[str, list[int]] = {}

    def add(self, step: Step) -> None:
        """Count a step."""
        sources = step.sources[: step.drafted]
        self.drafts.update({*sources})
        self.drafted.update(sources)
        for i, source in enumerate(sources[: step.accepted]):
            self.accepted[source] += 1
            counts = self.accepted_per_pos.setdefault(source, [])
            counts += [0] * (i + 1 - len(counts))
            counts[i] += 1


class _Answer:
    """A request on its way: its row, text, and what is reported at its end."""

    def __init__(
        self, row: Row, text: TextStream | None, on_event: Callable[[Event], None]
    ) -> None:
        self.row, self.text, self.on_event = row, text, on_event
        self.speculation = _Speculation()
        self.rounds = self.completion_tokens = 0
        self.submitted = time.perf_counter()
        self.first_token_at: float | None = None

    def tokens(self, output: Output) -> tuple[Tokens, Step]:
        """Return the event of a round's tokens, and its step as far as a stop string."""
        step, text, logprobs = output.step, "", output.logprobs
        assert step is not None
        if self.text is not None and self.text.may_stop:
            for n, token in enumerate(step.tokens, 1):
                text += self.text.push(token)
                if self.text.stopped:
                    step, logprobs = step.first(n), logprobs and logprobs[:n]
                    break
        elif self.text is not None:
            text = self.text.push(*step.tokens)
        if self.text is not None and self.ended:
            text += self.text.finish()
        now = time.perf_counter()
        if self.first_token_at is None:
            self.first_token_at = now
        else:
            self.rounds += 1
        self.last_token_at = now
        self.completion_tokens += len(step.tokens)
        self.speculation.add(step)
        n_model_tokens = len(step.tokens) - step.accepted
        sources = (*step.sources[: step.accepted], *["model"] * n_model_tokens)
        return Tokens(text, step.tokens, sources, logprobs), step

    @property
    def ended(self) -> bool:
        """True after the last token."""
        return self.row.criteria.finished or (self.text is not None and self.text.stopped)

    def finished(self, reason: FinishReason) -> Finished:
        """Return the last event."""
        now = time.perf_counter()
        first = now if self.first_token_at is None else self.first_token_at
        drafted, accepted = self.speculation.drafted, self.speculation.accepted
        from_prediction = accepted["prediction"]
        return Finished(
            finish_reason=reason,
            prompt_tokens=self.row.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cached_tokens=self.row.cached_tokens,
            drafted=drafted.total(),
            accepted=accepted.total(),
            rounds=self.rounds,
            by_source={source: (n, accepted[source]) for source, n in drafted.items()},
            accepted_prediction_tokens=from_prediction,
            rejected_prediction_tokens=drafted["prediction"] - from_prediction,
            ttft_s=first - self.submitted,
            decode_s=0.0 if self.first_token_at is None else self.last_token_at - first,
        )


class Engine:
    """Continuous batching over one model: a request joins between two rounds, and leaves when it ends.

    Args:
        model: the model; the engine's thread alone may use it until `shutdown`.
        kv_cache_tokens: positions of the KV cache, running answers and prefixes kept for reuse
            together; None = what fits in a quarter of the free memory.
        max_num_seqs: number of answers computed at once.
        max_queue: number of requests that wait at most.
        prefill_chunk: prompt tokens computed between two rounds.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        *,
        kv_cache_tokens: int | None = None,
        max_num_seqs: int = 16,
        max_queue: int = 256,
        prefill_chunk: int = 512,
    ) -> None:
        self._model, self._max_queue = model, max_queue
        if kv_cache_tokens is None:
            kv_cache_tokens = default_kv_cache_tokens(model.decoder, max_num_seqs)
        self._kv_cache_tokens = kv_cache_tokens
        self._new_batch = lambda: Batch(
            model.decoder,
            max_num_seqs=max_num_seqs,
            kv_cache_tokens=kv_cache_tokens,
            prefill_chunk=prefill_chunk,
            reuse_prefixes=True,
            measured=model.settings.measured,
        )
        self._batch = self._new_batch()
        self._answers: dict[Row, _Answer] = {}
        self._ids = itertools.count(1)
        self._thread = threading.Thread(target=self._work, name="layerskip-engine", daemon=True)
        # The next ones are shared by threads, and guarded by the condition.
        self._condition = threading.Condition()
        self._submitted: collections.deque[_Answer] = collections.deque()
        self._cancelled: list[_Answer] = []
        self._accepts, self._deadline = False, float("inf")
        self._speculation = _Speculation()
        self._prompt_tokens = self._generation_tokens = self._prefix_hits = 0

    def start(self) -> None:
        """Start the engine's thread; times the machine's passes first, where that has not been done."""
        time_passes(self._model.decoder, self._model.adapter)
        self._accepts = True
        self._thread.start()

    def shutdown(self, drain_seconds: float) -> None:
        """Take no more requests, finish running and waiting ones within some seconds, and stop.

        What is left then ends as cancelled. Returns when the thread has ended. A second call, from
        another thread, can shorten the time.
        """
        with self._condition:
            self._accepts = False
            self._deadline = min(self._deadline, time.monotonic() + drain_seconds)
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Handle:
        """Queue a request; thread-safe.

        Args:
            request: the prompt and its options.
            on_event: called in the engine's thread; it has to return at once. Any number of `Tokens`,
                then one `Finished` or `Failed`.

        Raises:
            QueueFull: as many requests as `max_queue` are waiting.
            EngineStopped: the engine is shutting down, or has not been started.
            ValueError: the prompt or an option cannot be used, or prompt and answer can never fit in
                the KV cache; one line says why.
        """
        model = self._model
        config = model.resolve(request.config)
        row = Row(
            model.decoder,
            request.prompt,
            config,
            eos_token_ids=model.eos_token_ids(config),
            measured=model.settings.measured,
            adapter=model.adapter,
            logits_mask=request.logits_mask or model.constraint(config),
            num_logprobs=request.num_logprobs,
        )
        self._batch.check_fit(row)
        text = None
        if model.tokenizer is not None:
            before = request.prompt if request.continues else ()
            text = TextStream(model.tokenizer, config.stop, before)
        answer = _Answer(row, text, on_event)
        with self._condition:
            if not self._accepts:
                raise EngineStopped("the engine is shutting down; send the request again later")
            if self._num_waiting >= self._max_queue:
                raise QueueFull(f"{self._max_queue} requests are waiting; try again later")
            self._submitted.append(answer)
            self._condition.notify()
        return Handle(f"{next(self._ids)}", lambda: self._cancel(answer))

    def stats(self) -> EngineStats:
        """Return gauges and counters; thread-safe."""
        with self._condition:
            counts = self._speculation
            return EngineStats(
                num_requests_running=len(self._batch.running),
                num_requests_waiting=self._num_waiting,
                kv_cache_tokens_used=self._batch.used_tokens,
                kv_cache_tokens_active=self._batch.active_tokens,
                kv_cache_tokens_total=self._kv_cache_tokens,
                prefix_cache_queries=self._prompt_tokens,
                prefix_cache_hits=self._prefix_hits,
                prompt_tokens=self._prompt_tokens,
                generation_tokens=self._generation_tokens,
                num_drafts=dict(counts.drafts),
                num_draft_tokens=dict(counts.drafted),
                num_accepted_tokens=dict(counts.accepted),
                num_accepted_tokens_per_pos={
                    source: tuple(by_pos) for source, by_pos in counts.accepted_per_pos.items()
                },
            )

    @property
    def _num_waiting(self) -> int:
        return len(self._submitted) + len(self._batch.waiting)

    def _cancel(self, answer: _Answer) -> None:
        with self._condition:
            self._cancelled.append(answer)
            self._condition.notify()

    # --- the engine's thread

    def _work(self) -> None:
        """Run rounds until the engine is shut down."""
        while self._receive():
            try:
                outputs = self._batch.step()
            except Exception as error:  # of no single row
                logger.exception("a round has failed")
                failed = (*self._batch.running, *self._batch.waiting)
                outputs = [Output(row, error=error) for row in failed]
                self._batch = self._new_batch()
            for output in outputs:
                self._report(output)

    def _receive(self) -> bool:
        """Take in requests and cancellations, waiting for one if there is nothing to do.

        Returns False at the end.
        """
        with self._condition:
            while not (self._answers or self._submitted):
                if not self._accepts:
                    return False
                self._condition.wait()
            is_late = time.monotonic() >= self._deadline
            submitted, self._submitted = self._submitted, collections.deque()
            for answer in submitted:
                self._answers[answer.row] = answer
                self._batch.waiting.append(answer.row)
            cancelled, self._cancelled = self._cancelled, []
        for answer in list(self._answers.values()) if is_late else cancelled:
            if self._answers.get(answer.row) is answer:
                self._batch.remove(answer.row)
                self._finish(answer, "cancelled")
        return True

    def _report(self, output: Output) -> None:
        """Send the events of a row's round."""
        answer = self._answers[output.row]
        if output.step is None:
            error = output.error
            self._end(answer, Failed(f"{type(error).__name__}: {error}".splitlines()[0]))
            return
        is_first = answer.first_token_at is None
        event, step = answer.tokens(output)
        with self._condition:
            if is_first:
                self._prompt_tokens += answer.row.prompt_tokens
                self._prefix_hits += answer.row.cached_tokens
            self._generation_tokens += len(step.tokens)
            self._speculation.add(step)
        if not self._send(answer, event):
            self._batch.remove(answer.row)
            del self._answers[answer.row]
        elif answer.ended:
            self._batch.remove(answer.row)  # a stop string ends a row that would go on
            is_end = step.tokens[-1] in answer.row.criteria.eos_token_ids
            stopped = is_end or (answer.text is not None and answer.text.stopped)
            self._finish(answer, "stop" if stopped else "length")

    def _finish(self, answer: _Answer, reason: FinishReason) -> None:
        self._end(answer, answer.finished(reason))

    def _end(self, answer: _Answer, event: Event) -> None:
        del self._answers[answer.row]
        self._send(answer, event)

    def _send(self, answer: _Answer, event: Event) -> bool:
        """Call back; return whether that was possible."""
        try:
            answer.on_event(event)
        except Exception:
            logger.exception("an event could not be delivered")
            return False
        return True


def default_kv_cache_tokens(decoder: Decoder, max_num_seqs: int) -> int:
    """Return the positions that fit in a share of the free memory, at most two contexts an answer."""
    a = decoder.architecture
    n_bytes = 2 * a.n_layers * a.n_kv_heads * a.head_dim * decoder.dtype.itemsize
    fitting = int(_MEMORY_SHARE * _free_memory(decoder.device)) // n_bytes
    return max(1, min(fitting, 2 * max_num_seqs * a.max_context))


_LIMITS = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"


def _free_memory(device: torch.device) -> int:
    """Return the bytes that can be allocated, within the container's limit; without Linux a guess."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = 4 << 30
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
        limit, current = (int(Path(file).read_text()) for file in _LIMITS)
        free = min(free, limit - current)
    except (OSError, ValueError, KeyError):  # no such files, or no limit ("max")
        pass
    return free
