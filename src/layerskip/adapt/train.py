"""Training of an exit adapter: rounds of new data, some passes over the newest of it, an evaluation."""

import dataclasses
import itertools
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerskip.adapt.agreement import Agreement, measure_agreement, write_acceptance
from layerskip.adapt.config import AdaptConfig
from layerskip.adapt.loss import SoftCrossEntropy, soft_targets
from layerskip.adapt.muon import Muon
from layerskip.adapt.network import AdapterNetwork, head_rows, initial_parameters
from layerskip.adapt.report import SourceSpeed, measure_sources, write_card
from layerskip.adapt.ridge import fit_projection
from layerskip.adapt.store import Store, read_sequences, write_sequences
from layerskip.adapt.teacher import TeacherSequence, read_text, write_answers
from layerskip.adapt.texts import load_texts, pack_texts
from layerskip.decoding import DecodingConfig, LayerSkipModel
from layerskip.fileio import make_folder, read_json, replace_json
from layerskip.model import Files, open_files, resolve
from layerskip.model.checkpoint import ADAPTER_FILE
from layerskip.model.exit_adapter import (
    NO_ADAPTER,
    AdapterSettings,
    hashes_of,
    load_adapter,
    save_adapter,
)
from layerskip.model.hardware import product_dtype
from layerskip.model.publish import create_repository, upload

_BETAS, _WEIGHT_DECAY, _MAX_NORM = (0.9, 0.95), 0.01, 1.0
_WARMUP_STEPS = 30
_AVERAGE_MEMORY = 0.996  # decay of the averaged parameters in a step
_LOWEST_RATE = 0.05  # of the peak, at the end
_GREEDY = DecodingConfig(mode="plain")
_SAMPLED = DecodingConfig(mode="plain", temperature=0.8, top_p=0.95)
_ANSWERS_AT_ONCE = 32
_MAX_CHARACTERS = 32  # of a prompt or text, for each token of `max_length`
_COUNTED_TOKENS = 400_000  # of texts, for the draft vocabulary
_ANSWER_WEIGHT = 20  # of a token of an answer there
_INITIAL_LOG_SCALE = math.log(0.7)
_MIN_GAIN = 1e-3  # of accepted tokens, that counts as better
_STATE, _TENSORS, _HELD_OUT = "state.json", "state.safetensors", "held_out.safetensors"
_PARAMETER, _AVERAGE = "parameter", "average"  # in the names of its tensors

