"""The decoding loop: the work of a round, memory, the ends of answers, and steps."""

import collections
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import END, LAYERS, OTHER_END, ScriptedDecoder, encode, scripted_model, words
from tiny_decoders import (
    FREE,
    PLAIN,
    batch_steps,
    ids,
    random_prompt,
    speculative,
    steps,
    tiny_decoder,
)
from torch.utils._python_dispatch import TorchDispatchMode

from exit_states import exit_states
from layerskip.decoding import DecodingConfig, PromptError, Step, generate
from layerskip.decoding.generate import PREFILL_CHUNK
from layerskip.model import Decoder, KVCache

EARLY = DecodingConfig(mode="early-exit", exit_layer=2)
SAMPLED = {"temperature": 1.0, "top_p": 0.9}

# --- work: one cache for draft and verification (KVQ) -------------------------------------------


@dataclasses.dataclass
class Work:
    """The layers and heads that ran since the last `take`."""

    layers: list = dataclasses.field(default_factory=list)  # (layer, positions)
    heads: list = dataclasses.field(default_factory=list)  # positions of each call

    def take(self):
        layers, heads = self.layers, self.heads
        self.layers, self.heads = [], []
        return layers, heads


@pytest.fixture
def work(monkeypatch):
    """Record every layer and head that runs; `_layer` is where a layer is computed."""
    work = Work()
    layer, logits = Decoder._layer, Decoder.logits

    def record_layer(self, x, index, spans, *rest):
        work.layers += [(index, tuple(span.positions[0].tolist())) for span in spans]
        return layer(self, x, index, spans, *rest)

    def record_logits(self, hidden):
        work.heads.append(hidden.shape[1])
        return logits(self, hidden)

    monkeypatch.setattr(Decoder, "_layer", record_layer)
    monkeypatch.setattr(Decoder, "logits", record_logits)
    return work


def loop(prompt, config, n=24, case="mistral", measured=None, upper=0.3, **options):
    changes = {"max_position_embeddings": 2 * PREFILL_CHUNK} if prompt > 500 else {}
    decoder = tiny_decoder(case, upper, **changes)
    config = dataclasses.replace(config, max_new_tokens=n, **options)
    return generate(decoder, random_prompt(decoder, prompt), config, measured=measured)


@pytest.mark.parametrize(
    ("exit_layer", "d", "sampling"),
    [(1, 0, {}), (1, 5, {}), (3, 1, SAMPLED), (LAYERS, 5, SAMPLED)],
)
def test_a_round_runs_each_layer_once_for_each_position(work, exit_layer, d, sampling):
    committed = 7
    rounds = loop(committed, speculative(exit_layer, d), **sampling)
    next(rounds)
    work.take()
    for step in rounds:
        positions = tuple(range(committed, committed + step.drafted + 1))
        layers, heads = work.take()
        if step.drafted:
            # The exit runs once for each drafted token, and once over the last one.
            drafting = [(layer, (at,)) for at in positions for layer in range(exit_layer)]
            verifying = [(layer, positions) for layer in range(exit_layer, LAYERS)]
            assert layers == drafting + verifying
            assert heads == [1] * step.drafted + [step.drafted + 1]
        else:
            assert layers == [(layer, positions) for layer in range(LAYERS)]
            assert heads == [1]
        # In other words: no layer sees a position twice, and nothing committed is run again.
        seen = collections.Counter((layer, at) for layer, ats in layers for at in ats)
        assert set(seen.values()) == {1}
        committed += step.accepted + 1


@pytest.mark.parametrize("draft_from", ["early-exit", "both"])
def test_adaptive_drafts_run_no_layer_twice(work, draft_from):
    committed, drafted = 7, 0
    config = speculative(1, 6, adaptive=True, draft_from=draft_from)
    rounds = loop(committed, config, n=60, case="llama3.1", measured=FREE)
    next(rounds)
    work.take()
    for step in rounds:
        seen = collections.Counter((layer, at) for layer, ats in work.take()[0] for at in ats)
        assert set(seen.values()) == {1}
        # A token that was discarded for low confidence has been through no layer.
        assert {at for _, at in seen} == {*range(committed, committed + step.drafted + 1)}
        committed += step.accepted + 1
        drafted += step.drafted
    assert drafted


@pytest.mark.parametrize(("config", "n_layers"), [(PLAIN, LAYERS), (EARLY, 2)])
def test_plain_and_early_exit_run_one_position_a_step(work, config, n_layers):
    """An early exit at E runs E layers, in the prompt's pass too."""
    for i, _ in enumerate(loop(7, config, n=6)):
        layers, heads = work.take()
        positions = tuple(range(7)) if i == 0 else (6 + i,)
        assert layers == [(layer, positions) for layer in range(n_layers)]
        assert heads == [1]


