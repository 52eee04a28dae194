"""llama.cpp, as xllamacpp's server answers for it."""

import json
import urllib.request

import torch


class Llama:
    """A GGUF file in llama.cpp on one thread.

    Args:
        path: the GGUF file.
        n_ctx: positions of the context.
        draft: a GGUF file that drafts 3 tokens at a time; None for plain decoding.
        exact: whether keys and values are kept in float32, without flash attention.
    """

    def __init__(self, path, *, n_ctx, draft=None, exact=False):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.fit_params = n_ctx, False
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.n_gpu_layers, params.cache_ram_mib = 0, 0
        params.warmup, params.ui, params.verbosity = False, False, 1
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if draft is not None:
            kinds = xllamacpp.common_speculative_type
            params.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
            params.speculative.draft.mparams.path = str(draft)
            params.speculative.draft.n_max = 3
        self._server = xllamacpp.Server(params)

    def tokenize(self, text):
        """Return the token ids of a text, special tokens recognized, with the file's first token."""
        return self._post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def generate(self, ids, n):
        """Return up to n greedy tokens and the number of drafted tokens."""
        answer = self._complete(ids, n)
        return answer["tokens"], answer["timings"].get("draft_n", 0)

    def log_probs(self, ids, vocab_size, last=None):
        """Return the log-probabilities [T, V] after each of the tokens, or of the last ones."""
        # The server leaves out the probabilities before half a character: have it sample a letter.
        letter = {"logit_bias": [[self.tokenize("a")[-1], 1e6]]}
        lengths = range(1, len(ids) + 1)[-(last or len(ids)) :]
        rows = torch.full((len(lengths), vocab_size), -torch.inf)
        for row, n in zip(rows, lengths, strict=True):
            answer = self._complete(ids[:n], 1, n_probs=vocab_size, **letter)
            for token in answer["completion_probabilities"][0]["top_logprobs"]:
                row[token["id"]] = token["logprob"]
        return rows

    def _complete(self, ids, n, **options):
        options |= {"samplers": ["top_k"], "top_k": 1, "return_tokens": True}
        return self._post("/completion", prompt=ids, n_predict=n, **options)

    def _post(self, path, **request):
        url = self._server.listening_address + path
        with urllib.request.urlopen(url, json.dumps(request).encode(), timeout=120) as response:
            return json.load(response)
