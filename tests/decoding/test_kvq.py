"""One cache for draft and verification (KVQ): what is computed in a round, and what is not."""

import collections
import dataclasses

import pytest
import torch
from tiny_decoders import LAYERS, PLAIN, random_prompt, speculative, tiny_decoder

from layerskip.decoding import Plan, Sampling, accept, generate
from layerskip.decoding.batch import Batch
from layerskip.decoding.generate import PREFILL_CHUNK
from layerskip.model import Decoder, KVCache, distributions
from tiny_models import COSTS


@dataclasses.dataclass
class Work:
    """What a decoder was asked for since the last `take`."""

    layers: list = dataclasses.field(default_factory=list)  # (layer, positions)
    heads: list = dataclasses.field(default_factory=list)  # positions a call

    def take(self):
        layers, heads = self.layers, self.heads
        self.layers, self.heads = [], []
        return layers, heads


@pytest.fixture
def work(monkeypatch):
    """Records every layer and head that is used; `_layer` is where a layer is computed."""
    work = Work()
    layer, logits = Decoder._layer, Decoder.logits

    def recorded_layer(self, x, index, span, *rest):
        work.layers.append((index, tuple(span.positions[0].tolist())))
        return layer(self, x, index, span, *rest)

    def recorded_logits(self, hidden):
        work.heads.append(hidden.shape[1])
        return logits(self, hidden)

    monkeypatch.setattr(Decoder, "_layer", recorded_layer)
    monkeypatch.setattr(Decoder, "logits", recorded_logits)
    return work


def loop(prompt, plan, n=24, sampling=None, case="mistral", **changes):
    decoder = tiny_decoder(case, **changes)
    prompt = random_prompt(decoder, prompt)
    return generate(decoder, prompt, plan=plan, sampling=sampling or Sampling(), max_new_tokens=n)


@pytest.mark.parametrize("exit_layer", [1, 2, 3, LAYERS])
@pytest.mark.parametrize("d", [0, 1, 5])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9)])
def test_layers_run_once_per_round(work, exit_layer, d, sampling):
    settled = 7
    made = loop(settled, speculative(exit_layer, d), sampling=sampling)
    next(made)
    work.take()
    for step in made:
        positions = tuple(range(settled, settled + step.drafted + 1))
        layers, heads = work.take()
        drafting = [(layer, (at,)) for at in positions for layer in range(exit_layer)]
        verifying = [(layer, positions) for layer in range(exit_layer, LAYERS)]
        assert layers == drafting + verifying
        assert heads == [1] * step.drafted + [step.drafted + 1]
        # In other words: no layer sees a position twice, and nothing that is settled is run again.
        seen = collections.Counter((layer, at) for layer, ats in layers for at in ats)
        assert set(seen.values()) == {1}
        settled += step.accepted + 1


@pytest.mark.parametrize(
    ("plan", "n_layers"),
    [
        (PLAIN, LAYERS),
        (Plan(mode="early-exit", exit_layer=2), 2),
        (Plan(mode="early-exit", exit_layer=LAYERS), LAYERS),
    ],
)
def test_plain_and_early_exit_run_one_position_a_step(work, plan, n_layers):
    """An early exit at E runs E layers, in the prompt's pass too."""
    made = loop(7, plan, n=6)
    for i, _ in enumerate(made):
        layers, heads = work.take()
        positions = tuple(range(7)) if i == 0 else (6 + i,)
        assert layers == [(layer, positions) for layer in range(n_layers)]
        assert heads == [1]


def test_prompt_runs_in_chunks_with_one_row_of_logits(work):
    n = PREFILL_CHUNK + 9
    next(loop(n, speculative(2, 5), max_position_embeddings=2 * PREFILL_CHUNK))
    layers, heads = work.take()
    chunks = [tuple(range(PREFILL_CHUNK)), tuple(range(PREFILL_CHUNK, n))]
    assert layers == [(layer, chunk) for chunk in chunks for layer in range(LAYERS)]
    assert heads == [1]


# Not `numpy`: it refuses tensors of a device, so it cannot wait for one.
READS = (
    "item",
    "tolist",
    "cpu",
    "nonzero",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
)