def test_a_prompt_runs_in_chunks_with_one_row_of_logits(work):
    n = PREFILL_CHUNK + 9
    next(loop(n, speculative(2, 5)))
    layers, heads = work.take()
    chunks = [tuple(range(PREFILL_CHUNK)), tuple(range(PREFILL_CHUNK, n))]
    assert layers == [(layer, chunk) for chunk in chunks for layer in range(LAYERS)]
    assert heads == [1]


def test_prompts_of_a_batch_have_one_row_of_logits_each(work):
    decoder = tiny_decoder("mistral")
    batch_steps(decoder, [random_prompt(decoder, n) for n in (9, 30)], PLAIN, n=1)
    assert work.take()[1] == [2]


# `__bool__` is left out: non-finite weights are looked for on a CPU alone.
READS = ("item", "tolist", "cpu", "nonzero", "__int__", "__float__", "__index__")


@pytest.fixture
def reads(monkeypatch):
    """Record the calls by which Python would wait for a GPU, on a CPU.

    `KVCache.lengths` is on the host by design; `span` copies it to the device without waiting.
    """
    reads, in_span, on_host = [], [], set()
    span = KVCache.span

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
            if not in_span and id(self) not in on_host:
                reads.append(name)
            return original(self, *args, **options)

        return read

    monkeypatch.setattr(KVCache, "span", host_span)
    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, recorded(name))
    return reads


@pytest.mark.parametrize(("sampling", "penalty"), [({}, 1.0), (SAMPLED, 1.3)])
def test_one_synchronization_a_round(reads, sampling, penalty):
    """However many tokens are drafted, where their number is fixed."""
    rounds = loop(7, speculative(2, 5), repetition_penalty=penalty, **sampling)
    next(rounds)
    reads.clear()
    for _ in rounds:
        assert reads == ["tolist"]
        reads.clear()


