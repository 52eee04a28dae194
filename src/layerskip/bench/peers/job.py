"""What a peer's process is told at its start."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from layerskip.bench.measure import Setting

# What the libraries' documentation says of prompt lookup: transformers shows it with 10 tokens, and of
# llama-cpp-python 10 are for GPUs, and 2 better on a CPU alone.
PROMPT_LOOKUP_TOKENS = 10
PROMPT_LOOKUP_TOKENS_ON_A_CPU = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """The terms of a comparison, as plain values that JSON can carry.

    Attributes:
        model: the checkpoint folder or GGUF file, as `resolve` gives it.
        gguf: a GGUF file of the same weights, for llama.cpp; None where it is not asked for.
        tokenizer: a folder with the checkpoint's tokenizer; None where it has none.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", ...
        threads: CPU threads.
        context: tokens that the longest prompt and its answer take.
        end_tokens: tokens that end an answer; empty to go on after them.
        stop: texts that end an answer.
        settings: the rows that this peer is asked for.
    """

    model: str
    gguf: str | None = None
    tokenizer: str | None = None
    dtype: str
    device: str = "cpu"
    threads: int
    context: int
    end_tokens: Sequence[int] = ()
    stop: Sequence[str] = ()
    settings: Sequence[Setting] = ()

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Job":
        """Undo `dataclasses.asdict`."""
        return cls(**{**fields, "settings": [Setting(**each) for each in fields["settings"]]})
