"""transformers: `generate` plain, with `assistant_early_exit`, and with prompt lookup."""

import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerskip.bench.baselines.process import PROMPT_LOOKUP_TOKENS, Job, prompt_lookup
from layerskip.bench.machine import PeakMemory
from layerskip.bench.measure import Run, Setting
from layerskip.decoding import DecodingConfig, Step
from layerskip.decoding.streaming import TextStream, stop_tokens
from layerskip.model import open_files, tokenizer
from layerskip.model.checkpoint import check_no_adapter
from layerskip.model.families import OWN_KERNELS, check_weights_unnamed
from layerskip.model.hardware import disable_cudnn_attention
from layerskip.model.step_timing import device_clock
from layerskip.model.weights import GgufFile

# Defaults of transformers: up to 20 tokens, while the exit's confidence is at least 0.4.
DEFAULT_DRAFT_TOKENS, DEFAULT_CONFIDENCE = 20, 0.4


class Recorder:
    """Records tokens and times as they arrive, and ends an answer as `decoding.Answer` does.

    Args:
        clock: returns seconds.
        tokenizer: of transformers, or None.
        stop: texts that end the answer.
        eos_token_ids: tokens that end the answer.
        max_new_tokens: limit of its length.

    Attributes:
        finished: True after an end token, a stop string, or the last token allowed.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        tokenizer: Any = None,
        *,
        stop: Sequence[str] = (),
        eos_token_ids: Collection[int] = (),
        max_new_tokens: int,
    ) -> None:
        self.finished = False
        self._clock, self._remaining = clock, max_new_tokens
        self._text = None if tokenizer is None else TextStream(tokenizer, stop)
        stops = frozenset[int]() if tokenizer is None else stop_tokens(tokenizer, stop)
        self._end_tokens = stops.union(eos_token_ids)
        self._steps: list[list[int]] = []
        self._times: list[float] = []
        self._started = clock()

    @classmethod
    def of(cls, job: Job, clock: Callable[[], float], max_new_tokens: int) -> "Recorder":
        """Return the recorder of an answer of a job."""
        return cls(
            clock,
            None if job.tokenizer is None else _load_tokenizer(job.tokenizer),
            stop=job.stop,
            eos_token_ids=job.eos_token_ids,
            max_new_tokens=max_new_tokens,
        )

    def add(self, tokens: Sequence[int], *, new_step: bool = True) -> bool:
        """Add tokens of a new pass, or of the last one; those after the end are dropped.

        Returns:
            True if the answer has ended.
        """
        if self.finished:
            return True
        if new_step or not self._steps:
            self._steps.append([])
        self._times.append(self._clock())
        for token in tokens:
            self._steps[-1].append(token)
            self._remaining -= 1
            if self._text is not None and self._text.may_stop:
                self._text.push(token)
            stopped = self._text is not None and self._text.stopped
            if stopped or token in self._end_tokens or not self._remaining:
                self.finished = True
                break
        return self.finished

    def run(self, *, peak_memory_bytes: int | None, bytes_per_pass: int | None) -> Run:
        """Return the finished answer; `bytes_per_pass` counts the weights that a step reads."""
        if self._text is not None:
            if not self._text.may_stop:  # decoded after the clock has stopped, as in `Answer`
                self._text.push(*(token for step in self._steps for token in step))
            self._text.finish()
        return Run(
            steps=tuple(Step(tuple(step)) for step in self._steps),
            text="" if self._text is None else self._text.text,
            ttft_s=self._times[0] - self._started,
            decode_s=self._times[-1] - self._times[0],
            weight_bytes_read=bytes_per_pass and bytes_per_pass * (len(self._steps) - 1),
            peak_memory_bytes=peak_memory_bytes,
        )


@functools.cache
def _load_tokenizer(folder: str) -> Any:
    return tokenizer.load(Path(folder))


def settings(drafts: Sequence[tuple[int, int]]) -> list[Setting]:
    """Return the rows of this baseline: each pair (E, d), and each E with transformers' defaults."""

    def early_exit(e: int, d: int, adaptive: bool = False) -> Setting:
        return Setting(
            config=DecodingConfig(
                mode="self-speculative",
                draft_from="early-exit",
                exit_layer=e,
                draft_tokens=d,
                adaptive=adaptive,
            )
        )

    exits = dict.fromkeys(e for e, _ in drafts)
    return [
        Setting(),
        *(early_exit(e, d) for e, d in drafts),
        *(early_exit(e, DEFAULT_DRAFT_TOKENS, adaptive=True) for e in exits),
        prompt_lookup(PROMPT_LOOKUP_TOKENS),
    ]


