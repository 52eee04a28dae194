"""Recorded passes give what the passes themselves give.

On a CPU nothing can be recorded: there a stand-in runs the same function over the same places again, so
all is tested but CUDA's own recording.
"""

import gc
import weakref

import pytest
import torch
from tiny_decoders import ALL_DRAFTS, PLAIN, ids, random_prompt, speculative, tiny_decoder
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerskip.decoding import Prefix, Sampling
from layerskip.model import graphs, load
from layerskip.model.graphs import GraphDecoder, Recorder, Recordings
from tiny_models import CASES, build

EXPERTS = ("mixtral", "qwen3_moe")


class _Recorder:
    """Runs the function again in place of a replay, and counts."""

    def __init__(self, spoil=0.0, fails=False):
        self.spoil, self.fails, self.recorded, self.replayed = spoil, fails, 0, 0

    def __call__(self, function):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded += 1
        outputs = function()

        def replay():
            self.replayed += 1
            for place, new in zip(outputs, function(), strict=True):
                place.copy_(new + self.spoil if new.is_floating_point() else new)

        return replay, outputs


def recording(decoder, recorder=None):
    """The same decoder with passes that are recorded; `recorder` is kept in `stand_in`."""
    stand_in = recorder or _Recorder()

    class Recorded(GraphDecoder):
        recorder = staticmethod(lambda device: stand_in)

    made = Recorded(
        decoder.architecture,
        embedding=decoder.embedding,
        layers=decoder.layers,
        final_norm=decoder.final_norm,
        head=None if decoder.tied else decoder.head,
        dtype=decoder.dtype,
        device=decoder.device,
        weights=decoder.weights,
    )
    made.stand_in = stand_in
    return made


@pytest.mark.parametrize("case", [c for c, (kind, _) in CASES.items() if kind not in EXPERTS])
def test_answers_are_those_without_recordings(case):
    decoder = tiny_decoder(case)
    recorded = recording(decoder)
    for length in (1, 17, 240):  # the last one crosses a power of two
        prompt = random_prompt(decoder, length)
        plain = ids(decoder, prompt, PLAIN, n=40)
        for plan in (PLAIN, speculative(2, 3), ALL_DRAFTS):
            assert ids(recorded, prompt, plan, n=40) == plain, (length, plan)
    assert recorded.stand_in.replayed > 10 * recorded.stand_in.recorded > 0


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_weights_are_recorded_too(weights):
    decoder = tiny_decoder("llama3.1", weights=weights)
    recorded, prompt = recording(decoder), random_prompt(decoder, 9)
    assert ids(recorded, prompt, speculative(2, 4)) == ids(decoder, prompt, PLAIN)
    assert recorded.stand_in.replayed


def test_the_next_answer_takes_over_memory_and_recordings():
    decoder = tiny_decoder("llama3.1")
    recorded, prompt = recording(decoder), random_prompt(decoder, 9)
    ids(recorded, prompt, PLAIN)
    second = ids(recorded, prompt, PLAIN)  # the second prompt of this length, which is recorded
    made = recorded.stand_in.recorded
    assert ids(recorded, prompt, PLAIN) == second == ids(decoder, prompt, PLAIN)
    assert recorded.stand_in.recorded == made


def test_answers_at_the_same_time_have_memory_of_their_own():
    decoder = tiny_decoder("llama3.1")
    recorded = recording(decoder)
    caches = [recorded.new_cache(40), recorded.new_cache(40)]
    assert caches[0].slots.data_ptr() != caches[1].slots.data_ptr()
    kept = caches.pop().slots.data_ptr()
    gc.collect()
    assert recorded.new_cache(40).slots.data_ptr() == kept


def test_answers_at_the_same_time_find_their_recordings_again():
    recorded = recording(tiny_decoder("llama3.1"))
    caches = [recorded.new_cache(40) for _ in range(graphs._KEPT + 1)]
    places = [cache.slots.data_ptr() for cache in caches]
    caches.clear()
    gc.collect()
    assert len(recorded._free) == graphs._KEPT
    caches = [recorded.new_cache(40) for _ in range(graphs._KEPT)]
    again = [cache.slots.data_ptr() for cache in caches]
    assert len(set(again)) == graphs._KEPT
    assert set(again) < set(places)


def test_a_longer_context_gets_larger_memory():
    recorded = recording(tiny_decoder("llama3.1", max_position_embeddings=4096))
    assert recorded.new_cache(40).slots.shape[-2] == 1024
    assert recorded.new_cache(1500).slots.shape[-2] == 2048
    assert recorded.new_cache(40).slots.shape[-2] == 2048


