"""`LayerSkipModel`: a checkpoint that answers."""

import contextlib
import copy
import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch

from layerskip.decoding.answer import Answer
from layerskip.decoding.arguments import integer, number, optional, takes_options_of
from layerskip.decoding.batch import Batch, alike, can_batch, grouped
from layerskip.decoding.draft_costs import time_rows
from layerskip.decoding.draft_text import Datastore
from layerskip.decoding.generation import Generation
from layerskip.decoding.placement import device_of, dtype_of, prepared
from layerskip.decoding.policy import choose, for_batch
from layerskip.decoding.prefix import Prefix
from layerskip.decoding.prompt import (
    Prompt,
    Tokenized,
    check_prompt,
    encode,
    is_batch,
    named,
    tokenize,
)
from layerskip.decoding.sampling import Sampling, nth_seed
from layerskip.model import Checkpoint, CheckpointSettings, Decoder, load, resolve
from layerskip.model.checkpoint import with_defaults
from layerskip.model.native import build as threads
from layerskip.model.quantize import bits_of
from layerskip.model.step_timing import costs_kind


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
        if self.decoder.device.type == "cpu":
            threads.disable_threads_after_fork()

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
                compiler, or on a GPU through `torch.compile`; None: the kernels on a CPU in float32
                and bfloat16, where they are available. The rest is eager PyTorch.
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
            *costs_kind(decoder), threads=threads.num_threads_of(decoder.kernels)
        )
        return cls(dataclasses.replace(checkpoint, settings=settings))

    def with_settings(self, settings: CheckpointSettings) -> "LayerSkipModel":
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

    def answer(
        self,
        prompt: Prompt | Tokenized,
        *,
        mode: str = "auto",
        exit_layer: int | None = None,
        draft_tokens: int | None = None,
        draft_from: str | None = None,
        adaptive: bool | None = None,
        draft_vocabulary: int | Sequence[int] | None = None,
        draft_text: str | Path | Sequence[int] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        prefix: Prefix | None = None,
    ) -> Answer:
        """Begin an answer that is computed while it is iterated over.

        Args:
            prompt: one prompt, as for `generate`, or one whose tokens are known.
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
            draft_text: a text that is like the answers, its token ids, or a file that `Datastore.save`
                has written, which is searched for n-grams beside prompt and answer; "" or (): none.
                None: in auto the checkpoint's, else none.
            max_new_tokens: 1 or more.
            temperature: 0 is greedy. This and the next four: see `Sampling`.
            top_k: see `Sampling`.
            top_p: see `Sampling`.
            min_p: see `Sampling`.
            repetition_penalty: see `Sampling`.
            seed: makes sampling repeatable, in auto on one machine; each prompt of a list draws apart.
            stop: texts, or names of special tokens, that end the answer; they are not part of it.
            ignore_eos: go on after an end token.
            prefix: keeps what the next prompt may share with this text, and has what this one shares
                with the last; one for each conversation.

        Raises:
            ValueError: the prompt or an option cannot be used; the message says why.
        """
        sampling = Sampling(
            temperature=number("temperature", temperature),
            top_k=optional(integer, "top_k", top_k),
            top_p=optional(number, "top_p", top_p),
            min_p=optional(number, "min_p", min_p),
            repetition_penalty=number("repetition_penalty", repetition_penalty),
        )
        max_new_tokens, seed = integer("max_new_tokens", max_new_tokens), nth_seed(seed)
        asked = self._tokenized(prompt)
        plan = choose(
            mode,
            optional(integer, "exit_layer", exit_layer),
            optional(integer, "draft_tokens", draft_tokens),
            draft_from,
            adaptive,
            self._draft_vocabulary(draft_vocabulary),
            self._draft_text(draft_text),
            settings=self.settings,
            n_layers=len(self.decoder.layers),
        )
        left_open = mode == "auto" and draft_from is None and not (adaptive or draft_text)
        if plan.adaptive and (plan.costs is None or len(asked.together) > 1):
            time_rows(self.decoder)  # before the answer's clock starts
        if len(asked.together) > 1 and left_open and repetition_penalty == 1.0:
            plan = for_batch(plan, self.decoder, self.settings, asked.together)
        return Answer(
            self,
            asked.ids,
            plan,
            sampling,
            max_new_tokens=max_new_tokens,
            stop=[stop] if isinstance(stop, str) else stop or (),
            ignore_eos=ignore_eos,
            seed=seed,
            continues=asked.continues,
            prefix=prefix,
        )

    @overload
    def generate(self, prompt: Prompt, **options: Any) -> Generation: ...

    @overload
    def generate(
        self, prompt: Sequence[str] | Sequence[Sequence[int]], **options: Any
    ) -> list[Generation]: ...

    @takes_options_of(answer)
    def generate(self, prompt: Any, **options: Any) -> Any:
        """Answer a prompt, or a list of prompts together.

        A list is decoded in batches (see `batch.grouped`), whose rows end one by one; in float32
        each greedy answer is that of its prompt alone. What looks at one text (repetition penalty,
        drafts from n-grams) is answered one after the other; where mode auto may choose, drafts come
        from the early exit alone, or it is plain.

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
        asked, answers = list[Tokenized](), list[Answer]()
        for i, one in enumerate(prompt, 1):
            with named(i):
                asked.append(self._tokenized(one))
                check_prompt(self.decoder, asked[-1].ids)
        groups = grouped([len(one.ids) for one in asked])
        together = {i: tuple(len(asked[j].ids) for j in group) for group in groups for i in group}
        for i, one in enumerate(asked):
            row = dataclasses.replace(one, together=together[i])
            answers.append(self.answer(row, seed=nth_seed(seed, i), **options))
        for group in groups:
            self._complete([answers[i] for i in group])
        return [answer.generation for answer in answers]

    def _complete(self, answers: Sequence[Answer]) -> None:
        """Compute some answers, as one batch where that can be."""
        first, prompts = answers[0], [answer.prompt for answer in answers]
        longest = first.loop_options["max_new_tokens"]
        if not can_batch(first.plan, first.sampling) or not alike(self.decoder, prompts, longest):
            for answer in answers:
                answer.complete()
            return
        for answer in answers:
            answer.begin()
        batch = Batch(self.decoder, prompts, **first.loop_options)
        for row, step in batch.steps():
            answers[row].take(step)
            if answers[row].stopped:
                batch.leave(row)
        for answer in answers:
            answer.finish()

    @takes_options_of(answer)
    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """Yield the answer's text piece by piece; options as for `answer`."""
        if self.tokenizer is None:
            raise ValueError("streaming text needs a tokenizer, and this checkpoint has none")
        return _texts(self.answer(prompt, **options))

    def _draft_vocabulary(self, wanted: Any) -> tuple[int, ...] | None:
        """Token ids; () = all, None = left open."""
        if wanted is None:
            return None
        size = self.decoder.architecture.vocab_size
        try:
            ids = [operator.index(token) for token in wanted]
        except TypeError:
            n = integer("draft_vocabulary", wanted)
            if not n:
                return ()
            ids = list((self.settings.draft_vocabulary or range(size))[: max(n, 0)])
        if not ids or min(ids) < 0 or max(ids) >= size:
            raise ValueError(f"the draft vocabulary has to be 1 or more tokens, of 0 to {size - 1}")
        return tuple(sorted({*ids, *(token for token in self.end_tokens if token < size)}))

    def _draft_text(
        self, wanted: str | Path | Sequence[int] | None
    ) -> Path | tuple[int, ...] | None:
        """A file, or token ids; () = no text, None = left open."""
        size = self.decoder.architecture.vocab_size
        if isinstance(wanted, Path):
            Datastore.of(wanted, size)  # says what is wrong with it
            return wanted
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
        if ids and not 0 <= min(ids) <= max(ids) < size:
            raise ValueError(f"a draft text has to be a text, or token ids of 0 to {size - 1}")
        return ids

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; see `prompt.tokenize`."""
        return tokenize(prompt, self.tokenizer)

    def _tokenized(self, prompt: Prompt | Tokenized) -> Tokenized:
        if isinstance(prompt, Tokenized):
            return prompt
        return Tokenized(self.tokenize(prompt), continues=isinstance(prompt, str))


def _texts(answer: Answer) -> Iterator[str]:
    with contextlib.closing(answer):
        yield from (piece.text for piece in answer if piece.text)
