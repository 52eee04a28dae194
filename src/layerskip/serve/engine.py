"""`Engine`: answers many requests at once in a thread of its own, and reports their tokens as events."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

from layerskip.decoding import DecodingConfig, LayerSkipModel

FinishReason = Literal["stop", "length", "cancelled"]


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
    """

    prompt: tuple[int, ...]
    config: DecodingConfig = dataclasses.field(default_factory=DecodingConfig)
    num_logprobs: int | None = None
    continues: bool = False


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities at one position: log softmax of the model's logits, before any option.

    Attributes:
        token_id: the token that was chosen.
        logprob: its log probability.
        top: the most likely token ids and their log probabilities, most likely first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


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

    request_id: str

    def cancel(self) -> None:
        """End the answer within one round; thread-safe, and without effect once it has ended.

        `Finished("cancelled", ...)` follows.
        """
        raise NotImplementedError


class Engine:
    """Continuous batching over one model: a request joins between two rounds, and leaves when it ends.

    Args:
        model: the model; the engine's thread alone may use it until `shutdown`.
        kv_cache_tokens: positions of the KV cache, running answers and prefixes kept for reuse
            together; None = what fits in a share of the free memory.
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
        raise NotImplementedError

    def start(self) -> None:
        """Start the engine's thread."""
        raise NotImplementedError

    def shutdown(self, drain_seconds: float) -> None:
        """Take no more requests, finish running and waiting ones within some seconds, and stop.

        What is left then ends as cancelled. Returns when the thread has ended.
        """
        raise NotImplementedError

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
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """Return gauges and counters; thread-safe."""
        raise NotImplementedError