def test_a_cache_has_the_room_that_was_asked_for():
    recorded = recording(tiny_decoder("llama3.1"))
    cache = recorded.new_cache(8)
    cache.lengths += 7
    hidden = recorded.embed(torch.tensor([[3, 4]]))
    with pytest.raises(ValueError, match="holds 8 positions, 9 are needed"):
        recorded.run(hidden, 0, 2, cache)
    with pytest.raises(ValueError, match="cannot be run"):
        recorded.run(hidden[:, :1], 0, 9, cache)


def test_long_rope_takes_the_factors_of_its_cache_in_shared_memory():
    decoder = tiny_decoder("phi4-mini")
    recorded = recording(decoder)
    limit = next(r.original_max_positions for r in decoder.architecture.ropes)
    for length in (limit - 30, limit + 9, limit - 30):
        prompt = random_prompt(decoder, length)
        assert ids(recorded, prompt, PLAIN, n=20) == ids(decoder, prompt, PLAIN, n=20)


def test_batches_are_not_recorded():
    decoder = tiny_decoder("llama3.1")
    recorded = recording(decoder)
    cache, tokens = recorded.new_cache(8, 2), torch.tensor([[3], [4]])
    for _ in range(3):
        recorded.choose(recorded.run(recorded.embed(tokens), 0, 4, cache))
        cache.lengths += 1
    assert not recorded.stand_in.recorded


@pytest.mark.parametrize(
    ("recorder", "message"),
    [(_Recorder(fails=True), "stream is capturing"), (_Recorder(spoil=1.0), "other results")],
)
def test_where_recording_fails_passes_are_run(recorder, message):
    decoder = tiny_decoder("llama3.1")
    recorded, prompt = recording(decoder, recorder), random_prompt(decoder, 9)
    with pytest.warns(UserWarning, match=f"without CUDA graphs, more slowly: .*{message}"):
        made = ids(recorded, prompt, speculative(2, 3))
    assert made == ids(decoder, prompt, PLAIN)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), RuntimeError("CUDA error: out of memory")]
)
def test_where_memory_is_short_the_next_answer_tries_again(error):
    class Short(_Recorder):
        def __call__(self, function):
            if not self.tried:
                self.tried = True
                raise error
            return super().__call__(function)

        tried = False

    decoder = tiny_decoder("llama3.1")
    recorded, prompt = recording(decoder, Short()), random_prompt(decoder, 9)
    plain = ids(decoder, prompt, PLAIN)
    with pytest.warns(UserWarning, match=f"without CUDA graphs, more slowly: {error}"):
        assert ids(recorded, prompt, speculative(2, 3)) == plain
    assert not recorded.stand_in.recorded
    assert ids(recorded, prompt, speculative(2, 3)) == plain
    assert recorded.stand_in.replayed


def test_what_an_answer_left_does_not_harm_the_next():
    decoder = tiny_decoder("llama3.1")
    recorded, prompt = recording(decoder), random_prompt(decoder, 9)
    cache = recorded.new_cache(40)
    cache.slots.fill_(float("nan"))
    del cache
    gc.collect()
    assert ids(recorded, prompt, PLAIN) == ids(decoder, prompt, PLAIN)


def test_long_contexts_are_not_recorded(monkeypatch):
    monkeypatch.setattr(graphs, "_LONGEST", 64)
    decoder = tiny_decoder("llama3.1")
    recorded, prompt = recording(decoder), random_prompt(decoder, 100)
    assert ids(recorded, prompt, PLAIN) == ids(decoder, prompt, PLAIN)
    exits_alone = 2  # of one position: plain and its second call
    assert recorded.stand_in.recorded < exits_alone


def test_what_decoding_does_not_run_is_not_recorded():
    recorded = recording(tiny_decoder("llama3.1"))
    cache, hidden = recorded.new_cache(8), recorded.embed(torch.tensor([[3]]))
    for _ in range(3):
        recorded.run(hidden, 1, 3, cache)  # from one exit to the next
    assert not recorded.stand_in.recorded
    for _ in range(3):
        recorded.run(hidden, 1, 4, cache)
    assert recorded.stand_in.recorded == 1


def test_more_room_than_recordings_reach_is_not_kept(monkeypatch):
    monkeypatch.setattr(graphs, "_LONGEST", 64)
    recorded = recording(tiny_decoder("llama3.1", max_position_embeddings=4096))
    recorded.new_cache(2000)
    gc.collect()
    assert not recorded._free
    recorded.new_cache(40)
    gc.collect()
    (kept,) = recorded._free
    recorded.new_cache(2000)
    gc.collect()
    assert list(recorded._free) == [kept]  # a longer answer in between costs no recordings


def test_copies_with_other_heads_share_no_memory():
    recorded = recording(tiny_decoder("llama3.1"))
    recorded.new_cache(40)
    gc.collect()
    short = recorded.with_short_head(torch.arange(9))
    both = [recorded.new_cache(40), short.new_cache(40)]
    assert both[0].slots.data_ptr() != both[1].slots.data_ptr()


