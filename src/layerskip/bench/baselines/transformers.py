"""transformers: `generate` plain, with `assistant_early_exit`, and with prompt lookup."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerskip.bench.baselines.process import PROMPT_LOOKUP_TOKENS, Job
from layerskip.bench.machine import PeakMemory
from layerskip.bench.measure import Run, Setting
from layerskip.decoding import Step
from layerskip.decoding.stream import TextStream, stop_tokens
from layerskip.model import open_files, tokenizer
from layerskip.model.checkpoint import check_no_adapter
from layerskip.model.families import OWN_KERNELS, check_weights_unnamed
from layerskip.model.hardware import leave_out_cudnn_attention
from layerskip.model.step_timing import device_clock
from layerskip.model.weights import GgufFile


class Recorder:
    """Takes tokens as they arrive, as `decoding.Answer` does for this package's own.

    Attributes:
        ended: whether an end token, a stop string, or the last token allowed has come.
    """

    def __init__(
        self,
        now: Callable[[], float],
        tokenizer: Any = None,
        *,
        stop: Sequence[str] = (),
        end_tokens: Collection[int] = (),
        max_new_tokens: int,
    ) -> None:
        self.ended = False
        self._now, self._left = now, max_new_tokens
        self._text = None if tokenizer is None else TextStream(tokenizer, stop)
        named = frozenset[int]() if tokenizer is None else stop_tokens(tokenizer, stop)
        self._end_tokens = named.union(end_tokens)
        self._steps: list[list[int]] = []
        self._times: list[float] = []
        self._started = now()

    def add(self, tokens: Sequence[int], *, new_step: bool = True) -> bool:
        """Take the tokens of one pass, or more tokens of the last one; what follows the end is dropped.

        Returns:
            Whether the answer has ended.
        """
        if self.ended:
            return True
        if new_step or not self._steps:
            self._steps.append([])
        self._times.append(self._now())
        for token in tokens:
            self._steps[-1].append(token)
            self._left -= 1
            if self._text is not None and self._text.may_stop:
                self._text.push(token)
            stopped = self._text is not None and self._text.stopped
            if stopped or token in self._end_tokens or not self._left:
                self.ended = True
                break
        return self.ended

    def run(self, *, peak_memory_bytes: int | None, bytes_of_a_pass: int | None) -> Run:
        """The finished answer; `bytes_of_a_pass` counts the weights that a step reads."""
        if self._text is not None:
            if not self._text.may_stop:  # then text is made when the clock has stopped, as ours is
                self._text.push(*(token for step in self._steps for token in step))
            self._text.finish()
        return Run(
            steps=tuple(Step(tuple(step)) for step in self._steps),
            text="" if self._text is None else self._text.text,
            ttft_s=self._times[0] - self._started,
            decode_s=self._times[-1] - self._times[0],
            weight_bytes_read=bytes_of_a_pass and bytes_of_a_pass * (len(self._steps) - 1),
            peak_memory_bytes=peak_memory_bytes,
        )


# What transformers does unless it is told otherwise: up to 20 tokens, as long as the exit is so sure.
DEFAULT_DRAFT_TOKENS, DEFAULT_CONFIDENCE = 20, 0.4


def settings(drafts: Sequence[tuple[int, int]]) -> list[Setting]:
    """The rows of this peer, for pairs (E, d): each pair, and each E with its own defaults."""
    early = "self-speculative"
    return [
        Setting(mode="plain"),
        *(Setting(mode=early, exit_layer=e, draft_tokens=d) for e, d in drafts),
        *(
            Setting(mode=early, exit_layer=e, draft_tokens=DEFAULT_DRAFT_TOKENS, adaptive=True)
            for e in dict.fromkeys(e for e, _ in drafts)
        ),
        Setting(
            mode="prompt-lookup", draft_tokens=PROMPT_LOOKUP_TOKENS, draft_from="prompt-lookup"
        ),
    ]


class Peer:
    """A transformers model in evaluation mode, with 16-bit or 32-bit weights like ours."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self._job = job
        self._device = torch.device(job.device)
        leave_out_cudnn_attention(self._device)  # it would plan anew for every token
        self._memory = PeakMemory(self._device)
        self._model = _load(Path(job.model), job.dtype).to(self._device).eval()
        self._tokenizer = None if job.tokenizer is None else tokenizer.load(Path(job.tokenizer))
        self._bytes_of_a_pass = _bytes_of_a_pass(self._model)

    def answer(self, setting: Setting, prompt: Sequence[int], max_new_tokens: int) -> Run:
        """See `System`."""
        import transformers

        recorder = Recorder(
            device_clock(self._device),
            self._tokenizer,
            stop=self._job.stop,
            end_tokens=self._job.end_tokens,
            max_new_tokens=max_new_tokens,
        )
        ids = torch.tensor([list(prompt)], device=self._device)
        # The checkpoint's own sampling settings stay out: every system is greedy here. Early exit reads
        # the draft's length from the model's configuration, and nowhere else.
        self._model.generation_config = transformers.GenerationConfig(
            do_sample=False,
            eos_token_id=list(self._job.end_tokens) or None,
            pad_token_id=0,
            num_assistant_tokens=setting.draft_tokens,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=DEFAULT_CONFIDENCE if setting.adaptive else 0.0,
        )
        self._memory.reset()
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                streamer=_Streamer(recorder),
                stopping_criteria=[lambda ids, scores: _whether(recorder.ended, ids)],
                **_drafts(setting),
            )
        return recorder.run(
            peak_memory_bytes=self._memory.read(),
            bytes_of_a_pass=self._bytes_of_a_pass if setting.mode == "plain" else None,
        )


def _whether(ended: bool, ids: Tensor) -> Tensor:
    """One truth a row, as stopping criteria have to give."""
    return torch.full((ids.shape[0],), ended, dtype=torch.bool, device=ids.device)


class _Streamer:
    """Hands on what `generate` streams: first the prompt, then the tokens of each pass or round."""

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
        config=config,  # the one that was looked at
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        **OWN_KERNELS,
        **options,
    )


def _bytes_of_a_pass(model: Any) -> int:
    """Bytes of weights for one token: all but the embedding, unless it is the head as well.

    Of a mixture's experts those that answer for a token.
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


def _drafts(setting: Setting) -> dict[str, Any]:
    if setting.mode == "self-speculative":
        return {"assistant_early_exit": setting.exit_layer}
    if setting.mode == "prompt-lookup":
        return {"prompt_lookup_num_tokens": setting.draft_tokens}
    return {}