# --- memory -------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers the largest block of memory that an operation has allocated, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for output in result if isinstance(result, tuple | list) else [result]:
            is_tensor = isinstance(output, torch.Tensor)
            if is_tensor and output.untyped_storage().data_ptr() not in inputs:
                self.bytes = max(self.bytes, output.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(
    ("config", "sampling"),
    [
        (PLAIN, {}),
        (speculative(1, 4), {}),
        (speculative(LAYERS, 8), {"temperature": 1.0, "repetition_penalty": 1.2}),
    ],
)
def test_one_cache_and_no_copies(config, sampling, monkeypatch):
    """The prompt is so long that one layer's keys are larger than anything a round allocates."""
    n, caches, init = 300, [], KVCache.__init__

    def record(self, *args, **options):
        caches.append(self)
        init(self, *args, **options)

    monkeypatch.setattr(KVCache, "__init__", record)
    rounds = loop(n, config, 9, "llama2", **sampling)
    next(rounds)  # the prompt's own pass allocates the cache
    with Largest() as largest:
        for _ in rounds:
            pass
    assert len(caches) == 1
    a = tiny_decoder("llama2").architecture
    one_layers_keys = a.n_kv_heads * n * a.head_dim * 4
    smallest_weight = a.hidden_size * a.n_heads * a.head_dim * 4
    assert 0 < largest.bytes < min(one_layers_keys, smallest_weight)


# --- modes of PyTorch ---------------------------------------------------------------------------


@pytest.mark.parametrize("config", [PLAIN, speculative(2, 4)], ids=["plain", "speculative"])
def test_modes_of_the_loop_are_not_the_caller_s(config, monkeypatch):
    """Between two steps the caller may train something, in bfloat16."""
    decoder = tiny_decoder("llama2")
    run, modes = decoder.run, set()

    def record(*args):
        modes.add((torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        return run(*args)

    monkeypatch.setattr(decoder, "run", record)
    weight = torch.ones(3, requires_grad=True)
    config = dataclasses.replace(config, max_new_tokens=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in generate(decoder, [5], config):
            assert torch.is_grad_enabled()
            assert torch.is_autocast_enabled("cpu")
            assert not torch.is_inference_mode_enabled()
            (weight * weight).sum().backward()
        batch_steps(decoder, [[5], [6, 7]], config, n=6)
    with torch.no_grad():
        for _ in generate(decoder, [5], config):
            assert not torch.is_grad_enabled()
    assert weight.grad is not None
    assert modes == {(True, False)}


# --- hidden states at exits ---------------------------------------------------------------------


def test_all_exits_in_one_pass_equal_one_pass_each():
    decoder = tiny_decoder("llama3.1")
    tokens = random_prompt(decoder, PREFILL_CHUNK + 3)
    together = exit_states(decoder, tokens, [LAYERS, 0, 2, 1, 1])
    assert list(together) == [0, 1, 2, LAYERS]
    for e, states in together.items():
        assert states.shape == (1, len(tokens), decoder.architecture.hidden_size)
        torch.testing.assert_close(states, exit_states(decoder, tokens, [e])[e], rtol=0, atol=0)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        exit_states(decoder, [1, decoder.architecture.vocab_size], [1])


# --- steps --------------------------------------------------------------------------------------


def test_a_step_cut_short():
    """Three tokens, two of six drafted ones among them; a cut at the third token changes nothing."""
    for n in (1, 3):
        sources = ("n-gram", *["early-exit"] * 5)
        step = Step((7, 8, 9), drafted=6, accepted=2, sources=sources, rejected=(1, 2, 3, 4))
        short = Step((7, 8)[:n], drafted=n, accepted=n, sources=sources)
        assert step.first(n) == (step if n >= 3 else short)
        assert step.first(2).first(1) == step.first(1)
        # The time of what was drafted beyond the end was spent all the same.
        assert (step.first(n).source, step.first(n).from_exit) == ("n-gram", 5)
        assert (Step((7,)).source, Step((7,), discarded=1).source) == ("model", "early-exit")


# --- ends of answers ----------------------------------------------------------------------------

MODES = [
    {"mode": "plain"},
    {"exit_layer": LAYERS - 1, "draft_tokens": 3},
    *(
        {"mode": "self-speculative", "exit_layer": LAYERS - 1, "draft_tokens": d}
        for d in (0, 1, 3, 8)
    ),
]
MISSES = (5, 6, 11)


def every_mode(answer, *, prompt=(0,), options=None, **script):
    """Return the longest draft's answer, after a check that all modes give the same."""
    model = scripted_model(answer, misses=MISSES, prompt_tokens=len(prompt), **script)
    answers = [model.generate(list(prompt), **{**mode, **(options or {})}) for mode in MODES]
    first = answers[0]
    for one in answers:
        assert (one.token_ids, one.text, one.finish_reason) == (
            first.token_ids,
            first.text,
            first.finish_reason,
        )
        # The steps hold the tokens of the answer, no more and no less.
        assert [token for step in one.steps for token in step.tokens] == one.token_ids
        assert all(step.accepted <= min(step.drafted, len(step.tokens)) for step in one.steps)
    return answers[-1]


def test_an_end_token_anywhere_in_a_draft():
    """First token, in an accepted draft, at its end, the model's own: the answer ends with it."""
    for at in range(14):
        answer = [*encode("a" * at), END, *encode("b" * 20)]
        result = every_mode(answer)
        assert result.token_ids == answer[: at + 1]
        assert (result.text, result.finish_reason) == ("a" * at, "stop")


def test_the_earliest_of_several_end_tokens():
    for ends in ((END, OTHER_END), (OTHER_END, END), (END,)):
        answer = [*encode("ab"), OTHER_END, END, *encode("cd")]
        assert every_mode(answer, end_tokens=ends).token_ids == answer[: 3 if len(ends) > 1 else 4]


def test_an_end_token_at_max_new_tokens():
    for n, reason in ((4, "stop"), (3, "length")):
        result = every_mode([*encode("abc"), END], options={"max_new_tokens": n})
        assert (result.new_tokens, result.finish_reason) == (n, reason)


def test_ignore_eos():
    answer = [*encode("ab"), END]
    result = every_mode(answer, options={"ignore_eos": True, "max_new_tokens": 7})
    assert result.token_ids == (answer * 3)[:7]
    assert (result.text, result.finish_reason) == ("ababa", "length")


def test_a_stop_string_anywhere_in_a_draft():
    for answer, stop, text, n_tokens in (
        (encode("one. two"), ["."], "one", 4),
        (encode("oneENDtwo"), "END", "one", 6),  # a single string is one stop string
        (words("hello", "Ġworld", "ab"), ["lo wo"], "hel", 2),
        (encode("abcdefgh"), ["gh", "de", "z"], "abc", 5),
        (encode("a漢b漢"), ["b"], "a漢", 5),
        (encode("ab"), ["ab"], "", 2),
        (encode("x" * 6 + "END" + "y" * 20), ["END"], "x" * 6, 9),
    ):
        result = every_mode(answer, options={"stop": stop, "max_new_tokens": 24})
        assert (result.text, result.new_tokens, result.finish_reason) == (text, n_tokens, "stop")


def test_the_first_of_stop_string_and_end_token():
    for stop_at, end_at in ((2, 5), (5, 2)):
        answer = encode("a" * 8)
        answer[stop_at : stop_at + 1] = encode("S")
        answer[end_at] = END
        result = every_mode(answer, options={"stop": ["S"]})
        assert (result.text, result.new_tokens) == ("a" * 2, 3)


def test_nothing_is_drafted_beyond_the_end():
    """The controller knows end tokens, and stop strings that are a token."""
    for options in ({}, {"stop": ["S"], "ignore_eos": True}):
        at = 15
        answer = [*encode("x" * at), *(encode("S") if options else [END]), *encode("y" * 20)]
        result = scripted_model(answer).generate(
            [0], exit_layer=1, draft_from="early-exit", **options
        )
        assert result.token_ids == answer[: at + 1]
        assert max(step.accepted for step in result.steps) >= 3
        assert [step for step in result.steps if step.from_exit > step.drafted] == []


@settings(max_examples=50)
@given(
    text=st.text(alphabet="abé", min_size=1, max_size=20),
    stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=2),
    misses=st.sets(st.integers(0, 30)),
    d=st.integers(0, 6),
)
def test_streaming_never_shows_a_stop_string(text, stop, misses, d):
    model = scripted_model([*encode(text), END], misses=misses)
    plain = model.generate([0], mode="plain", stop=stop)
    options = {"exit_layer": 1, "draft_tokens": d, "stop": stop}
    assert model.generate([0], **options).token_ids == plain.token_ids
    shown = ""
    for piece in model.stream([0], **options):
        shown += piece
        assert plain.text.startswith(shown)
    assert shown == plain.text
    assert not any(one in shown for one in stop)


def test_a_stop_string_may_name_a_special_token():
    for ignore_eos in (False, True):
        answer = [*encode("ab"), OTHER_END, *encode("cd")]
        stop = {"stop": ["x", "<other end>"], "ignore_eos": ignore_eos, "max_new_tokens": 5}
        result = every_mode(answer, options=stop)
        assert (result.text, result.token_ids, result.finish_reason) == ("ab", answer[:3], "stop")
        assert every_mode(answer, options={"max_new_tokens": 5}).text == "abcd"
        together = scripted_model(answer).generate([[0], [0]], **stop)
        assert [one.text for one in together] == ["ab", "ab"]


def test_small_numbers():
    """max_new_tokens 1, d = 0 and a prompt of one token, in any combination."""
    decoder = tiny_decoder("llama2")
    for length, max_new_tokens, d in itertools.product((1, 2), (1, 2, 5), (0, 4)):
        prompt = random_prompt(decoder, length)
        tokens = ids(decoder, prompt, speculative(2, d), max_new_tokens)
        assert len(tokens) == max_new_tokens
        assert tokens == ids(decoder, prompt, PLAIN, 20)[:max_new_tokens]


def test_the_context_ends_the_answer():
    """A prompt as long as the context still gets the one token that needs no position in it."""
    for room in (0, 1, 9):
        result = every_mode(encode("abc"), prompt=[0] * (64 - room), max_context=64)
        assert (result.new_tokens, result.finish_reason) == (room + 1, "length")


def test_prompts_that_cannot_be_continued():
    for prompt, message in (
        ([], "empty"),
        ([0] * 65, "65 tokens, this model's context holds 64"),
        ([0, 300], "outside the vocabulary"),
        ([-1], "outside the vocabulary"),
    ):
        decoder = ScriptedDecoder(encode("a"))
        with pytest.raises(PromptError, match=message):
            generate(decoder, prompt, PLAIN)
        with pytest.raises(PromptError, match=message):
            batch_steps(decoder, [[0], prompt], PLAIN)
        with pytest.raises(PromptError, match=f"prompt 2: .*{message}"):
            scripted_model(encode("a")).generate([[0], prompt])


def test_steps_name_the_sources_of_their_tokens():
    decoder = tiny_decoder("llama3.1")
    prompt = random_prompt(decoder, 4) * 4
    rounds = steps(decoder, prompt, speculative(1, 4, draft_from="both"), n=60)
    assert {step.source for step in rounds} == {"model", "n-gram", "early-exit"}
    assert sum(step.accepted for step in rounds if step.source == "n-gram") > 0
