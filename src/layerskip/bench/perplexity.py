"""Perplexity of every exit on a text, from one pass over windows of it.

The text is tokenized in one piece, after the tokenizer's begin-of-text token (else its end-of-text
token), so that every token is predicted, once. A window holds `window` tokens of context; the next one
ends `stride` tokens later and scores only the tokens that the one before did not reach, so that each
has at least window - stride + 1 tokens before it. With the sum N of negative log-likelihoods in nats:

- token perplexity exp(N / tokens) depends on the tokenizer, and compares exits of one model.
- word perplexity exp(N / words), words as white space separates them, and bits per byte of UTF-8,
  N / (ln 2 * bytes), compare models too.
- the standard error assumes that windows are independent (delta method; none for a single window).
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from layerskip.bench.bench import Metric
from layerskip.bench.quality import Passage, Score, score_passages
from layerskip.decoding import LayerSkipModel


def stride_of(model: LayerSkipModel, window: int, stride: int | None) -> tuple[int, int]:
    """Return window and stride in tokens, within the model's context; the default is half a window.

    Raises:
        ValueError: the stride is out of range.
    """
    window = min(window, model.decoder.architecture.max_context)
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(
            f"stride is {stride}, it has to be from 1 to the window of {window} tokens"
        )
    return window, stride


def prefix_token(tokenizer: Any) -> int | None:
    """Return the token before a text without context: the begin token, else the end token, if any."""
    begin: int | None = tokenizer.bos_token_id
    return tokenizer.eos_token_id if begin is None else begin


def perplexity(
    model: LayerSkipModel,
    text: str,
    exits: Collection[int],
    *,
    window: int = 1024,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, dict[str, Metric]]:
    """Return perplexity, bits per byte and token accuracy of every exit; see the module's docstring.

    Args:
        model: needs a tokenizer.
        text: to predict.
        exits: layers run, each 1 to L.
        window: maximum tokens of context, within the model's limit.
        stride: tokens from one window to the next, 1 to window; None = half of it.
        batch_size: windows a pass.
        progress: called with the number of windows done, and in all.

    Raises:
        ValueError: no tokenizer, no token to predict, a stride out of range, or results that are NaN.
    """
    if model.tokenizer is None:
        raise ValueError("perplexity of a text needs a tokenizer, and this checkpoint has none")
    window, stride = stride_of(model, window, stride)
    tokenizer = model.tokenizer
    prefix = prefix_token(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    passages = list(windows([*([] if prefix is None else [prefix]), *ids], window, stride))
    if not passages:
        raise ValueError("the text has no token to predict")
    scores = score_passages(
        model.decoder, passages, exits, batch_size=batch_size, progress=progress
    )
    sizes = [passage.scored for passage in passages]
    words, n_bytes = len(text.split()), len(text.encode())
    return {e: _metrics([s[e] for s in scores], sizes, words, n_bytes) for e in sorted(exits)}


def windows(tokens: Sequence[int], window: int, stride: int) -> Iterator[Passage]:
    """Yield passages that predict every token but the first exactly once.

    Args:
        tokens: the whole text.
        window: tokens that one pass reads.
        stride: tokens predicted by every passage after the first, which predicts `window`.
    """
    last = len(tokens) - 1
    scored = end = min(window, last)
    while scored > 0:
        yield Passage(tuple(tokens[max(0, end - window) : end + 1]), scored)
        scored = min(stride, last - end)
        end += scored


def _metrics(
    scores: Sequence[Score], sizes: Sequence[int], words: int, n_bytes: int
) -> dict[str, Metric]:
    nats, tokens = -sum(s.log_likelihood for s in scores), sum(sizes)
    spread = _stderr_of_sum([-s.log_likelihood for s in scores], sizes)

    def growth(units: int) -> Metric:
        try:
            value = math.exp(nats / units)
        except OverflowError:
            value = math.inf
        return Metric(value, None if spread is None else value * spread / units, False)

    bits = math.log(2) * n_bytes
    hits = [s.hits for s in scores]
    misses = _stderr_of_sum(hits, sizes)
    return {
        "token_perplexity": growth(tokens),
        "word_perplexity": growth(max(words, 1)),
        "bits_per_byte": Metric(nats / bits, None if spread is None else spread / bits, False),
        "token_accuracy": Metric(
            sum(hits) / tokens, None if misses is None else misses / tokens, True
        ),
    }


def _stderr_of_sum(values: Sequence[float], sizes: Sequence[int]) -> float | None:
    """Return the standard error of a sum over windows of unequal size."""
    n = len(values)
    if n < 2:
        return None
    rate = sum(values) / sum(sizes)
    residuals = (v - rate * size for v, size in zip(values, sizes, strict=True))
    return math.sqrt(n / (n - 1) * sum(r * r for r in residuals))
