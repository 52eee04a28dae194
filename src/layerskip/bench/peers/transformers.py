"""transformers: `generate` plain, with `assistant_early_exit`, and with prompt lookup."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerskip.bench.measure import Run, Setting
from layerskip.bench.memory import PeakMemory
from layerskip.bench.peers.job import PROMPT_LOOKUP_TOKENS, Job
from layerskip.bench.peers.recorder import Recorder
from layerskip.decoding.clock import device_clock
from layerskip.model import open_files
from layerskip.model.checkpoint import check_no_adapter
from layerskip.model.families import OWN_KERNELS, check_weights_unnamed
from layerskip.model.files import tokenizer
from layerskip.model.files.weights import GgufFile
from layerskip.model.machine import leave_out_cudnn_attention

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
