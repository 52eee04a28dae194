"""This package as one of the systems that are measured."""

from collections.abc import Sequence
from typing import Any

from layerskip.bench.bandwidth import weight_bytes_read
from layerskip.bench.measure import Run, Setting
from layerskip.bench.memory import PeakMemory
from layerskip.decoding import Generation, LayerSkipModel
from layerskip.decoding.policy import choose
from layerskip.model import Decoder

BENCH_MODES = ("plain", "early-exit", "self-speculative", "auto")


class OwnSystem:
    """`LayerSkipModel` in all settings that were asked for."""

    name = "layerskip"

    def __init__(
        self,
        model: LayerSkipModel,
        settings: Sequence[Setting],
        *,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> None:
        self.settings = settings
        self.memory = PeakMemory(model.decoder.device)
        self._model, self._stop, self._ignore_eos = model, tuple(stop), ignore_eos

    def answer(self, setting: Setting, prompt: Sequence[int], max_new_tokens: int) -> Run:
        """See `System`."""
        self.memory.reset()
        made = self._model.generate(
            prompt,
            **_options(setting),
            max_new_tokens=max_new_tokens,
            stop=self._stop,
            ignore_eos=self._ignore_eos,
        )
        return run_of(
            made,
            self._model.decoder,
            draft_vocabulary=setting.draft_vocabulary,
            peak_memory_bytes=self.memory.read(),
        )


def run_of(
    made: Generation,
    decoder: Decoder,
    *,
    draft_vocabulary: int | None = None,
    peak_memory_bytes: int | None = None,
) -> Run:
    """What an answer of this package was like, in the terms of a comparison."""
    return Run(
        steps=made.steps,
        text=made.text,
        ttft_s=made.ttft_s,
        decode_s=made.decode_s,
        peak_memory_bytes=peak_memory_bytes,
        weight_bytes_read=weight_bytes_read(
            decoder,
            made.steps[1:],
            exit_layer=made.exit_layer,
            drafting=made.mode == "self-speculative",
            draft_vocabulary=draft_vocabulary,
        ),
    )


def _options(setting: Setting) -> dict[str, Any]:
    """What `LayerSkipModel.answer` is told; for "auto" nothing, so that it decides as for any user."""
    options: dict[str, Any] = {"mode": setting.mode}
    if setting.mode != "auto":
        options |= {"exit_layer": setting.exit_layer, "draft_tokens": setting.draft_tokens}
    if setting.mode == "self-speculative":
        options |= {"draft_from": setting.draft_from, "adaptive": setting.adaptive}
        options |= {"draft_vocabulary": setting.draft_vocabulary}
    return options


def settings_of(
    model: LayerSkipModel,
    *,
    modes: Sequence[str] = BENCH_MODES,
    exit_layers: Sequence[int] = (),
    draft_tokens: Sequence[int] = (),
    draft_from: Sequence[str] = ("early-exit",),
    draft_vocabulary: Sequence[int] = (),
    adaptive: bool = False,
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

    Raises:
        ValueError: an exit layer or draft length that this model does not have.
    """

    def setting(
        mode: str,
        e: int | None = None,
        d: int | None = None,
        source: str | None = None,
        *,
        adaptive: bool = False,
        vocabulary: int | None = None,
    ) -> Setting:
        known: dict[str, Any] = {"settings": model.settings, "n_layers": len(model.decoder.layers)}
        plan = choose(mode, e, d, source, adaptive, **known)
        return Setting(
            mode=mode,
            exit_layer=plan.exit_layer,
            draft_tokens=plan.draft_tokens,
            draft_from=plan.draft_from,
            adaptive=plan.adaptive,
            draft_vocabulary=vocabulary,
        )

    default = setting("self-speculative")
    exits: Sequence[int | None] = exit_layers or [default.exit_layer]
    lengths: Sequence[int | None] = draft_tokens or [default.draft_tokens]
    found = [setting("plain")]
    if "early-exit" in modes:
        found += [setting("early-exit", e) for e in exits]
    if "self-speculative" in modes:
        mode = "self-speculative"
        if "n-gram" in draft_from:
            found += [setting(mode, None, d, "n-gram") for d in lengths]
        for source in draft_from:
            for e in exits if source != "n-gram" else ():
                for vocabulary in (None, *draft_vocabulary):
                    found += [setting(mode, e, d, source, vocabulary=vocabulary) for d in lengths]
                if adaptive:
                    found.append(setting(mode, e, None, source, adaptive=True))
    if "auto" in modes:
        found.append(setting("auto"))
    return found