class Engine:
    """A transformers model in evaluation mode, with 16-bit or 32-bit weights."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self._job = job
        self._device = torch.device(job.device)
        disable_cudnn_attention(self._device)  # it would plan anew for every token
        self._memory = PeakMemory(self._device)
        self._model = _load(Path(job.model), job.dtype).to(self._device).eval()
        self._bytes_per_pass = _bytes_per_pass(self._model)

    def answer(self, setting: Setting, prompt: Sequence[int], max_new_tokens: int) -> Run:
        """See `System`."""
        import transformers

        config = setting.config
        recorder = Recorder.of(self._job, device_clock(self._device), max_new_tokens)
        ids = torch.tensor([list(prompt)], device=self._device)
        # The checkpoint's sampling settings are left out: every system is greedy. Early exit reads the
        # draft length from the model's generation config, and nowhere else.
        self._model.generation_config = transformers.GenerationConfig(
            do_sample=False,
            eos_token_id=list(self._job.eos_token_ids) or None,
            pad_token_id=0,
            num_assistant_tokens=config.draft_tokens,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=DEFAULT_CONFIDENCE if config.adaptive else 0.0,
        )
        drafts: dict[str, Any] = {}
        if config.exit_layer is not None:
            drafts = {"assistant_early_exit": config.exit_layer}
        elif config.draft_tokens is not None:
            drafts = {"prompt_lookup_num_tokens": config.draft_tokens}
        self._memory.reset()
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                streamer=_Streamer(recorder),
                stopping_criteria=[
                    lambda ids, scores: torch.full(
                        (len(ids),), recorder.finished, dtype=torch.bool, device=ids.device
                    )
                ],
                **drafts,
            )
        return recorder.run(
            peak_memory_bytes=self._memory.read(),
            bytes_per_pass=None if drafts else self._bytes_per_pass,
        )


class _Streamer:
    """Passes on what `generate` streams: first the prompt, then the tokens of each pass or round."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder, self._prompt_is_over = recorder, False

    def put(self, tokens: Tensor) -> None:
        if self._prompt_is_over:
            self._recorder.add(tokens.flatten().tolist())
        self._prompt_is_over = True

    def end(self) -> None:
        pass


def _load(path: Path, dtype: str) -> Any:
    import transformers

    options: dict[str, Any] = {"trust_remote_code": False}
    tensors = open_files(path).tensors
    if isinstance(tensors, GgufFile):
        path, options["gguf_file"] = tensors.path.parent, tensors.path.name
    check_no_adapter(path)
    config = transformers.AutoConfig.from_pretrained(str(path), **options)
    check_weights_unnamed(config.to_dict())
    if isinstance(tensors, GgufFile):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(path),
        config=config,  # the one that was checked
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        **OWN_KERNELS,
        **options,
    )


def _bytes_per_pass(model: Any) -> int:
    """Return the bytes of weights for one token: all but the embedding, unless it is the head too.

    Of a mixture's experts, those that are active for a token.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    config = model.config.get_text_config()
    n_experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    share = config.num_experts_per_tok / n_experts if n_experts else 1
    everything = sum(
        parameter.nbytes * (share if ".experts." in name else 1)
        for name, parameter in model.named_parameters()
    )
    return int(everything if embedding is head else everything - embedding.nbytes)
