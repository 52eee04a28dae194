"""`LayerSkipModel`: a checkpoint that answers."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch

from layerskip.decoding.answer import Answer
from layerskip.decoding.batch import Batch, alike, can_batch
from layerskip.decoding.draft_costs import time_rows
from layerskip.decoding.generation import Generation
from layerskip.decoding.placement import device_of, dtype_of, prepared
from layerskip.decoding.policy import choose, for_batch
from layerskip.decoding.prefix import Prefix
from layerskip.decoding.prompt import Prompt, encode, is_batch, tokenize
from layerskip.decoding.sampling import Sampling
from layerskip.model import Checkpoint, Decoder, Settings, load, resolve
from layerskip.model.machine import machine
from layerskip.model.published import with_defaults
from layerskip.model.quantize import bits_of


class LayerSkipModel:
    """A decoder with its tokenizer and settings.

    Attributes:
        decoder: the weights and the passes over them.
        tokenizer: transformers' tokenizer, or None where the checkpoint has none.
        settings: what travels with the checkpoint (end tokens, exit layer, draft tokens).
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.decoder: Decoder = checkpoint.decoder
        self.tokenizer: Any = checkpoint.tokenizer
        self.settings = checkpoint.settings
        self._last_text: tuple[str, tuple[int, ...]] = ("", ())

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        weights: str = "16bit",
        device: str | torch.device = "cpu",
        compile: bool | None = None,
        announce: Callable[[str], None] = lambda text: None,
    ) -> "LayerSkipModel":
        """Load a model.

        Args:
            name_or_path: a checkpoint folder, a GGUF file, a built-in alias, or a hub id.
            dtype: "float32", "bfloat16" or "float16"; None takes bfloat16 where that is fast (see
                `assembly.fast_dtype`), else float32.
            weights: "16bit", the weights in `dtype` as they are; "int8" or "int4", quantized while
                they are loaded (docs/weights.md).
            device: "cpu", "cuda", "cuda:1", ...
            compile: run in kernels compiled for this CPU, which takes some seconds once and needs a C++
                compiler, or on a GPU as recorded CUDA graphs; None: where that can be done, on a CPU in
                float32 and bfloat16. The rest is PyTorch.
            announce: told, in a few words, before something that takes long.

        Raises:
            ValueError: the model cannot be found, read, or is not supported; or a bad argument.
        """
        bits_of(weights)  # before a download
        place = device_of(device)
        name = str(name_or_path)
        checkpoint = load(
            resolve(name, announce),
            dtype=dtype_of(dtype),
            device=place,
            weights=weights,
            compiled=partial(prepared, compile, dtype_of(dtype), place, announce),
        )
        decoder = checkpoint.decoder
        settings = with_defaults(name, checkpoint.settings).measured_for(
            *(str(decoder.dtype).removeprefix("torch."), decoder.weights),
            *(place.type, decoder.kernels, machine(decoder.device)),
            threads=torch.get_num_threads(),
        )
        return cls(dataclasses.replace(checkpoint, settings=settings))

    def with_settings(self, settings: Settings) -> "LayerSkipModel":
        """The same model decoding by other settings; nothing is copied."""
        other = copy.copy(self)
        other.settings = settings
        return other

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        if self.settings.end_tokens or self.tokenizer is None:
            return frozenset(self.settings.end_tokens)
        own = self.tokenizer.eos_token_id
        return frozenset(() if own is None else (own,))

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be prompts."""
        return self.tokenizer is not None and bool(self.tokenizer.chat_template)

    @overload
    def generate(self, prompt: Prompt, **options: Any) -> Generation: ...

    @overload
    def generate(
        self, prompt: Sequence[str] | Sequence[Sequence[int]], **options: Any
    ) -> list[Generation]: ...

    def generate(self, prompt: Any, **options: Any) -> Any:
        """Answer a prompt, or a list of prompts together.

        A list is decoded as one batch, whose rows end one by one; in float32 each greedy answer is that
        of its prompt alone. What looks at one text (repetition penalty, drafts from n-grams) is answered
        one after the other; where mode auto may choose, drafts come from the early exit alone, or it is
        plain.

        Args:
            prompt: a text (tokenized as it stands), a list of token ids, a list of chat messages
                (dicts with role and content; the chat template is applied), a dict of `messages`,
                `tools` and `chat_template_kwargs`, or a list of those.
            options: see `answer`.

        Returns:
            A `Generation`, or a list of them for a list of prompts.

        Raises:
            ValueError: the prompt or an option cannot be used; the message says why.
        """
        if not is_batch(prompt):
            return self.answer(prompt, **options).complete()
        if options.get("prefix") is not None:
            raise ValueError("a prefix is for one prompt after another, not for a list of them")
        seed = options.pop("seed", None)
        seeds = [None if seed is None else seed + i for i in range(len(prompt))]
        options["together"] = [len(self.tokenize(x)) for x in prompt]
        answers = [self.answer(x, seed=s, **options) for x, s in zip(prompt, seeds, strict=True)]
        prompts = [answer.prompt for answer in answers]
        first, longest = answers[0], answers[0].loop_options["max_new_tokens"]
        if not can_batch(first.plan, first.sampling) or not alike(self.decoder, prompts, longest):
            return [answer.complete() for answer in answers]
        batch = Batch(self.decoder, prompts, **first.loop_options)
        for row, step in batch.steps():
            answers[row].take(step)
            if answers[row].stopped:
                batch.leave(row)
        for answer in answers:
            answer.finish()
        return [answer.generation for answer in answers]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """Yield the answer's text piece by piece; options as for `answer`."""
        if self.tokenizer is None:
            raise ValueError("streaming text needs a tokenizer, and this checkpoint has none")
        return (piece.text for piece in self.answer(prompt, **options) if piece.text)

    def answer(
        self,
        prompt: Prompt,
        *,
        mode: str = "auto",
        exit_layer: int | None = None,
        draft_tokens: int | None = None,
        draft_from: str | None = None,
        adaptive: bool | None = None,
        draft_vocabulary: int | Sequence[int] | None = None,
        draft_text: str | Sequence[int] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        together: Sequence[int] = (),
        prefix: Prefix | None = None,
    ) -> Answer:
        """Begin an answer that is computed while it is iterated over.

        Args:
            prompt: one prompt, as for `generate`.
            mode: "auto", "plain", "early-exit" or "self-speculative" (see `policy.choose`).
            exit_layer: E, how many layers have run when the model exits, 1 ... L.
            draft_tokens: d, how many tokens are drafted in a round, 0 or more; the most where drafts are
                adaptive.
            draft_from: "early-exit", "n-gram" (what followed the last tokens where they stood before in
                prompt or answer), or "both". None: in auto what the checkpoint is good for, else the
                early exit.
            adaptive: end drafts where they are not worth their cost (see `Plan`). None: in auto alone.
            draft_vocabulary: the tokens that the early exit may draft, beside the prompt's and end
                tokens, or how many: then the first of the checkpoint's list or, where it has none, of
                the vocabulary, which byte-pair encodings sort by frequency. 0: all. None: in auto the
                checkpoint's list, else all. Fewer make a cheaper draft, never another answer.
            draft_text: a text that is like the answers, or its token ids, which is searched for n-grams
                beside prompt and answer; "" or (): none. None: in auto the checkpoint's, else none.
            max_new_tokens: 1 or more.
            temperature: 0 is greedy. This and the next four: see `Sampling`.
            top_k: see `Sampling`.
            top_p: see `Sampling`.
            min_p: see `Sampling`.
            repetition_penalty: see `Sampling`.
            seed: makes sampling repeatable, in auto on one machine; each prompt of a list draws apart.
            stop: texts, or names of special tokens, that end the answer; they are not part of it.
            ignore_eos: go on after an end token.
            together: of all prompts that are going to be answered in one batch with this one, and of
                this one, how many tokens they have.
            prefix: keeps what the next prompt may share with this text, and has what this one shares
                with the last; one for each conversation.

        Raises:
            ValueError: the prompt or an option cannot be used; the message says why.
        """
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed is {seed}, it has to fit into 64 bits")
        ids = self.tokenize(prompt)
        plan = choose(
            mode,
            exit_layer,
            draft_tokens,
            draft_from,
            adaptive,
            self._draft_vocabulary(draft_vocabulary),
            self._draft_text(draft_text),
            settings=self.settings,
            n_layers=len(self.decoder.layers),
        )
        left_open = mode == "auto" and draft_from is None and not (adaptive or draft_text)
        if plan.adaptive and (plan.costs is None or len(together) > 1):
            time_rows(self.decoder)  # before the answer's clock starts
        if len(together) > 1 and left_open and repetition_penalty == 1.0:
            plan = for_batch(plan, self.decoder, self.settings, together)
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        return Answer(
            self,
            ids,
            plan,
            sampling,
            max_new_tokens=max_new_tokens,
            stop=[stop] if isinstance(stop, str) else stop or (),
            ignore_eos=ignore_eos,
            seed=seed,
            continues=isinstance(prompt, str),
            prefix=prefix,
        )

    def _draft_vocabulary(self, wanted: int | Sequence[int] | None) -> tuple[int, ...] | None:
        """Token ids; () = all, None = left open."""
        if wanted is None or wanted == 0:
            return None if wanted is None else ()
        size = self.decoder.architecture.vocab_size
        known = self.settings.draft_vocabulary or range(size)
        ids = known[: max(wanted, 0)] if isinstance(wanted, int) else wanted
        if not ids or min(ids) < 0 or max(ids) >= size:
            raise ValueError(f"the draft vocabulary has to be 1 or more tokens, of 0 to {size - 1}")
        return tuple(sorted({*ids, *(token for token in self.end_tokens if token < size)}))

    def _draft_text(self, wanted: str | Sequence[int] | None) -> tuple[int, ...] | None:
        """Token ids; () = no text, None = left open."""
        if not wanted:
            return None if wanted is None else ()
        if isinstance(wanted, str) and self.tokenizer is not None:
            known = self._last_text
            if known[0] != wanted:  # a text may be long, and prompts many
                encoded = encode(wanted, self.tokenizer, add_special_tokens=False)
                known = self._last_text = wanted, tuple(encoded)
            ids = known[1]
        else:
            ids = tuple(self.tokenize(wanted))
        size = self.decoder.architecture.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < size:
            raise ValueError(f"a draft text has to be a text, or token ids of 0 to {size - 1}")
        return ids

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; see `prompt.tokenize`."""
        return tokenize(prompt, self.tokenizer)
