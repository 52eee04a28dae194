"""A decoder with a scripted answer, and a byte-level tokenizer."""

import copy
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from layerskip import LayerSkipModel
from layerskip.model import Architecture, Checkpoint, CheckpointSettings, Decoder, KVCache
from layerskip.model.architecture import Rope

LAYERS = 4


class ScriptedDecoder:
    """Stands in for `Decoder`: the whole model gives `answer`, fewer layers err at `misses`.

    Args:
        answer: tokens after the prompt, repeated without end.
        misses: indices of answer tokens for which an early exit proposes another token.
        prompt_tokens: length of the prompt.
    """

    device, dtype, weights, kv_cache = torch.device("cpu"), torch.float32, "16bit", "auto"
    dtype_name = "float32"
    kernels = "pytorch"
    head = SimpleNamespace(weight_bytes=1)
    weight_bytes = 5

    def __init__(self, answer, *, misses=(), prompt_tokens=1, vocab_size=300, max_context=64):
        self.answer, self.misses, self.prompt_tokens = list(answer), set(misses), prompt_tokens
        self.layers = [None] * LAYERS
        self.architecture = Architecture(
            family="llama",
            n_layers=LAYERS,
            hidden_size=2,
            n_heads=1,
            n_kv_heads=1,
            head_dim=2,
            ffn_size=1,
            vocab_size=vocab_size,
            norm_eps=1e-5,
            max_context=max_context,
            sliding_windows=(None,) * LAYERS,
            ropes=(Rope(),) * LAYERS,
        )

    def new_cache(self, capacity, batch_size=1):
        return KVCache(
            self.architecture, batch_size=batch_size, capacity=capacity, dtype=self.dtype
        )

    def embed(self, tokens):
        return torch.zeros(*tokens.shape, 2)

    def run(self, hidden, start, stop, cache):
        """Return hidden states that hold their position and the number of layers run."""
        positions = cache.lengths[:, None] + torch.arange(hidden.shape[1])
        assert positions.max() < cache.capacity
        return torch.stack([positions, torch.full_like(positions, stop)], dim=-1).float()

    def run_rows(self, hidden, start, stop, rows):
        parts = hidden.split([n for _, n in rows])
        states = [
            self.run(part[None], start, stop, cache)[0]
            for part, (cache, _) in zip(parts, rows, strict=True)
        ]
        return torch.cat(states)

    def logits(self, hidden):
        rows = [[self._next(int(at), int(depth)) for at, depth in row] for row in hidden]
        return functional.one_hot(torch.tensor(rows), self.architecture.vocab_size) * 9.0

    def with_reduced_head(self, token_ids):
        reduced, whole = copy.copy(self), self.logits
        reduced.logits = lambda hidden: whole(hidden)[..., token_ids]
        return reduced

    def concat_heads(self, other):
        both, first = copy.copy(self), self.logits
        both.logits = lambda hidden: torch.cat([first(hidden), other.logits(hidden)], dim=-1)
        return both

    greedy_tokens = Decoder.greedy_tokens
    greedy_choice = Decoder.greedy_choice
    greedy_step = Decoder.greedy_step
    drafts_in_one_call = False
    greedy_pass = Decoder.greedy_pass

    def _next(self, position, n_layers):
        index = position - self.prompt_tokens + 1
        token = self.answer[index % len(self.answer)]
        wrong = n_layers < LAYERS and index in self.misses
        return (token + 1) % self.architecture.vocab_size if wrong else token


END, OTHER_END = 256, 257
WORDS = ("hello", "Ġworld", "ab", "bc")


def byte_tokenizer():
    """Return a tokenizer of 256 bytes (in order of their symbols), two end tokens and `WORDS`."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<end>": END, "<other end>": OTHER_END}
    vocabulary |= {word: 258 + i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        additional_special_tokens=["<other end>"],
        clean_up_tokenization_spaces=False,
    )


TOKENIZER = byte_tokenizer()


def encode(text):
    """Return the bytes of a text as tokens."""
    return TOKENIZER.encode(text)


def words(*names):
    return [TOKENIZER.convert_tokens_to_ids(name) for name in names]


def scripted_model(answer, *, tokenizer=TOKENIZER, end_tokens=(END,), settings=None, **script):
    """Return a `LayerSkipModel` around a `ScriptedDecoder`."""
    return LayerSkipModel(
        Checkpoint(
            path=Path(),
            decoder=ScriptedDecoder(answer, **script),
            tokenizer=tokenizer,
            settings=settings or CheckpointSettings(end_tokens=tuple(end_tokens)),
        )
    )
