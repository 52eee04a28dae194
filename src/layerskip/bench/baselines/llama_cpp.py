"""llama.cpp, through llama-cpp-python: plain, and with prompt lookup."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from layerskip.bench.baselines.process import (
    PROMPT_LOOKUP_TOKENS,
    PROMPT_LOOKUP_TOKENS_ON_A_CPU,
    Job,
)
from layerskip.bench.baselines.transformers import Recorder
from layerskip.bench.measure import Run, Setting
from layerskip.model import tokenizer
from layerskip.model.step_timing import device_clock
from layerskip.model.weights import GgufHeader


def settings(drafts: Sequence[tuple[int, int]]) -> list[Setting]:
    """The rows of this peer, which knows no early exit."""
    lengths = (PROMPT_LOOKUP_TOKENS_ON_A_CPU, PROMPT_LOOKUP_TOKENS)
    lookups = [
        Setting(mode="prompt-lookup", draft_tokens=n, draft_from="prompt-lookup") for n in lengths
    ]
    return [Setting(mode="plain"), *lookups]


class Peer:
    """llama.cpp on a GGUF file of the same weights; keys and values are kept in float16.

    Attributes:
        build: llama.cpp's CPU features and backends.
    """

    def __init__(self, job: Job) -> None:
        assert job.gguf is not None
        self._job, self._gguf = job, job.gguf
        self._tokenizer = None if job.tokenizer is None else tokenizer.load(Path(job.tokenizer))
        self._bytes_of_a_pass = bytes_of_a_pass(job.gguf)
        self._drafts = _CountedDrafts()
        _check_device(job.device)
        self.build = _build()
        self._plain = self._load(None)
        # With a draft, llama-cpp-python keeps logits for every position; plain decoding does not.
        self._drafting = self._load(self._drafts)

    def _load(self, draft_model: Any) -> Any:
        from llama_cpp import LLAMA_SPLIT_MODE_NONE, Llama

        return Llama(
            self._gguf,
            n_ctx=self._job.context + PROMPT_LOOKUP_TOKENS,
            n_threads=self._job.threads,
            n_threads_batch=self._job.threads,
            n_gpu_layers=0 if self._job.device == "cpu" else -1,
            split_mode=LLAMA_SPLIT_MODE_NONE,  # else it takes all GPUs that there are
            main_gpu=torch.device(self._job.device).index or 0,
            flash_attn=True,  # which llama-cpp-python leaves off unless it is asked
            draft_model=draft_model,
            # Implied by a draft; but only if it is said, there is room for more than 512 positions.
            logits_all=draft_model is not None,
            verbose=False,
        )

    def answer(self, setting: Setting, prompt: Sequence[int], max_new_tokens: int) -> Run:
        """See `System`."""
        drafting = setting.mode == "prompt-lookup"
        llama = self._drafting if drafting else self._plain
        llama.reset()  # forget the last prompt, whose beginning would be reused
        self._drafts.tokens = setting.draft_tokens or 0
        recorder = Recorder(
            device_clock(torch.device("cpu")),  # a token is on the host when it is yielded
            self._tokenizer,
            stop=self._job.stop,
            end_tokens=self._job.end_tokens,
            max_new_tokens=max_new_tokens,
        )
        drafts_before = self._drafts.calls
        for token in llama.generate(list(prompt), temp=0.0, repeat_penalty=1.0):
            new_step = not drafting or self._drafts.calls > drafts_before
            drafts_before = self._drafts.calls
            if recorder.add([token], new_step=new_step):
                break
        return recorder.run(
            peak_memory_bytes=None,  # both of its models are in this process
            bytes_of_a_pass=None if drafting else self._bytes_of_a_pass,
        )


class _CountedDrafts:
    """Prompt lookup of `tokens` tokens that counts its rounds: one call each."""

    def __init__(self) -> None:
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        self.calls = self.tokens = 0
        self._lookups = {
            n: LlamaPromptLookupDecoding(num_pred_tokens=n)
            for n in (PROMPT_LOOKUP_TOKENS_ON_A_CPU, PROMPT_LOOKUP_TOKENS)
        }

    def __call__(self, input_ids: Any, /, **options: Any) -> Any:
        self.calls += 1
        return self._lookups[self.tokens](input_ids, **options)


def _build() -> str:
    from llama_cpp import llama_print_system_info

    features = llama_print_system_info().decode().split("|")
    return ", ".join(part.strip() for part in features if part.strip())


def _check_device(device: str) -> None:
    """A build for the CPU alone would run there, and stand beside rows of a GPU."""
    from llama_cpp import llama_supports_gpu_offload

    if device != "cpu" and not llama_supports_gpu_offload():
        raise ValueError(
            "this build of llama-cpp-python runs on the CPU alone; for the GPU install it with"
            " CMAKE_ARGS=-DGGML_CUDA=on"
        )


def bytes_of_a_pass(gguf: str) -> int:
    """Bytes of weights for one token: all but the embedding, unless it is the head as well."""
    sizes = {name: stored.data.nbytes for name, stored in GgufHeader(Path(gguf)).tensors.items()}
    embedding = sizes["token_embd.weight"] if "output.weight" in sizes else 0
    return sum(sizes.values()) - embedding