@pytest.fixture
def reads(monkeypatch):
    """Names of the calls by which Python looks at numbers of a device tensor, on a CPU that runs what
    a device would.

    `KVCache.lengths` is on the host by design, so that what is read there costs nothing; what `span`
    copies to the device would wait for it.
    """
    reads, in_span, on_host = [], [], set()
    span, tensor = KVCache.span, torch.tensor

    def host_span(self, *args):
        assert self.lengths.device.type == "cpu"
        on_host.add(id(self.lengths))
        in_span.append(True)
        try:
            return span(self, *args)
        finally:
            in_span.pop()

    def recorded(name):
        original = getattr(torch.Tensor, name)

        def read(self, *args, **options):
            places = [x for x in (*args, *options.values()) if isinstance(x, str | torch.device)]
            copied = name == "to" and bool(places)
            if copied or (name != "to" and not in_span and id(self) not in on_host):
                reads.append(name)
            return original(self, *args, **options)

        return read

    def made_anew(numbers, *args, **options):  # from Python's: on a device it would be a copy
        if options.get("device", "cpu") != "cpu":
            reads.append("tensor")
        return tensor(numbers, *args, **options)

    monkeypatch.setattr(KVCache, "span", host_span)
    monkeypatch.setattr(torch, "tensor", made_anew)
    # What a device runs.
    monkeypatch.setattr(accept, "_in_turn", accept._at_once)
    monkeypatch.setattr(accept, "_compared_in_turn", accept._compared_at_once)
    monkeypatch.setattr(distributions, "_in_blocks", distributions._at_once)
    monkeypatch.setattr(Sampling, "probabilities", Sampling._dense)
    for name in (*READS, "to"):
        monkeypatch.setattr(torch.Tensor, name, recorded(name))
    return reads


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9)])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_one_synchronisation_a_round(reads, sampling, penalty):
    """However many tokens are drafted, as long as their number is fixed."""
    sampling = dataclasses.replace(sampling, repetition_penalty=penalty)
    made = loop(7, speculative(2, 5), sampling=sampling)
    next(made)
    reads.clear()
    for _ in made:
        assert reads == ["tolist"]
        reads.clear()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.3)])
def test_a_draft_that_ends_by_itself_looks_at_each_token_once(reads, sampling):
    """What an exit is unsure of is not drafted, and nobody knows before the device has said it."""
    cheap = dataclasses.replace(COSTS, draft_step=1e-3, head=1e-3, passes=(1.0, 1.001))
    plan = dataclasses.replace(speculative(1, 6), adaptive=True, costs=cheap)
    made = loop(7, plan, n=60, sampling=sampling, case="llama3.1", upper=0.02)
    next(made)
    reads.clear()
    longest = 0
    for step in made:
        assert reads == ["tolist"] * (step.from_exit + step.refused + 1)
        longest = max(longest, len(reads))
        reads.clear()
    assert longest > 2


@pytest.mark.parametrize("draft_from", ["early-exit", "both"])
def test_adaptive_drafts_run_no_layer_twice(work, draft_from):
    settled = 7
    cheap = dataclasses.replace(COSTS, draft_step=1e-3, head=1e-3, passes=(1.0, 1.001))
    plan = dataclasses.replace(speculative(1, 6), adaptive=True, draft_from=draft_from, costs=cheap)
    made = loop(settled, plan, n=60, case="llama3.1")
    next(made)
    work.take()
    drafted = 0
    for step in made:
        seen = collections.Counter((layer, at) for layer, ats in work.take()[0] for at in ats)
        assert set(seen.values()) == {1}
        # A token that was refused as unsure has been through none of the layers.
        assert {at for _, at in seen} == {*range(settled, settled + step.drafted + 1)}
        settled += step.accepted + 1
        drafted += step.drafted
    assert drafted


def test_prompts_of_a_batch_have_one_row_of_logits_each(work):
    decoder = tiny_decoder("mistral")
    prompts = [random_prompt(decoder, n) for n in (9, 30)]
    made = Batch(decoder, prompts, plan=PLAIN, sampling=Sampling(), max_new_tokens=2)
    next(made.steps())
    assert work.take()[1] == [1]
