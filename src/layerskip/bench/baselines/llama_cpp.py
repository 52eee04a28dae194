"""llama.cpp's server, through xllamacpp: plain, and with its drafts by n-gram lookup."""

import dataclasses
import http.client
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from layerskip.bench.baselines.process import (
    PROMPT_LOOKUP_TOKENS,
    PROMPT_LOOKUP_TOKENS_ON_A_CPU,
    Job,
    prompt_lookup,
)
from layerskip.bench.baselines.transformers import Recorder
from layerskip.bench.measure import Run, Setting
from layerskip.decoding import DecodingConfig
from layerskip.model.weights import GgufHeader

LOOKUP_NGRAM = 2  # tokens; transformers searches for as many by default
# The other modes of --spec-type, with lengths of n-gram and draft.
MODES = {"ngram-mod": (24, 16), "ngram-map-k": (12, 16)}


def settings(drafts: Sequence[tuple[int, int]]) -> list[Setting]:
    """Return the rows of this baseline, which has no early exit."""
    lengths = (PROMPT_LOOKUP_TOKENS_ON_A_CPU, PROMPT_LOOKUP_TOKENS)
    config = DecodingConfig(mode="self-speculative", draft_from="n-gram")
    modes = [
        Setting(config=dataclasses.replace(config, draft_tokens=length), mode=mode)
        for mode, (_, length) in MODES.items()
    ]
    return [Setting(), *map(prompt_lookup, lengths), *modes]


class Engine:
    """llama.cpp on a GGUF file of the same weights; keys and values are kept in float16.

    Attributes:
        build: llama.cpp's build number, compiler and CPU features.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._bytes_per_pass = _bytes_per_pass(job.gguf)
        _check_device(job.device)
        self.build = _build()
        (setting,) = job.settings  # fixed when a server starts
        self._server = _start(job, setting)

    def answer(self, setting: Setting, prompt: Sequence[int], max_new_tokens: int) -> Run:
        """See `System`."""
        seconds = 0.0
        # The server's own clock, without HTTP.
        recorder = Recorder.of(self._job, lambda: seconds, max_new_tokens)
        generated: list[int] = []
        started = 0.0
        while not recorder.finished:  # the server also ends at the GGUF file's own end tokens
            request = {
                "prompt": [*prompt, *generated],
                "n_predict": max_new_tokens - len(generated),
                "stop": list(self._job.stop),
                "samplers": ["top_k"],
                "top_k": 1,
                "cache_prompt": bool(generated),
                "return_tokens": True,
                "timings_per_token": True,
            }
            for seconds, token, new_step in _tokens(self._server, request):
                seconds += started
                generated.append(token)
                recorder.add([token], new_step=new_step)
            started = seconds
        return recorder.run(
            peak_memory_bytes=None,  # not measured
            bytes_per_pass=None if setting.config.draft_tokens else self._bytes_per_pass,
        )


def _start(job: Job, setting: Setting) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = job.gguf
    params.n_ctx = job.context + max(length for _, length in MODES.values())
    params.fit_params = False  # it would change the context to what fits
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job.threads
    params.n_gpu_layers = 0 if job.device == "cpu" else 999
    params.split_mode = xllamacpp.llama_split_mode.LLAMA_SPLIT_MODE_NONE
    params.main_gpu = torch.device(job.device).index or 0
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.cache_ram_mib = 0  # no prompt is kept for later requests
    params.ui = False
    params.verbosity = 1  # errors
    if setting.config.draft_tokens is not None:
        _draft(params.speculative, setting.mode, setting.config.draft_tokens)
    return xllamacpp.Server(params)


def _draft(speculative: Any, mode: str, draft_tokens: int) -> None:
    """Set the options of a mode, which are named as those of llama-server."""
    import xllamacpp

    mode = "ngram-simple" if mode == "prompt-lookup" else mode
    name = mode.replace("-", "_")
    kinds = xllamacpp.common_speculative_type
    speculative.types = [getattr(kinds, f"COMMON_SPECULATIVE_TYPE_{name.upper()}")]
    options = getattr(speculative, name)
    if mode == "ngram-mod":
        options.n_match, options.n_max, options.n_min = MODES[mode][0], draft_tokens, 0
    else:
        options.size_n = MODES[mode][0] if mode in MODES else LOOKUP_NGRAM
        options.size_m = draft_tokens


def _tokens(server: Any, request: dict[str, Any]) -> Iterator[tuple[float, int, bool]]:
    """Yield (seconds since the start, token id, first of its forward pass) of an answer.

    The server sends no event for a token whose text ends inside a character. Its token ids are then
    requested once more, untimed, and such a token comes with the next event.
    """
    events = list(_events(_post(server, request | {"stream": True})))
    tokens = [token for event in events for token in event["tokens"]]
    if len(tokens) < events[-1]["timings"]["predicted_n"]:
        tokens = json.loads(_post(server, request))["tokens"]
    n_sent = n_accepted = left_in_pass = 0
    for event in events:
        timings = event["timings"]
        seconds = (timings["prompt_ms"] + timings["predicted_ms"]) / 1000
        newly_accepted = timings.get("draft_n_accepted", 0) - n_accepted
        n_accepted += newly_accepted
        for token in tokens[n_sent : timings["predicted_n"]]:
            new_step = not left_in_pass
            if new_step:  # it gives the accepted tokens and one more
                left_in_pass, newly_accepted = newly_accepted, 0
            else:
                left_in_pass -= 1
            yield seconds, token, new_step
        n_sent = timings["predicted_n"]


def _events(body: bytes) -> Iterator[dict[str, Any]]:
    for line in body.splitlines():
        kind, _, document = line.partition(b": ")
        if kind == b"error":
            raise RuntimeError(document.decode())
        if kind == b"data":
            yield json.loads(document)


def _post(server: Any, request: dict[str, Any]) -> bytes:
    address = server.listening_address.removeprefix("http://")
    connection = http.client.HTTPConnection(address)
    try:
        connection.request("POST", "/completion", json.dumps(request))
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise RuntimeError(body.decode())
    return body


def _build() -> str:
    import xllamacpp

    info = xllamacpp.BUILD_INFO
    features = [part.strip() for part in xllamacpp.get_system_info().split("|")]
    build = f"build {info['build_number']} ({info['commit']})"
    return ", ".join([build, info["compiler"], info["build_target"], *filter(None, features)])


def _check_device(device: str) -> None:
    """Refuse a build for the CPU alone, whose rows would be compared with those of a GPU."""
    import xllamacpp

    kinds = [entry["type"].name for entry in xllamacpp.get_device_info()]
    if device != "cpu" and not any(kind.endswith("_GPU") for kind in kinds):
        raise ValueError(
            "this build of xllamacpp runs on the CPU alone; install one for the GPU, see"
            " https://github.com/xorbitsai/xllamacpp#installation"
        )


def _bytes_per_pass(gguf: str) -> int:
    """Return the bytes of weights for one token: all but the embedding, unless it is the head too."""
    sizes = {name: stored.data.nbytes for name, stored in GgufHeader(Path(gguf)).tensors.items()}
    embedding = sizes["token_embd.weight"] if "output.weight" in sizes else 0
    return sum(sizes.values()) - embedding