Report = Callable[["Progress"], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """State of a run, for a progress display.

    Attributes:
        activity: a few words.
        minutes: spent so far, with earlier parts of the run.
        max_minutes: of the run.
        tokens: new tokens so far.
        passes: tokens trained on so far, each time that they were.
        answers_per_prompt: so far. Above 1, prompts have been used again.
        loss: of the last steps, or None.
        agreement: of the last evaluation, where one has just been made.
    """

    activity: str
    minutes: float
    max_minutes: float
    tokens: int = 0
    passes: int = 0
    answers_per_prompt: float = 0.0
    loss: float | None = None
    agreement: Agreement | None = None


@dataclasses.dataclass(kw_only=True)
class _State:
    """Numbers of a checkpoint, beside the tensors."""

    round: int = 0
    step: int = 0  # of this round
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    passes: int = 0
    pieces: int = 0  # of texts, used so far
    prompts: int = 0
    best: float = -1.0
    evaluations_since_best: int = 0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptResult:
    """The outcome of a run.

    Attributes:
        path: of the adapter.
        agreement: of the best evaluation.
        tokens: new tokens that it saw.
        passes: tokens trained on.
        minutes: of the whole run.
        history: an entry of each evaluation.
        speeds: of each source of drafts, on held-out prompts.
        url: address of the uploaded adapter, or None.
    """

    path: Path
    agreement: Agreement
    tokens: int
    passes: int
    minutes: float
    history: list[dict[str, Any]]
    speeds: list[SourceSpeed]
    url: str | None = None


def adapt(
    name: str, config: AdaptConfig, report: Report = lambda progress: None, **loading: Any
) -> AdaptResult:
    """Train an exit adapter for a frozen model, which is not changed.

    Args:
        name: folder, hub id or alias of the model.
        config: settings; the output folder holds what `resume` needs.
        report: called with the progress, some times a minute.
        loading: see `LayerSkipModel.from_pretrained`.

    Raises:
        ValueError: the model or the data cannot be used, or the output folder has a run and `resume`
            is off.
        UploadError: the hub refuses the upload; before training where it can be known.
    """
    return _Run(name, config, report, loading).run()


class _Run:
    """One run; the steps of `run` in order."""

    def __init__(
        self, name: str, config: AdaptConfig, report: Report, loading: dict[str, Any]
    ) -> None:
        self._name, self._config, self._report = name, config, report
        self._folder = config.output
        self._state = _State()
        self._prompts: list[Any] = []
        self._resumed = (self._folder / _STATE).is_file()
        if self._resumed and not config.resume:
            raise ValueError(
                f"{self._folder} holds a run already: give --resume to go on, or another --output"
            )
        if config.push_to_hub is not None:
            create_repository(config.push_to_hub, private=config.private)
        make_folder(self._folder)
        if self._resumed:
            self._state = _State(**read_json(self._folder / _STATE))
        self._begin = time.monotonic() - self._state.seconds
        self._tell("loading the model")
        path = resolve(name)
        self._model = LayerSkipModel.from_pretrained(path, adapter=NO_ADAPTER, **loading)
        self._decoder = self._model.decoder
        if self._decoder.device.type != "cpu":
            raise ValueError("exit adapters are trained on the CPU: leave out the device")
        if config.exit_layer >= len(self._decoder.layers):
            raise ValueError(
                f"exit layer {config.exit_layer} is out of range: this model has"
                f" {len(self._decoder.layers)} layers"
            )
        self._files: Files = open_files(path)
        self._tell("reading prompts and texts")
        n_characters = config.max_length * _MAX_CHARACTERS
        self._prompts, self._texts = load_texts(config.data, config.seed, n_characters)
        if len(self._prompts) < 2:
            raise ValueError("there is one prompt in the data; give two or more: some are held out")
        n_held_out = min(config.eval_prompts, len(self._prompts) // 2)
        self._held_out_prompts, self._prompts = (
            self._prompts[:n_held_out],
            self._prompts[n_held_out:],
        )
        self._pieces = self._text_pieces()
        self._store = Store(self._folder / "data", config.buffer_tokens)

    def run(self) -> AdaptResult:
        """Train until the time is over, or the agreement does not rise any more."""
        config, state = self._config, self._state
        held_out = self._held_out()
        if not self._resumed:
            self._make_round(0)
        self._prepare_network()
        if not state.history:
            self._evaluate(held_out)
        while self._minutes < config.max_minutes:
            if state.evaluations_since_best >= config.patience:
                break
            if state.round not in self._store:
                self._make_round(state.round)
                self._save()  # a resumed run goes on behind these prompts and texts
            self._train_round()
            self._evaluate(held_out)
            state.round, state.step = state.round + 1, 0
            self._save()
        return self._finish(held_out)

    def _finish(self, held_out: Sequence[TeacherSequence]) -> AdaptResult:
        """Measure the best adapter, write its card, and upload both."""
        config, state, path = self._config, self._state, self._folder / ADAPTER_FILE
        agreement = write_acceptance(path, self._decoder, self._files, held_out)
        self._model.adapter = load_adapter(path, self._decoder, self._files.path)
        prompts = [s.tokens[: s.prompt_length] for s in held_out]
        speeds = measure_sources(self._model, prompts, config.max_new_tokens, self._tell)
        tokens, passes = state.tokens, state.passes
        card = write_card(self._folder, self._name, config, agreement, tokens, passes, speeds)
        url = None
        if config.push_to_hub is not None:
            self._tell("uploading")
            url = upload(self._folder, [path.name, card.name], config.push_to_hub)
        return AdaptResult(
            path=path,
            agreement=agreement,
            tokens=tokens,
            passes=passes,
            minutes=self._minutes,
            history=state.history,
            speeds=speeds,
            url=url,
        )

    # --- data

    def _held_out(self) -> list[TeacherSequence]:
        """Return greedy answers to the held-out prompts, which are made once."""
        path = self._folder / _HELD_OUT
        if not path.is_file():
            self._tell("answering held-out prompts")
            write_sequences(path, self._answers(self._held_out_prompts, _GREEDY, 0))
        return read_sequences(path)

    def _answers(
        self, prompts: Sequence[Any], sampling: DecodingConfig, seed: int
    ) -> list[TeacherSequence]:
        tokenizer, answers = self._model.tokenizer, list[TeacherSequence]()
        has_template = self._model.has_chat_template
        ids = []
        for prompt in prompts:
            if isinstance(prompt, str) and has_template:
                prompt = [{"role": "user", "content": prompt}]
            one = self._model.tokenize(prompt) if tokenizer is not None else list(prompt)
            ids.append(one[-self._config.max_length :])
        ids.sort(key=len)
        how = dataclasses.replace(sampling, seed=seed, max_new_tokens=self._config.max_new_tokens)
        for begin in range(0, len(ids), _ANSWERS_AT_ONCE):
            answers += write_answers(
                self._decoder,
                ids[begin : begin + _ANSWERS_AT_ONCE],
                self._config.exit_layer,
                how,
                eos_token_ids=self._model.end_tokens,
            )
        return answers

    def _text_pieces(self) -> Iterator[list[int]]:
        """Iterate over pieces of the texts without end, from where the run stands."""
        if not self._texts:
            return iter(())

        def encode(text: str) -> list[int]:
            return self._model.tokenize(text)

        pieces = itertools.chain.from_iterable(
            pack_texts(self._texts, encode, self._config.max_length) for _ in itertools.count()
        )
        return itertools.islice(pieces, self._state.pieces, None)

    def _make_round(self, number: int) -> None:
        """Make new data: answers of the model, and texts."""
        config, state = self._config, self._state
        written, sequences = 0, list[TeacherSequence]()
        while written < config.own_share * config.round_tokens and self._has_time(sequences):
            self._tell("writing answers")
            chosen = [
                self._prompts[i % len(self._prompts)]
                for i in range(state.prompts, state.prompts + _ANSWERS_AT_ONCE)
            ]
            is_new = state.prompts < len(self._prompts)
            # Every second batch is greedy, as long as the prompts are new.
            is_greedy = is_new and state.prompts // _ANSWERS_AT_ONCE % 2 == 0
            sampling = _GREEDY if is_greedy else _SAMPLED
            sequences += self._answers(chosen, sampling, config.seed + state.prompts)
            state.prompts += _ANSWERS_AT_ONCE
            written = sum(len(s) - s.prompt_length for s in sequences)
        total = sum(map(len, sequences))
        while total < config.round_tokens and self._has_time(sequences):
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._tell("reading texts")
            sequences.append(read_text(self._decoder, piece, config.exit_layer))
            total += len(piece)
            state.pieces += 1
        self._store.add(number, sequences)
        state.tokens += total

    def _has_time(self, sequences: list[TeacherSequence]) -> bool:
        """Return whether to make more data; a round has at least one batch of it."""
        return not sequences or self._minutes < self._config.max_minutes

    def _batches(self) -> list[list[TeacherSequence]]:
        """Return the batches of this round, the same after a resume."""
        config, number = self._config, self._state.round
        chosen = random.Random(config.seed * 100_003 + number)
        sequences = [s for s in self._store.sequences() if len(s) > config.depths]
        passes = config.epochs * self._store.tokens_of(number)
        order: list[TeacherSequence] = []
        n = 0
        while n < passes:
            for sequence in chosen.sample(sequences, len(sequences)):
                order.append(sequence)
                n += len(sequence)
                if n >= passes:
                    break
        batches: list[list[TeacherSequence]] = []
        for begin in range(
            0, len(order), 64
        ):  # of similar lengths, so that there is little padding
            batch: list[TeacherSequence] = []
            for sequence in sorted(order[begin : begin + 64], key=len):
                if batch and len(sequence) * (len(batch) + 1) > config.batch_tokens:
                    batches.append(batch)
                    batch = []
                batch.append(sequence)
            batches.append(batch)
        chosen.shuffle(batches)
        return batches

    # --- training

    def _prepare_network(self) -> None:
        """Make the parameters, or read them and the optimizer's moments."""
        config, saved = self._config, defaultdict[str, dict[str, Tensor]](dict)
        if self._resumed:
            tensors = load_file(self._folder / _TENSORS)
            self._vocabulary = tuple(tensors.pop("draft_vocabulary").tolist())
            for key, tensor in tensors.items():
                kind, name = key.split(".", 1)
                saved[kind][name] = tensor
            parameters = saved.pop(_PARAMETER)
            log_scale = float(parameters.pop("log_scale"))
        else:
            self._tell("fitting the projection")
            states = ((s.exit_states, s.last_states) for s in self._store.sequences())
            parameters = initial_parameters(self._files, fit_projection(states), config.seed)
            log_scale = _INITIAL_LOG_SCALE
            self._vocabulary = self._draft_vocabulary()
        self._network = AdapterNetwork(self._decoder, parameters, log_scale)
        # Averaged over steps, which stands for the end of the schedule before it has come.
        self._average = AdapterNetwork(self._decoder, parameters, log_scale)
        trained, lr = self._network.parameters.values(), config.learning_rate
        matrices = [p for p in trained if p.ndim == 2]
        others = [p for p in trained if p.ndim != 2]
        self._optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr, _WEIGHT_DECAY),
            torch.optim.AdamW(others, lr=lr, betas=_BETAS, weight_decay=0.0),
        ]
        for name, tensor in saved.pop(_AVERAGE, {}).items():
            self._average.parameters[name].data.copy_(tensor)
        for kind, moments in saved.items():
            for name, tensor in moments.items():
                self._moments(name)[kind] = tensor
        dtype = product_dtype(self._decoder.device)
        self._head = head_rows(self._files, self._vocabulary).to(dtype)

    def _moments(self, name: str) -> dict[str, Tensor]:
        """Return what an optimizer keeps of a parameter."""
        parameter = self._network.parameters[name]
        optimizer = self._optimizers[0 if parameter.ndim == 2 else 1]
        return cast(dict[str, Tensor], optimizer.state[parameter])

    def _draft_vocabulary(self) -> tuple[int, ...]:
        """Return the most frequent tokens of texts and answers, and those that end an answer."""
        counts: Counter[int] = Counter()
        for sequence in self._store.sequences():
            counts.update(sequence.tokens)
            for token in sequence.tokens[sequence.prompt_length :]:
                counts[token] += _ANSWER_WEIGHT
        total = 0
        if self._model.tokenizer is not None:
            for text in [str(p) for p in self._prompts[:2000]] + self._texts:
                ids = self._model.tokenize(text)
                counts.update(ids)
                total += len(ids)
                if total > _COUNTED_TOKENS:
                    break
        frequent = (token for token, _ in counts.most_common())
        kept = dict.fromkeys([*sorted(self._model.end_tokens), *frequent])
        return tuple(kept)[: self._config.draft_vocabulary]

    def _train_round(self) -> None:
        batches = self._batches()
        saved, losses = self._minutes, list[float]()
        while self._state.step < len(batches) and self._minutes < self._config.max_minutes:
            batch = batches[self._state.step]
            losses.append(self._train_step(batch))
            self._state.step += 1
            self._state.steps += 1
            self._state.passes += sum(map(len, batch))
            self._tell("training", loss=sum(losses[-20:]) / len(losses[-20:]))
            if self._minutes - saved > self._config.save_minutes:
                self._save()
                saved = self._minutes

    def _train_step(self, batch: Sequence[TeacherSequence]) -> float:
        loss = self._loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self._network.parameters.values()), _MAX_NORM)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._config.learning_rate * self._rate()
            optimizer.step()
            optimizer.zero_grad()
        steps = self._state.steps
        decay = min(_AVERAGE_MEMORY, (steps + 1) / (steps + 10))
        for name, average in self._average.parameters.items():
            average.data.lerp_(self._network.parameters[name].detach(), 1.0 - decay)
        return float(loss.detach())

    def _rate(self) -> float:
        """Return the learning rate of this step as a share of the peak."""
        warmup = min(1.0, (self._state.steps + 1) / _WARMUP_STEPS)
        return warmup * max(1.0 - self._minutes / self._config.max_minutes, _LOWEST_RATE)

    def _loss(self, batch: Sequence[TeacherSequence]) -> Tensor:
        """Return KL to the model over the draft vocabulary plus weighted CE, averaged over depths."""
        exit_states, last_states, lengths = _padded(batch)
        t = last_states.shape[1]
        positions = torch.arange(t)
        is_real = positions < lengths[:, None]
        positions = positions.expand(is_real.shape)[is_real]
        cap, scale = self._decoder.architecture.logit_cap, self._network.logit_scale
        with torch.no_grad():
            normed = self._decoder.final_norm(last_states[is_real])
            targets, entropies = soft_targets(normed, self._head, cap, self._config.ce_weight)
        total = torch.zeros(())
        with torch.autocast("cpu", torch.bfloat16, enabled=self._head.dtype == torch.bfloat16):
            outputs = self._network.outputs(exit_states, last_states, self._config.depths)
        for depth, hidden in enumerate(outputs):
            weights = (positions >= depth).float()
            scaled = hidden[is_real].float() * scale
            total = total + SoftCrossEntropy.apply(scaled, self._head, cap, targets, weights)
            total = total - (weights * entropies).sum() / weights.sum()  # KL is 0 at best
        return total / len(outputs)

    # --- evaluation and checkpoints

    def _evaluate(self, held_out: Sequence[TeacherSequence]) -> None:
        state = self._state
        agreement = self._agreement(held_out)
        state.history.append(
            {
                "minutes": round(self._minutes, 2),
                "tokens": state.tokens,
                "passes": state.passes,
                "by_depth": [round(share, 4) for share in agreement.by_depth],
                "accepted": round(agreement.accepted, 4),
                "answer_tokens": agreement.tokens,
            }
        )
        if agreement.accepted > state.best + _MIN_GAIN:
            state.best, state.evaluations_since_best = agreement.accepted, 0
            self._write_adapter(agreement)
        else:
            state.evaluations_since_best += 1
        self._tell("evaluated", agreement=agreement)

    def _agreement(self, held_out: Sequence[TeacherSequence]) -> Agreement:
        cap = self._decoder.architecture.logit_cap
        return measure_agreement(self._average, held_out, self._head, self._vocabulary, cap)

    def _write_adapter(self, agreement: Agreement) -> None:
        settings = AdapterSettings(
            exit_layer=self._config.exit_layer,
            logit_scale=float(self._average.logit_scale.detach()),
            base=hashes_of(self._files),
            acceptance=agreement.by_confidence,
        )
        save_adapter(self._folder / ADAPTER_FILE, self._average.tensors, settings, self._vocabulary)

    def _save(self) -> None:
        """Write a checkpoint: tensors first, so that the state never points beyond them."""
        tensors = {"draft_vocabulary": torch.tensor(self._vocabulary)}
        for name, parameter in self._network.parameters.items():
            tensors[f"{_PARAMETER}.{name}"] = parameter.detach().contiguous()
            tensors[f"{_AVERAGE}.{name}"] = self._average.parameters[name].detach().contiguous()
            tensors |= {f"{kind}.{name}": value for kind, value in self._moments(name).items()}
        self._state.seconds = self._minutes * 60
        temporary = self._folder / f".{_TENSORS}"
        save_file(tensors, temporary)
        temporary.replace(self._folder / _TENSORS)
        replace_json(self._folder / _STATE, dataclasses.asdict(self._state))

    @property
    def _answers_per_prompt(self) -> float:
        return self._state.prompts / max(len(self._prompts), 1)

    @property
    def _minutes(self) -> float:
        return (time.monotonic() - self._begin) / 60

    def _tell(self, activity: str, **figures: Any) -> None:
        self._report(
            Progress(
                activity=activity,
                minutes=self._minutes,
                max_minutes=self._config.max_minutes,
                tokens=self._state.tokens,
                passes=self._state.passes,
                answers_per_prompt=self._answers_per_prompt,
                **figures,
            )
        )


def _padded(batch: Sequence[TeacherSequence]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states of a batch [B, T, D] in float32, padded on the right, and its lengths [B]."""
    lengths = torch.tensor([len(s) for s in batch])
    exits = torch.nn.utils.rnn.pad_sequence([s.exit_states for s in batch], batch_first=True)
    lasts = torch.nn.utils.rnn.pad_sequence([s.last_states for s in batch], batch_first=True)
    return exits.float(), lasts.float(), lengths
