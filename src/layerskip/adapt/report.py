"""Speed of an adapter on held-out prompts, and its model card."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from layerskip.adapt.agreement import Agreement
from layerskip.adapt.config import PYTHON_TEXTS, AdaptConfig
from layerskip.data.readers import local_files
from layerskip.decoding import DecodingConfig, LayerSkipModel, Step, generate
from layerskip.decoding.controller import DraftCosts, time_passes
from layerskip.decoding.exit_adapter import ExitAdapter, head_share
from layerskip.model.checkpoint import ADAPTER_FILE
from layerskip.model.publish import card_header, origin_of, public_name

_SOURCES = ("n-gram", "exit-adapter", "exit-adapter+n-gram")
_MAX_PROMPTS = 16
_WARM_UP_TOKENS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceSpeed:
    """Speed of one source of drafts in greedy decoding.

    Attributes:
        source: as `draft_from`.
        predicted: speedup over plain decoding by the controller's costs.
        measured: speedup over plain decoding, interleaved with it.
        acceptance: accepted over drafted tokens; None where nothing was drafted.
        accepted_length: tokens of a round, with the model's own.
    """

    source: str
    predicted: float
    measured: float
    acceptance: float | None
    accepted_length: float


def measure_sources(
    model: LayerSkipModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    tell: Callable[[str], None] = lambda activity: None,
) -> list[SourceSpeed]:
    """Decode prompts plainly and with each source of drafts, interleaved.

    Args:
        model: with the adapter.
        prompts: token ids; the first `_MAX_PROMPTS` are used.
        max_new_tokens: of an answer.
        tell: called with a few words before each prompt.
    """
    assert model.adapter is not None
    time_passes(model.decoder, model.adapter)
    decoder, adapter = model.decoder, model.adapter
    share = head_share(decoder, adapter)
    costs = DraftCosts.of(decoder, adapter.settings.exit_layer, share)
    configs = {"plain": model.resolve(mode="plain")}
    configs |= {source: model.resolve(draft_from=source) for source in _SOURCES}
    seconds = dict.fromkeys(configs, 0.0)
    predicted = dict.fromkeys(configs, 0.0)
    steps: dict[str, list[Step]] = {source: [] for source in configs}
    _decode(model, prompts[0], configs["exit-adapter+n-gram"], _WARM_UP_TOKENS)
    chosen = prompts[:_MAX_PROMPTS]
    for number, prompt in enumerate(chosen, 1):
        tell(f"measuring, prompt {number} of {len(chosen)}")
        for source, config in configs.items():
            elapsed, answer = _decode(model, prompt, config, max_new_tokens)
            seconds[source] += elapsed
            steps[source] += answer
            predicted[source] += sum(_cost(step, costs) for step in answer)
    n_tokens = sum(len(step.tokens) for step in steps["plain"])
    return [
        SourceSpeed(
            source=source,
            predicted=n_tokens / predicted[source],
            measured=seconds["plain"] / seconds[source],
            acceptance=_share(
                sum(step.accepted for step in steps[source]),
                sum(step.drafted for step in steps[source]),
            ),
            accepted_length=n_tokens / len(steps[source]),
        )
        for source in _SOURCES
    ]


def _decode(
    model: LayerSkipModel, prompt: Sequence[int], config: DecodingConfig, max_new_tokens: int
) -> tuple[float, list[Step]]:
    """Return the seconds of an answer and its steps, both without the prompt's pass."""
    config = dataclasses.replace(config, max_new_tokens=max_new_tokens)
    rounds = generate(
        model.decoder, prompt, config, eos_token_ids=model.end_tokens, adapter=model.adapter
    )
    next(rounds)
    begin = time.perf_counter()
    steps = list(rounds)
    return time.perf_counter() - begin, steps


def _cost(step: Step, costs: DraftCosts) -> float:
    drafted = step.sources.count(ExitAdapter.name)
    return costs.round(len(step.sources), drafted + step.discarded, len(step.sources) - drafted)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def table(speeds: Sequence[SourceSpeed]) -> list[tuple[str, ...]]:
    """Return the rows of the last table, the heading first."""
    rows: list[tuple[str, ...]] = [
        ("drafts from", "predicted", "measured", "accepted", "tokens a round")
    ]
    for speed in speeds:
        accepted = "" if speed.acceptance is None else f"{speed.acceptance:.0%}"
        rows.append(
            (
                speed.source,
                f"{speed.predicted:.2f}x",
                f"{speed.measured:.2f}x",
                accepted,
                f"{speed.accepted_length:.2f}",
            )
        )
    return rows


def write_card(
    folder: Path,
    name: str,
    config: AdaptConfig,
    agreement: Agreement,
    tokens: int,
    passes: int,
    speeds: Sequence[SourceSpeed],
) -> Path:
    """Write README.md, the adapter's model card without paths of this machine, and return its path."""
    heading, *rows = table(speeds)
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    shares = ", ".join(f"{share:.0%}" for share in agreement.by_depth)
    settings = dataclasses.asdict(config)
    for left_out in ("output", "data", "resume", "push_to_hub", "private"):
        del settings[left_out]
    origin = origin_of(name)
    model = public_name(name)
    base = origin.hub_id or model
    sources = ", ".join(f"`{public_name(source)}`" for source in config.data)
    repository = config.push_to_hub or "."
    header = card_header(
        origin,
        base_model_relation="adapter",
        datasets=[s for s in config.data if s != PYTHON_TEXTS and not local_files(s)],
        library_name="layerskip",
        tags=["layerskip", "speculative-decoding"],
    )
    text = f"""{header}

# Exit adapter of {base}

`{ADAPTER_FILE}` drafts for {base} in layerskip: a decoder layer
behind the first {config.exit_layer} layers of the frozen model. The model verifies every draft, so the
answers are its own. The file is bound to this model by hashes, and refused for another one.

```
layerskip generate --model {model} --adapter {repository} --prompt "..."
```

Agreement with the model's greedy answers to {agreement.tokens:,} held-out tokens, by depth
of the draft: {shares}. On held-out prompts, greedy, over plain decoding:

{chr(10).join(lines)}

Trained on {tokens:,} tokens ({passes:,} passes): the model's own answers to prompts, and texts, of
{sources}.

| setting | value |
|---|---|
""" + "".join(f"| `{key}` | {value} |\n" for key, value in settings.items())
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return path
