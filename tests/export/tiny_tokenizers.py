"""Tiny tokenizers of every kind that is exported, and checkpoints that have them."""

import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import tiny_models

TEXT = """The ships of 1868 brought 12345 bales of wool; they didn't carry salt.
    def fib(n):\n\n        return n if n < 2 else fib(n - 1) + fib(n - 2)  # naïve, 日本語 😀
"""
TEXTS = [
    TEXT,
    "in  1868",
    " a",
    "",
    "don't WE'LL",
    "a\n\n\n b",
    "é½  ",
    "Hello <|end|> there<think>x",
    "they carrycarry on",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PLAIN_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(regex):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


SPLITS = {
    "gpt-2": PLAIN_BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), PLAIN_BYTES]),
    "smaug-bpe": split(LLAMA3),
    "qwen2": split(LLAMA3.replace("{1,3}", "")),
}


def byte_level(pre_tokenizer, vocab_size=320):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<|end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def whole_words(pre_tokenizer, ignore_merges=True):
    """`byte_level` with a token that no merges make."""
    described = json.loads(byte_level(pre_tokenizer).to_str())
    model = described["model"]
    model["vocab"]["Ġ" + "carry" * 2] = len(model["vocab"])
    model["ignore_merges"] = ignore_merges
    return Tokenizer.from_str(json.dumps(described))


def sentencepiece(*, prefix):
    """As Llama 2 has it: merges over characters with ▁ for a space, bytes for what is unknown."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    trained.train_from_iterator(
        [TEXT] * 3, trainers.BpeTrainer(vocab_size=150, show_progress=False)
    )

    described = json.loads(trained.to_str())["model"]
    pieces = sorted(described["vocab"], key=described["vocab"].get)
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    singles, merged = [p for p in pieces if len(p) == 1], [p for p in pieces if len(p) > 1]
    vocab = {token: i for i, token in enumerate([*first, *merged, *singles])}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[tuple(merge) for merge in described["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return tokenizer


def metaspace(scheme):
    """As transformers makes a Llama 2 tokenizer anew: the pre-tokenizer writes the spaces."""
    tokenizer = sentencepiece(prefix=False)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return tokenizer


def checkpoint(folder, tokenizer, *, spare=0, **names):
    names = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ 1 }}"} | names
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.save_pretrained(folder)
    tiny_models.build("llama2", vocab_size=len(wrapped) + spare).save_pretrained(folder)
    return wrapped
