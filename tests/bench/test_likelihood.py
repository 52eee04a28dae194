"""Scores of passages, in batches and at all exits at once, against one pass for each, in float32."""

import pytest
import torch
from tiny_decoders import LAYERS, random_prompt, tiny_decoder

from exit_states import exit_states
from layerskip.bench.quality import Passage, Score, score_passages
from layerskip.decoding.generate import PREFILL_CHUNK
from layerskip.model import Decoder

DECODER = "llama3.1"


def passages_of(*lengths_and_scored):
    decoder = tiny_decoder(DECODER)
    return [
        Passage(tuple(random_prompt(decoder, n, seed=n)), scored)
        for n, scored in lengths_and_scored
    ]


def alone(passage, exit_layer):
    """The score from logits of the whole passage, unbatched."""
    decoder = tiny_decoder(DECODER)
    states = exit_states(decoder, passage.tokens[:-1], [exit_layer])[exit_layer]
    logits = decoder.logits(states)[0, len(passage.tokens) - 1 - passage.scored :]
    answers = torch.tensor(passage.tokens[len(passage.tokens) - passage.scored :])
    nats = logits.log_softmax(-1).gather(1, answers[:, None]).sum()
    return float(nats), int((logits.argmax(-1) == answers).sum())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_ragged_batches_score_as_each_passage_alone(batch_size):
    passages = passages_of((9, 2), (2, 1), (30, 29), (31, 4), (17, 16))
    passages.append(Passage((*passages[0].tokens[:-1], 5), 1))  # shares its input with the first
    passages.append(passages[3])  # asked twice
    scores = score_passages(tiny_decoder(DECODER), passages, [1, 3, LAYERS], batch_size=batch_size)
    for passage, by_exit in zip(passages, scores, strict=True):
        assert list(by_exit) == [1, 3, LAYERS]
        for e, score in by_exit.items():
            nats, hits = alone(passage, e)
            assert score.log_likelihood == pytest.approx(nats, abs=1e-4)
            assert score.hits == hits


def test_longrope_passages_on_both_sides_of_its_switch_score_as_each_alone():
    decoder = tiny_decoder("phi4-mini")
    rope = next(rope for rope in decoder.architecture.ropes if rope is not None)
    lengths = (rope.original_max_positions + 9, rope.original_max_positions - 9, 7)
    passages = [Passage(tuple(random_prompt(decoder, n, seed=n)), 5) for n in lengths]
    together = score_passages(decoder, passages, [LAYERS], batch_size=8)
    for passage, found in zip(passages, together, strict=True):
        (expected,) = score_passages(decoder, [passage], [LAYERS])
        assert found[LAYERS].log_likelihood == pytest.approx(
            expected[LAYERS].log_likelihood, abs=1e-4
        )


def test_passages_longer_than_a_chunk_are_scored_across_it():
    (passage,) = passages_of((PREFILL_CHUNK + 9, 20))
    decoder = tiny_decoder(DECODER, max_position_embeddings=PREFILL_CHUNK + 9)
    scores = score_passages(decoder, [passage], [2])
    assert scores[0][2].log_likelihood == pytest.approx(alone(passage, 2)[0], abs=1e-4)


def test_nothing_to_predict_is_certain():
    passages = [Passage((), 0), Passage((4,), 0)]
    assert score_passages(tiny_decoder(DECODER), passages, [1]) == [{1: Score()}] * 2


def test_every_layer_runs_once_for_all_exits_and_none_above_the_highest(monkeypatch):
    ran = []
    run = Decoder.run

    def counted(self, hidden, start, stop, cache):
        ran.extend((hidden.shape[0], layer) for layer in range(start, stop))
        return run(self, hidden, start, stop, cache)

    monkeypatch.setattr(Decoder, "run", counted)
    letters = [Passage((7, 8, 9, letter), 1) for letter in (10, 11, 12, 13)]
    score_passages(tiny_decoder(DECODER), [*letters, *passages_of((9, 2))], [1, 2, 3])
    assert ran == [(2, 0), (2, 1), (2, 2)]  # four letters are one row


def test_weights_that_are_not_finite_are_an_error(monkeypatch):
    decoder = tiny_decoder(DECODER)
    logits = decoder.logits
    monkeypatch.setattr(decoder, "logits", lambda hidden: logits(hidden) * float("nan"))
    with pytest.raises(ValueError, match="at exit 2 this model's results are not finite"):
        score_passages(decoder, passages_of((9, 2)), [2])
