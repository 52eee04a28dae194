"""This package as one of the systems that are measured."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from layerskip.bench.machine import PeakMemory, weight_bytes_read
from layerskip.bench.measure import Run, Setting
from layerskip.decoding import Answer, LayerSkipModel, Sampling
from layerskip.decoding.policy import Plan, choose
from layerskip.decoding.sampling import nth_seed

BENCH_MODES = ("plain", "early-exit", "self-speculative", "auto")


class LayerSkipSystem:
    """`LayerSkipModel` in all settings that were asked for.

    Args:
        model: who answers.
        settings: how.
        stop: texts that end an answer.
        ignore_eos: go on after an end token.
        sampling: how tokens are chosen.
        seed: of what is drawn; each prompt draws apart, and all rows alike.
        watch: is handed each answer before it is computed, and may iterate over it to show it.
    """

    name = "layerskip"

    def __init__(
        self,
        model: LayerSkipModel,
        settings: Sequence[Setting],
        *,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        sampling: Sampling | None = None,
        seed: int = 0,
        watch: Callable[[Setting, Answer], None] = lambda setting, answer: None,
    ) -> None:
        self.settings = settings
        self.memory = PeakMemory(model.decoder.device)
        self._model, self._stop, self._ignore_eos = model, tuple(stop), ignore_eos
        self._sampling = dataclasses.asdict(sampling or Sampling())
        self._seed = seed
        self._watch = watch

    def answer(self, setting: Setting, prompt: Sequence[int], max_new_tokens: int) -> Run:
        """See `System`."""
        self.memory.reset()
        answer = self._model.answer(
            prompt,
            **_options(setting),
            max_new_tokens=max_new_tokens,
            stop=self._stop,
            ignore_eos=self._ignore_eos,
            **self._sampling,
            seed=nth_seed(self._seed, zlib.crc32(repr(list(prompt)).encode())),
        )
        self._watch(setting, answer)
        made = answer.complete()
        return Run(
            steps=made.steps,
            text=made.text,
            ttft_s=made.ttft_s,
            decode_s=made.decode_s,
            peak_memory_bytes=self.memory.read(),
            weight_bytes_read=weight_bytes_read(
                self._model.decoder,
                made.steps[1:],
                exit_layer=made.exit_layer,
                drafting=made.mode == "self-speculative",
                draft_vocabulary=setting.draft_vocabulary,
            ),
        )


def _options(setting: Setting) -> dict[str, Any]:
    """What `LayerSkipModel.answer` is told; for "auto" only what an ablation changes."""
    options: dict[str, Any] = {"mode": setting.mode}
    if setting.mode == "auto":
        return options | dict(setting.switches)
    options |= {"exit_layer": setting.exit_layer, "draft_tokens": setting.draft_tokens}
    if setting.mode == "self-speculative":
        options |= {"draft_from": setting.draft_from, "adaptive": setting.adaptive}
        options |= {"draft_vocabulary": setting.draft_vocabulary}
    return options


# What `auto` is told for each row of an ablation: all of it, without a part, a part alone.
_ABLATION: dict[str, dict[str, Any]] = {
    "without n-grams": {"draft_from": "early-exit"},
    "without draft text": {"draft_text": ()},
    "without early exit": {"draft_from": "n-gram"},
    "without short head": {"draft_vocabulary": 0},
    "without adaptive": {"adaptive": False},
    "early exit alone": {"draft_from": "early-exit", "draft_vocabulary": 0, "adaptive": False},
    "n-grams alone": {"draft_from": "n-gram", "draft_text": (), "adaptive": False},
    "early exit and short head": {"draft_from": "early-exit", "adaptive": False},
    "early exit and adaptive": {"draft_from": "early-exit", "draft_vocabulary": 0},
}


def ablation_of(model: LayerSkipModel) -> list[Setting]:
    """`auto` without each of its parts, and each part alone, as far as the checkpoint has them.

    Rows that would decode in the same way are one.
    """
    in_auto = functools.partial(
        choose, "auto", None, None, settings=model.settings, n_layers=len(model.decoder.layers)
    )
    found: dict[Plan, Setting] = {}
    for label, switches in _ABLATION.items():
        if switches.get("draft_from") == "early-exit" and model.settings.exit_layer is None:
            continue
        # All tokens are 0 of them to `answer`, and () to `choose`.
        all_tokens = {"draft_vocabulary": ()} if "draft_vocabulary" in switches else {}
        plan = in_auto(**(switches | all_tokens))
        setting = dataclasses.replace(
            _setting_of("auto", plan), label=label, switches=tuple(switches.items())
        )
        found.setdefault(plan, setting)
    found.pop(in_auto(), None)
    return list(found.values())


def _setting_of(mode: str, plan: Plan) -> Setting:
    vocabulary = plan.draft_vocabulary
    return Setting(
        mode=mode,
        exit_layer=plan.exit_layer,
        draft_tokens=plan.draft_tokens,
        draft_from=plan.draft_from,
        adaptive=plan.adaptive,
        draft_vocabulary=None if vocabulary is None else len(vocabulary),
    )


def settings_of(
    model: LayerSkipModel,
    *,
    modes: Sequence[str] = BENCH_MODES,
    exit_layers: Sequence[int] = (),
    draft_tokens: Sequence[int] = (),
    draft_from: Sequence[str] = ("early-exit",),
    draft_vocabulary: Sequence[int] = (),
    adaptive: bool = False,
    ablation: bool = False,
) -> list[Setting]:
    """The rows to measure: plain, early exit at each E, self-speculative at each (E, d), auto.

    Where no exit layers or draft lengths are given, they are those that the checkpoint names, else the
    defaults of `policy.choose`. Plain decoding is always among them: the others are compared with it.

    Args:
        model: whose rows they are.
        modes: of `BENCH_MODES`.
        exit_layers: E, each 1 ... L.
        draft_tokens: d, each 0 or more.
        draft_from: of `policy.DRAFT_SOURCES`; n-grams have no exit layer.
        draft_vocabulary: add rows whose early exit may draft so many tokens alone.
        adaptive: add rows whose drafts decide themselves how far to go.
        ablation: add rows of auto without each of its parts, and of each part alone.

    Raises:
        ValueError: an exit layer or draft length that this model does not have.
    """

    def setting(
        mode: str,
        e: int | None = None,
        d: int | None = None,
        source: str | None = None,
        adaptive: bool | None = None,
    ) -> Setting:
        n_layers = len(model.decoder.layers)
        plan = choose(mode, e, d, source, adaptive, settings=model.settings, n_layers=n_layers)
        return _setting_of(mode, plan)

    known = model.settings.draft_vocabulary or range(model.decoder.architecture.vocab_size)
    sizes = (None, *(min(n, len(known)) for n in draft_vocabulary))  # None: all tokens
    exits: Sequence[int | None] = exit_layers or [setting("self-speculative").exit_layer]
    lengths: Sequence[int | None] = draft_tokens or [
        setting("self-speculative", exits[0]).draft_tokens
    ]
    found = [setting("plain")]
    if "early-exit" in modes:
        found += [setting("early-exit", e) for e in exits]
    if "self-speculative" in modes:
        mode = "self-speculative"
        if "n-gram" in draft_from:
            found += [setting(mode, None, d, "n-gram") for d in lengths]
        for source in draft_from:
            for e in exits if source != "n-gram" else ():
                for size in sizes:
                    rows = (setting(mode, e, d, source) for d in lengths)
                    found += [dataclasses.replace(row, draft_vocabulary=size) for row in rows]
                if adaptive:
                    found.append(setting(mode, e, None, source, adaptive=True))
    if "auto" in modes:
        found.append(setting("auto"))
    return [*found, *ablation_of(model)] if ablation else found
