"""`LayerSkipModel`: a checkpoint that answers prompts."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, overload

import torch

from layerskip.decoding.batch import Batch
from layerskip.decoding.config import DecodingConfig
from layerskip.decoding.constraint import Constraint, grammar_tokenizer
from layerskip.decoding.controller import time_passes
from layerskip.decoding.datastore import Datastore
from layerskip.decoding.generate import Row, StoppingCriteria, generate
from layerskip.decoding.placement import device_of, dtype_of, prepared
from layerskip.decoding.prefix_cache import PrefixCache
from layerskip.decoding.prompt import (
    Prompt,
    Tokenized,
    check_prompt,
    encode,
    is_batch,
    named,
    tokenize,
)
from layerskip.decoding.sampling import nth_seed
from layerskip.decoding.streaming import Answer, Generation, stop_tokens
from layerskip.model import Checkpoint, CheckpointSettings, Decoder, load, resolve
from layerskip.model.checkpoint import with_defaults
from layerskip.model.exit_adapter import (
    NO_ADAPTER,
    ExitAdapterWeights,
    find_adapter,
    load_adapter,
)
from layerskip.model.hub import packaged_adapter, resolve_adapter
from layerskip.model.kv_cache import check_kv_cache
from layerskip.model.native import build as threads
from layerskip.model.quantize import bits_of
from layerskip.model.step_timing import costs_kind, device_clock


class LayerSkipModel:
    """A decoder with its tokenizer and settings.

    Attributes:
        decoder: the weights and the passes over them.
        tokenizer: transformers' tokenizer, or None where the checkpoint has none.
        settings: what travels with the checkpoint (end tokens, exit layer, draft tokens).
        adapter: an exit adapter of the model, or None.
    """

    def __init__(self, checkpoint: Checkpoint, adapter: ExitAdapterWeights | None = None) -> None:
        self.decoder: Decoder = checkpoint.decoder
        self.tokenizer: Any = checkpoint.tokenizer
        self.settings = checkpoint.settings
        self.adapter = adapter
        self._last_datastore: tuple[str, tuple[int, ...]] = ("", ())
        self._grammar_tokenizer: tuple[frozenset[int], Any] | None = None
        if self.decoder.device.type == "cpu":
            threads.disable_threads_after_fork()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        weights: str = "stored",
        kv_cache: str = "auto",
        device: str | torch.device = "cpu",
        compile: bool | None = None,
        adapter: str | Path | None = None,
        announce: Callable[[str], None] = lambda text: None,
    ) -> "LayerSkipModel":
        """Load a model.

        Args:
            name_or_path: a checkpoint folder, a GGUF file, a built-in alias, or a hub id.
            dtype: "float32", "bfloat16" or "float16"; None takes bfloat16 where that is fast (see
                `loader.fast_dtype`), else float32.
            weights: "stored", the blocks of a quantized GGUF file as they are, else as "16bit";
                "16bit", converted to `dtype`; "int8" or "int4", quantized while they are loaded
                (docs/reference/models.md).
            kv_cache: precision of keys and values: "auto", that of `dtype`, or "int8", which takes
                about half the memory of bfloat16.
            device: "cpu", "cuda", "cuda:1", ...
            compile: run in kernels compiled for this CPU, which takes some seconds once and needs a C++
                compiler, or on a GPU through `torch.compile`; None: the kernels on a CPU in float32
                and bfloat16, where they are available. The rest is eager PyTorch.
            adapter: file or folder of an exit adapter, or a hub id; None takes the one beside the
                checkpoint or built in, if there is one, and "none" takes none.
            announce: told, in a few words, before something that takes long.

        Raises:
            ValueError: the model cannot be found, read, or is not supported; or a bad argument.
        """
        bits_of(weights)  # before a download
        check_kv_cache(kv_cache)
        place = device_of(device)
        name = str(name_or_path)
        checkpoint = load(
            resolve(name, announce),
            dtype=dtype_of(dtype),
            device=place,
            weights=weights,
            kv_cache=kv_cache,
            compiled=partial(prepared, compile, dtype_of(dtype), place, announce),
        )
        decoder = checkpoint.decoder
        settings = with_defaults(name, checkpoint.settings).measured_for(
            *costs_kind(decoder), threads=threads.num_threads_of(decoder.kernels)
        )
        checkpoint = dataclasses.replace(checkpoint, settings=settings)
        weights_of_adapter = None
        if adapter != NO_ADAPTER:
            adapter_path = (
                packaged_adapter(name) if adapter is None else resolve_adapter(str(adapter))
            )
            file = find_adapter(checkpoint.path, adapter_path)
            if file is not None:
                weights_of_adapter = load_adapter(file, decoder, checkpoint.path)
        return cls(checkpoint, weights_of_adapter)

    def with_settings(self, settings: CheckpointSettings) -> "LayerSkipModel":
        """Return the same model with other settings; nothing is copied."""
        other = copy.copy(self)
        other.settings = settings
        return other

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        if self.settings.end_tokens or self.tokenizer is None:
            return frozenset(self.settings.end_tokens)
        eos_token_id = self.tokenizer.eos_token_id
        return frozenset(() if eos_token_id is None else (eos_token_id,))

    @property
    def has_chat_template(self) -> bool:
        """True where messages can be prompts."""
        return self.tokenizer is not None and bool(self.tokenizer.chat_template)

    def resolve(self, config: DecodingConfig | None = None, **overrides: Any) -> DecodingConfig:
        """Fill in the options that a config leaves open, for this model.

        Args:
            config: see `DecodingConfig`.
            overrides: options that replace those of the config.

        Raises:
            ValueError: an option is unknown, out of range, or does not fit this model.
        """
        config = DecodingConfig.from_options(config, overrides)
        config = dataclasses.replace(
            config,
            datastore=self._datastore(config.datastore),
            prediction=self._prediction(config.prediction),
        )
        return config.resolve(
            self.settings,
            len(self.decoder.layers),
            vocab_size=self.decoder.architecture.vocab_size,
            eos_token_ids=self.end_tokens,
            has_adapter=self.adapter is not None,
        )

    def answer(
        self,
        prompt: Prompt | Tokenized,
        config: DecodingConfig | None = None,
        *,
        prefix: PrefixCache | None = None,
        **overrides: Any,
    ) -> Answer:
        """Begin an answer that is computed while it is iterated over.

        Args:
            prompt: one prompt, as for `generate`, or one whose tokens are known.
            config: see `DecodingConfig`; None = the defaults.
            prefix: keeps the keys and values that the next prompt may share with this text, and uses
                those that this one shares with the last; one for each conversation.
            overrides: options that replace those of the config.

        Raises:
            ValueError: the prompt or an option cannot be used; the message says why.
        """
        plan = self.resolve(config, **overrides)
        tokenized = self._tokenized(prompt)
        measured = self.settings.measured
        if plan.adaptive:
            time_passes(self.decoder, self.adapter)  # before the answer's clock starts
        eos_token_ids = self.eos_token_ids(plan)
        steps = generate(
            self.decoder,
            tokenized.ids,
            plan,
            eos_token_ids=eos_token_ids,
            measured=measured,
            prefix_cache=prefix,
            adapter=self.adapter,
            logits_mask=self.constraint(plan),
        )
        limit = StoppingCriteria.of(self.decoder, tokenized.ids, plan.max_new_tokens)
        return Answer(
            steps,
            self.tokenizer,
            tokenized.ids,
            plan,
            max_new_tokens=limit.max_new_tokens,
            eos_token_ids=eos_token_ids,
            clock=device_clock(self.decoder.device),
            continues=tokenized.continues,
        )

    def eos_token_ids(self, config: DecodingConfig) -> frozenset[int]:
        """Return the tokens that end an answer, with those that are a stop string by themselves.

        Raises:
            ValueError: there are stop strings and no tokenizer, or one cannot be tokenized.
        """
        eos_token_ids = frozenset() if config.ignore_eos else self.end_tokens
        if self.tokenizer is not None:
            return eos_token_ids | stop_tokens(self.tokenizer, config.stop)
        if config.stop:
            raise ValueError("stop strings need a tokenizer, and this checkpoint has none")
        return eos_token_ids

    def constraint(self, config: DecodingConfig) -> Constraint | None:
        """Return a config's grammar at the beginning of an answer; None without one.

        Raises:
            ValueError: it cannot be used, or llguidance, a tokenizer or an end token is missing.
        """
        if not config.is_constrained:
            return None
        ends, size = self.end_tokens, self.decoder.architecture.vocab_size
        if self._grammar_tokenizer is None or self._grammar_tokenizer[0] != ends:
            self._grammar_tokenizer = ends, grammar_tokenizer(self.tokenizer, size, ends)
        assert not isinstance(config.json_schema, Mapping)
        return Constraint(
            self._grammar_tokenizer[1], json_schema=config.json_schema, regex=config.regex
        )

    @overload
    def generate(
        self, prompt: Prompt, config: DecodingConfig | None = None, **overrides: Any
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: Sequence[str] | Sequence[Sequence[int]],
        config: DecodingConfig | None = None,
        **overrides: Any,
    ) -> list[Generation]: ...

    def generate(self, prompt: Any, config: DecodingConfig | None = None, **overrides: Any) -> Any:
        """Answer a prompt, or a list of prompts together.

        A list is decoded as one batch, whose rows begin and end one by one; in float32 each greedy
        answer is that of its prompt alone.

        Args:
            prompt: a text (tokenized as it stands), a list of token ids, a list of chat messages
                (dicts with role and content; the chat template is applied), a dict of `messages`,
                `tools` and `chat_template_kwargs`, or a list of those.
            config: see `DecodingConfig`; None = the defaults.
            overrides: options that replace those of the config, and `prefix` (see `answer`). For a
                list of prompts `prediction` may be a list, with a text or token ids for each.

        Returns:
            A `Generation`, or a list of them for a list of prompts.

        Raises:
            ValueError: the prompt or an option cannot be used; the message says why.
        """
        if not is_batch(prompt):
            return self.answer(prompt, config, **overrides).complete()
        if overrides.pop("prefix", None) is not None:
            raise ValueError("a prefix is for one prompt after another, not for a list of them")
        predictions = _one_for_each(prompt, overrides.pop("prediction", None))
        config = DecodingConfig.from_options(config, overrides)
        tokenized = list[Tokenized]()
        for i, one in enumerate(prompt, 1):
            with named(i):
                tokenized.append(self._tokenized(one))
                check_prompt(self.decoder, tokenized[-1].ids)
        answers = [
            self.answer(
                one,
                config,
                seed=nth_seed(config.seed, i),
                prediction=config.prediction if predictions[i] is None else predictions[i],
            )
            for i, one in enumerate(tokenized)
        ]
        self._complete(answers)
        return [answer.generation for answer in answers]

    def _complete(self, answers: Sequence[Answer]) -> None:
        """Compute some answers as one batch."""
        measured = self.settings.measured
        batch = Batch(self.decoder, measured=measured)
        by_row = dict[Row, Answer]()
        for answer in answers:
            row = Row(
                self.decoder,
                answer.prompt,
                answer.config,
                eos_token_ids=answer.eos_token_ids,
                measured=measured,
                adapter=self.adapter,
                logits_mask=self.constraint(answer.config),
            )
            by_row[row] = answer
            batch.add(row)
        if len(answers) > 1 and any(answer.config.adaptive for answer in answers):
            time_passes(self.decoder, self.adapter)  # before the answers' clocks start
        for answer in answers:
            answer.begin()
        for output in batch:
            if output.step is None:
                assert output.error is not None
                raise output.error
            answer = by_row[output.row]
            answer.take(output.step)
            if answer.stopped:
                batch.remove(output.row)
        for answer in answers:
            answer.finish()

    def stream(
        self, prompt: Prompt, config: DecodingConfig | None = None, **overrides: Any
    ) -> Iterator[str]:
        """Yield the answer's text piece by piece; arguments as for `answer`."""
        if self.tokenizer is None:
            raise ValueError("streaming text needs a tokenizer, and this checkpoint has none")
        return _texts(self.answer(prompt, config, **overrides))

    def _datastore(
        self, datastore: str | Path | tuple[int, ...] | None
    ) -> Path | tuple[int, ...] | None:
        """Return a table's file, or token ids of a text; () = none, None = open."""
        size = self.decoder.architecture.vocab_size
        if datastore is None or isinstance(datastore, Path):
            if datastore is not None:
                Datastore.of(datastore, size)  # reports what is wrong with it
            return datastore
        if isinstance(datastore, str):
            text, ids = self._last_datastore
            if text != datastore:  # a text may be long, and prompts many
                ids = self._encode("datastore", datastore)
                self._last_datastore = datastore, ids
            datastore = ids
        self._check_ids("datastore", datastore)
        return datastore

    def _prediction(self, prediction: str | tuple[int, ...] | None) -> tuple[int, ...] | None:
        """Return the token ids of a predicted answer."""
        if isinstance(prediction, str):
            prediction = self._encode("prediction", prediction)
        self._check_ids("prediction", prediction or ())
        return prediction

    def _encode(self, name: str, text: str) -> tuple[int, ...]:
        if not text:
            return ()
        if self.tokenizer is None:
            raise ValueError(f"this checkpoint has no tokenizer; give the {name} as token ids")
        return tuple(encode(text, self.tokenizer, add_special_tokens=False))

    def _check_ids(self, name: str, ids: tuple[int, ...]) -> None:
        size = self.decoder.architecture.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < size:
            raise ValueError(f"a {name} has to be a text, or token ids of 0 to {size - 1}")

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt; see `prompt.tokenize`."""
        return tokenize(prompt, self.tokenizer)

    def _tokenized(self, prompt: Prompt | Tokenized) -> Tokenized:
        if isinstance(prompt, Tokenized):
            return prompt
        return Tokenized(self.tokenize(prompt), continues=isinstance(prompt, str))


def _one_for_each(prompts: Sequence[Any], prediction: Any) -> Sequence[Any]:
    """Return the prediction of each prompt: one for all (a text or token ids), or a list of them."""
    is_list = isinstance(prediction, list | tuple) and not all(
        isinstance(token, Integral) for token in prediction
    )
    predictions = prediction if is_list else [prediction] * len(prompts)
    if len(predictions) != len(prompts):
        raise ValueError(f"there are {len(predictions)} predictions for {len(prompts)} prompts")
    return predictions


def _texts(answer: Answer) -> Iterator[str]:
    with contextlib.closing(answer):
        yield from (piece.text for piece in answer if piece.text)
