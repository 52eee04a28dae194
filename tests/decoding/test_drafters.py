"""Sources of drafts: the early exit, n-grams, datastore, reduced head, and those of others."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_decoders import (
    ALL_DRAFTS,
    FREE,
    LAYERS,
    NGRAMS,
    PLAIN,
    ids,
    model_of,
    random_prompt,
    speculative,
    steps,
    tiny_decoder,
    tokens_of,
)

from layerskip.decoding import (
    Candidate,
    DecodingConfig,
    Draft,
    Sampling,
    drafters,
    register_drafter,
)
from layerskip.decoding.datastore import MAX_MATCH, MIN_MATCH, Datastore
from layerskip.decoding.drafters import DatastoreLookup, EarlyExit, Ngram, NgramIndex, ReducedHead
from layerskip.decoding.sampling import Sampler

CPU = torch.device("cpu")


def empty_draft(last, context=()):
    cache = SimpleNamespace(lengths=torch.zeros(1, dtype=torch.int64))
    return Draft(torch.tensor([[last]]), cache, context)


# --- n-grams ------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 2), max_size=30),
    st.lists(st.integers(0, 2), max_size=6),
    st.integers(0, 12),
)
def test_n_grams_propose_what_followed_the_longest_newest_match(tokens, drafted, limit):
    """Drafted tokens are matched and continued, but not searched."""
    text = [*tokens, *drafted]
    expected = 0, []
    for n in range(MIN_MATCH, min(MAX_MATCH, len(text)) + 1):
        for start in range(len(tokens) - n):  # the longest match counts, of these the newest
            if text[start : start + n] == text[-n:]:
                following = text[start + n :]
                expected = n, [following[i % len(following)] for i in range(limit)]
    assert NgramIndex(tokens).propose(limit, drafted) == expected


@given(st.lists(st.integers(0, 2), max_size=20), st.integers(0, 20))
def test_an_index_that_grows_is_one_of_the_whole_text(tokens, cut):
    index = NgramIndex(tokens[:cut])
    index.extend(tokens[cut:])
    assert index.propose(9) == NgramIndex(tokens).propose(9)


def test_only_the_newest_positions_of_a_pair_are_compared():
    run, limit = [1, 2, 3, 4, 5], drafters._MAX_POSITIONS
    for others, expected in ((limit - 1, (5, [6])), (limit, (2, [7]))):
        assert NgramIndex([*run, 6, *[9, 4, 5, 7] * others, *run]).propose(1) == expected


def test_longer_matches_are_more_confident():
    short, long = Ngram([1, 2, 7, 1, 2]), Ngram([1, 2, 3, 4, 5, 7, 1, 2, 3, 4, 5])
    assert short.propose(empty_draft(2), 2).confidences == [0.3, 0.4]
    assert long.propose(empty_draft(5), 4).confidences == [0.6, 0.7, 0.8, 0.8]


def test_look_ups_end_at_an_end_token():
    text = [5, 6, 7, 8, 9, 5, 6]
    for drafter in (Ngram(text, {8}), DatastoreLookup(Datastore.from_tokens(text[:5] * 9), {8})):
        assert drafter.propose(empty_draft(6, text), 4).token_ids == [7, 8]


def test_look_ups_continue_what_is_drafted_and_what_is_committed():
    datastore = DatastoreLookup(Datastore.from_tokens([*range(10)] * 9))
    ngram = Ngram([*range(10)])
    draft = empty_draft(1, [0, 1])
    ngram.update([0, 1])
    for drafter in (ngram, datastore):
        assert drafter.propose(draft, 2).token_ids == [2, 3]
    draft.token_ids += [2, 3]
    for drafter in (ngram, datastore):
        candidate = drafter.propose(draft, 2)
        assert candidate.token_ids == [4, 5]
        assert candidate.probs is None
        assert all(0 < confidence < 1 for confidence in candidate.confidences)


def test_without_a_match_a_round_is_one_plain_pass(monkeypatch):
    decoder = tiny_decoder("llama3.1")
    run, passes = decoder.run, []

    def record(hidden, start, stop, cache):
        passes.append((hidden.shape[1], start, stop))
        return run(hidden, start, stop, cache)

    monkeypatch.setattr(decoder, "run", record)
    rounds = steps(decoder, [1, 2, 3], NGRAMS, n=4)
    assert [(step.source, step.drafted) for step in rounds] == [("model", 0)] * 4
    assert passes[1:] == [(1, 0, LAYERS)] * 3


# --- the early exit -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [{}, {"temperature": 0.7}, {"repetition_penalty": 1.5}])
@pytest.mark.parametrize("reduced", [False, True])
def test_the_exit_proposes_from_the_distribution_it_reports(rule, reduced):
    decoder, prompt = tiny_decoder("llama3.1"), [5, 6, 7, 5]
    options = Sampling(**rule)
    head = ReducedHead(decoder, range(40)) if reduced else None
    sampler = Sampler(options, CPU, 0, torch.tensor([prompt]), 96)
    exit_ = EarlyExit(decoder, 2, sampler, head, with_confidence=True)
    cache = decoder.new_cache(16)
    decoder.run(decoder.embed(torch.tensor([prompt[:-1]])), 0, LAYERS, cache)
    cache.lengths += 3
    draft = Draft(torch.tensor([[5]]), cache, prompt)
    for _ in range(3):
        before = [*prompt, *draft.token_ids]
        candidate = exit_.propose(draft, 1)
        draft.extend(candidate, 1, exit_.name)
        draft.token_ids += candidate.token_ids
        fresh = decoder.new_cache(len(before))
        hidden = decoder.run(decoder.embed(torch.tensor([before])), 0, 2, fresh)[:, -1:]
        logits = decoder.logits(hidden)[0, 0]
        seen = torch.zeros(96, dtype=torch.bool)
        seen[before] = True
        logits = options.penalize(logits, seen, seen.float())
        if reduced:
            logits[40:] = float("-inf")
        if options.greedy:
            assert candidate.token_ids == [int(logits.argmax())]
            assert candidate.probs is None
            highest = logits.softmax(-1).amax()
        else:
            q = options.probabilities(logits)
            torch.testing.assert_close(candidate.probs[0][0], q, rtol=1e-3, atol=1e-5)
            highest = q.amax()
        assert candidate.confidences == [pytest.approx(float(highest), rel=1e-3)]
    hidden, start = draft.hidden_states(decoder, 2)
    assert (hidden.shape[:2], start) == ((1, 4), 2)
    assert int(cache.lengths) == 3  # rolled back to the committed tokens


def test_point_masses_and_distributions_are_one_q():
    draft = empty_draft(0)
    q = torch.tensor([[0.25, 0.75, 0.0]])
    draft.extend(Candidate(torch.tensor([[2, 0]]), [0.5, 0.5]), 2, "n-gram")
    assert draft.all_probs(3) is None
    draft.extend(Candidate(torch.tensor([[1]]), [0.5], [q]), 1, "early-exit")
    assert draft.all_probs(3).tolist() == [[[0, 0, 1], [1, 0, 0], [0.25, 0.75, 0]]]
    assert draft.tokens.tolist() == [[2, 0, 1]]
    assert draft.sources == ["n-gram", "n-gram", "early-exit"]


# --- the reduced head ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama2", "smollm2", "gemma2"])  # untied, tied, soft cap
def test_logits_of_a_reduced_head_are_rows_of_the_whole(case):
    decoder = tiny_decoder(case)
    hidden = decoder.embed(torch.tensor([random_prompt(decoder, 5)]))
    whole = decoder.logits(hidden)
    head = ReducedHead(decoder, [7, 3, 3, 50])
    torch.testing.assert_close(head.decoder.logits(hidden), whole[..., [3, 7, 50]])
    more = head.extend(decoder, [9, 7, 2])
    assert more.token_ids.tolist() == [3, 7, 50, 2, 9]
    torch.testing.assert_close(more.decoder.logits(hidden), whole[..., more.token_ids])
    assert more.share == 5 / decoder.architecture.vocab_size
    spread = more.scatter(torch.tensor([[0.1, 0.2, 0.3, 0.15, 0.25]]))
    assert spread.shape == (1, decoder.architecture.vocab_size)
    assert spread[0, [2, 3, 7, 9, 50]].tolist() == pytest.approx([0.15, 0.1, 0.2, 0.25, 0.3])


def test_the_head_of_a_list_is_made_once_and_prompts_add_their_rows(monkeypatch):
    decoder = copy.copy(tiny_decoder("llama2"))  # without heads
    sizes, original = [], type(decoder).with_reduced_head

    def record(self, token_ids):
        sizes.append(len(token_ids))
        return original(self, token_ids)

    monkeypatch.setattr(type(decoder), "with_reduced_head", record)
    for _ in range(3):
        for prompt in ([1, 2, 5], [7, 8, 5, 2]):
            ids(decoder, prompt, speculative(1, 2, draft_vocabulary=(1, 2, 5)))
    assert sizes == [3, 2, 2, 2]
    for kept in ((1, 2, 5, 9), (1, 2, 5, 9), (1, 2, 5)):  # the last list alone is kept
        ids(decoder, [1, 2, 5], speculative(1, 2, draft_vocabulary=kept))
    assert sizes == [3, 2, 2, 2, 4, 3]


def test_only_tokens_of_the_list_and_the_prompt_are_drafted():
    decoder = tiny_decoder("llama3.1")
    prompt = random_prompt(decoder, 6)
    rounds = steps(decoder, prompt, speculative(1, 4, draft_vocabulary=(1, 2)), n=40)
    drafted = {t for step in rounds for t in (*step.tokens[: step.accepted], *step.rejected)}
    assert drafted
    assert drafted <= {1, 2, *prompt}


# --- drafters of others -------------------------------------------------------------------------


class ScriptedDrafter:
    """Proposes the next tokens of a script, with a fixed confidence."""

    name, num_layers, head_share, prior = "scripted", 0, 0.0, None

    def __init__(self, script, confidence):
        self.script, self.confidence, self.committed = script, confidence, 0

    def update(self, tokens):
        self.committed += len(tokens)

    def propose(self, draft, max_tokens):
        start = self.committed + len(draft)
        tokens = self.script[start : start + max_tokens]
        return Candidate(torch.tensor([tokens], dtype=torch.int64), [self.confidence] * len(tokens))


@pytest.fixture
def scripted():
    """Register a drafter from outside of the package; returns a function that sets its script."""
    script, inputs = [], []

    def make(drafter_inputs):
        inputs.append(drafter_inputs)
        return [ScriptedDrafter(script, 0.8)]

    def set_script(tokens):
        script[:] = tokens
        return inputs

    register_drafter("scripted", make)
    yield set_script
    del drafters.DRAFTERS["scripted"]


@pytest.mark.parametrize("draft_from", ["scripted", "scripted+early-exit"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_registered_drafter_is_exact_and_saves_rounds_where_it_is_right(
    scripted, draft_from, adaptive
):
    decoder = tiny_decoder("llama3.1", upper=0.1)
    prompt = random_prompt(decoder, 8)
    plain = ids(decoder, prompt, PLAIN, n=40)
    exit_layer = 1 if "early-exit" in draft_from else None
    config = speculative(exit_layer, 6, draft_from=draft_from, adaptive=adaptive)
    rounds = {}
    for name, script in (("right", plain), ("wrong", [(t + 1) % 90 for t in plain])):
        inputs = scripted(script)
        rounds[name] = steps(decoder, prompt, config, n=40)
        assert tokens_of(rounds[name]) == plain
        assert (inputs[-1].prompts, inputs[-1].adaptive) == ([tuple(prompt)], adaptive)
    assert len(rounds["right"]) <= 1 + 40 / 6
    accepted = sum(step.sources[: step.accepted].count("scripted") for step in rounds["right"])
    assert accepted >= 30
    if adaptive:  # the wrong one is paused
        wrong = [step.sources.count("scripted") for step in rounds["wrong"]]
        assert sum(wrong[-20:]) < sum(wrong[:20])
    sampled = {"temperature": 1.0, "seed": 3}
    assert len(ids(decoder, prompt, config, n=40, **sampled)) == 40


def test_a_registered_drafter_is_an_option_of_a_model(scripted):
    decoder = tiny_decoder("llama3.1")
    plain = ids(decoder, [5, 6], PLAIN)
    scripted(plain)
    model = model_of(decoder)
    for draft_from, mode in (("scripted", "scripted"), ("scripted+early-exit", "self-speculative")):
        options = {"mode": "self-speculative", "draft_from": draft_from, "max_new_tokens": 24}
        answer = model.generate([5, 6], draft_tokens=4, **options)
        assert answer.token_ids == plain
        assert answer.mode == mode
        assert answer.acceptance_rate > 0.9
        assert (answer.exit_layer is None) == (mode == "scripted")
    with pytest.raises(ValueError, match=r"there are: early-exit, n-gram, both, .*scripted"):
        DecodingConfig(draft_from="other")


def test_an_answer_leaves_nothing_for_the_garbage_collector():
    """A reference cycle would keep the decoder and an index of the prompt until it runs."""
    gc.collect()
    gc.disable()
    try:
        decoder = copy.copy(tiny_decoder("llama3.1"))
        assert steps(decoder, random_prompt(decoder, 20), ALL_DRAFTS, 12, measured=FREE)
        left = weakref.ref(decoder)
        del decoder
        assert left() is None
    finally:
        gc.enable()