def test_results_are_not_written_over_by_the_next_call():
    twice = Recordings(Recorder(_Recorder()))
    made = [twice("double", lambda x: (2 * x,), torch.tensor([float(i)]))[0] for i in range(5)]
    assert torch.cat(made).tolist() == [0, 2, 4, 6, 8]


def test_experts_are_chosen_and_not_recorded():
    gpu = torch.device("cuda")
    assert graphs.supports(tiny_decoder("llama3.1").architecture, gpu)
    assert not graphs.supports(tiny_decoder("mixtral").architecture, gpu)
    assert not graphs.supports(tiny_decoder("llama3.1").architecture, torch.device("cpu"))


def test_a_failed_recording_lets_its_memory_go_before_passes_are_run():
    kept = []

    def short(function):
        outputs = function()
        kept.append(weakref.ref(outputs[0]))
        raise torch.OutOfMemoryError("no room")

    def work(x):
        assert all(output() is None for output in kept)
        return (2 * x,)

    twice = Recordings(Recorder(short))
    twice("double", work, torch.ones(3))
    with pytest.warns(UserWarning, match="no room"):
        assert twice("double", work, torch.ones(3))[0].tolist() == [2.0] * 3
    assert kept


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGPU:
    """CUDA's own recording."""

    @pytest.fixture(params=["16bit", "int8", "int4"])
    def both(self, request, tmp_path):
        """The same decoder without recordings and with them."""
        build("llama3.1", max_position_embeddings=4096).save_pretrained(tmp_path)
        dtype = torch.float32 if request.param == "16bit" else torch.bfloat16
        how = {"dtype": dtype, "device": "cuda", "weights": request.param}
        plain, recorded = (load(tmp_path, compiled=c, **how).decoder for c in (False, True))
        assert recorded.kernels == "graphs"
        # Recorded attention is masked, plain one is not: of random logits in 16 bits two kernels that
        # round differently would choose differently now and then.
        with sdpa_kernel(SDPBackend.MATH):
            yield plain, recorded

    def test_answers(self, both):
        plain, recorded = both
        for length in (17, 240):
            prompt = random_prompt(plain, length)
            for plan in (PLAIN, speculative(2, 3), ALL_DRAFTS):
                assert ids(recorded, prompt, plan, n=40) == ids(plain, prompt, plan, n=40)
        assert any(recorded._free[0].recordings._made.values())

    def test_sampled_answers(self, both):
        plain, recorded = both
        prompt = random_prompt(plain, 17)
        for how in ({}, {"top_k": 9, "top_p": 0.9, "min_p": 0.01}, {"repetition_penalty": 1.2}):
            options = {"sampling": Sampling(temperature=0.8, **how), "seed": 3, "n": 40}
            for plan in (PLAIN, speculative(2, 3), ALL_DRAFTS):
                assert ids(recorded, prompt, plan, **options) == ids(plain, prompt, plan, **options)

    def test_recordings_outlive_others_and_the_cache_of_the_allocator(self, both):
        """Memory that grows lets recordings go, of which others may have shared what they wrote to."""
        plain, recorded = both
        for length in (17, 1500, 90, 17):
            prompt = random_prompt(plain, length)
            for _ in range(3):
                torch.cuda.empty_cache()
                assert ids(recorded, prompt, PLAIN, n=60) == ids(plain, prompt, PLAIN, n=60)


@pytest.mark.parametrize("room", [0, 1024])
def test_turns_of_a_conversation_go_on_in_recorded_memory(room, monkeypatch):
    """In the same one, or in larger memory that the beginning is copied into."""
    monkeypatch.setattr("layerskip.decoding.prefix._ROOM", room)
    decoder = tiny_decoder("llama3.1")
    recorded, prefix = recording(decoder), Prefix()
    for plan in (PLAIN, speculative(2, 3), ALL_DRAFTS):
        prompt = random_prompt(decoder, 90)
        for turn in range(3):
            expected = ids(decoder, prompt, plan, n=40)
            assert ids(recorded, prompt, plan, n=40, prefix=prefix) == expected, (turn, plan)
            prompt = [*prompt, *expected, *random_prompt(decoder, 3, seed=turn)]
    assert recorded.stand_in.replayed > recorded.stand_in.recorded > 0


def test_memory_that_is_not_kept_is_not_recorded_over(monkeypatch):
    monkeypatch.setattr(graphs, "_LONGEST", 64)
    recorded = recording(tiny_decoder("llama3.1", max_position_embeddings=4096))
    cache, hidden = recorded.new_cache(2000), recorded.embed(torch.tensor([[3]]))
    for _ in range(3):
        recorded.run(hidden, 0, len(recorded.layers), cache)
    assert not recorded.stand_in.recorded
