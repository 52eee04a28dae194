"""Predictions that the lens reads from the exits, against early exit itself and counts by hand."""

import io

import pytest
import torch
from PIL import Image
from reports import hand_made_lens, nasty_report, scripted_report
from scripted import TOKENIZER, ScriptedDecoder, encode, words
from tiny_decoders import LAYERS, ids, random_prompt, tiny_decoder
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from exit_states import exit_states
from layerskip.decoding import DecodingConfig
from layerskip.decoding.generate import PREFILL_CHUNK
from layerskip.lens import Agreement, Symbols, lens, look, visible


@pytest.mark.parametrize("exit_layer", [1, LAYERS])
def test_top_tokens_are_what_early_exit_answers(exit_layer):
    decoder, prompt = tiny_decoder("llama3.1"), random_prompt(tiny_decoder("llama3.1"), 9)
    answer = ids(decoder, prompt, DecodingConfig(mode="early-exit", exit_layer=exit_layer), n=12)
    seen = look(decoder, [*prompt, *answer], prompt_tokens=9, start=9)
    assert seen.exits == (1, 2, 3, 4)
    assert seen.positions == seen.answer_positions == range(9, 21)
    assert seen.top_ids[exit_layer - 1, :, 0].tolist() == answer


def test_probabilities_are_those_of_the_shared_exit():
    decoder = tiny_decoder("llama3.1")
    tokens = random_prompt(decoder, 12)
    seen = look(decoder, tokens, prompt_tokens=5, top=3)
    states = exit_states(decoder, tokens, [2, LAYERS])
    p = decoder.logits(states[2])[0].softmax(-1)
    answer = decoder.logits(states[LAYERS])[0].argmax(-1)
    for position in seen.positions:
        before = p[position - 1]
        expected = sorted(enumerate(before.tolist()), key=lambda pair: -pair[1])[:3]
        got = seen.best(1, position - 1)
        assert [token for token, _ in got] == [token for token, _ in expected]
        assert [q for _, q in got] == pytest.approx([q for _, q in expected], abs=1e-6)
        of_answer = float(before[answer[position - 1]])
        assert float(seen.answer_probabilities[1, position - 1]) == pytest.approx(
            of_answer, abs=1e-6
        )


def test_pieces_of_long_texts_fit_together(monkeypatch):
    decoder = tiny_decoder("llama3.1", max_position_embeddings=1024)
    tokens = random_prompt(decoder, PREFILL_CHUNK + 60)
    whole = look(decoder, tokens, prompt_tokens=5, exits=[2])
    for chunk, start in ((7, 1), (64, 5), (64, PREFILL_CHUNK + 3)):
        monkeypatch.setattr(lens, "CHUNK", chunk)
        seen = look(decoder, tokens, prompt_tokens=5, exits=[2], start=start)
        part = whole.part(range(start, len(tokens)))
        assert seen.exits == (2, LAYERS)
        assert seen.positions == part.positions
        assert torch.equal(seen.top_ids[:, :, 0], part.top_ids[:, :, 0])
        torch.testing.assert_close(seen.answer_probabilities, part.answer_probabilities)


@pytest.mark.parametrize("start", [5, PREFILL_CHUNK + 3])
def test_what_is_not_looked_at_is_not_kept(monkeypatch, start):
    decoder = tiny_decoder("llama3.1", max_position_embeddings=1024)
    cat, kept = torch.cat, []

    def seen(parts, dim=0):
        kept.extend(part for part in parts if part.ndim == 3)  # hidden states
        return cat(parts, dim=dim)

    monkeypatch.setattr(torch, "cat", seen)
    look(decoder, random_prompt(decoder, PREFILL_CHUNK + 60), prompt_tokens=5, start=start)
    monkeypatch.undo()
    assert len(kept) == LAYERS * (2 if start == 5 else 1)
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in kept)


def test_of_equal_logits_the_one_that_decoding_takes_comes_first():
    class Flat(ScriptedDecoder):
        def logits(self, hidden):
            return torch.zeros(*hidden.shape[:2], 300)

    seen = look(Flat([5]), [1, 2, 3], prompt_tokens=1)
    assert (seen.top_ids[:, :, 0] == 0).all()
    assert all(len(set(seen.top_ids[x, 0].tolist())) == 5 for x in range(4))


def test_saturation_layer():
    for column, saturated in (
        ([7, 7, 7, 7], 2),
        ([1, 7, 7, 7], 4),
        ([7, 1, 7, 7], 6),
        ([7, 7, 1, 7], 8),
        ([7, 7, 7, 1], 8),  # all agree with one another, but not with the last
    ):
        assert hand_made_lens([column]).saturation_layers == [saturated]


def test_agreement_by_hand():
    """Two texts, the first with a position of the prompt that does not count."""
    first = hand_made_lens([[7, 7, 7, 7], [1, 7, 7, 7], [7, 7, 1, 7]], prompt_tokens=2)
    second = hand_made_lens([[7, 1, 7, 7], [7, 7, 7, 7]])
    total = Agreement.of(first) + Agreement.of(second)
    assert (total.prompts, total.positions) == (2, 4)
    assert total.rates == [3 / 4, 3 / 4, 3 / 4, 1]
    assert total.saturated_by == [1 / 4, 2 / 4, 3 / 4, 1]
    assert total.mean_saturation_layer == (2 + 4 + 6 + 8) / 4


def test_agreement_of_a_scripted_answer():
    """Two of eight tokens are missed by every exit but the last."""
    found = scripted_report(range(10, 18), misses={2, 5}).agreement
    assert found.agreeing == (6, 6, 6, 8)
    assert found.saturating == (6, 0, 0, 2)
    assert found.mean_saturation_layer == (6 * 1 + 2 * 4) / 8


def test_part():
    seen = hand_made_lens([[7, 7, 7, 7], [1, 7, 7, 7], [7, 1, 7, 7]], start=3, prompt_tokens=4)
    part = seen.part(range(4, 99))
    assert (part.positions, part.saturation_layers) == (range(4, 6), [4, 6])
    assert part.answer_positions == range(4, 6)
    with pytest.raises(ValueError, match="positions 1 to 2 are not there: there are 3 to 5"):
        seen.part(range(1, 3))


def test_bad_input():
    for arguments, message in (
        ({"token_ids": [1]}, "two tokens"),
        ({"token_ids": [1] * 66}, "context holds 64"),
        ({"exits": [0]}, "exit layer 0 is out of range: this model has 1 to 4"),
        ({"exits": [2, 5]}, "exit layer 5"),
    ):
        with pytest.raises(ValueError, match=message):
            look(ScriptedDecoder([5]), **{"token_ids": [1, 2], "prompt_tokens": 1, **arguments})


def test_visible():
    for text, seen in (
        (" a", "·a"),
        ("\n\t\r", "↵⇥␍"),
        ("\x1b[31m", "\\u001b[31m"),  # a terminal would obey
        ("\N{RIGHT-TO-LEFT OVERRIDE}x\N{ZERO WIDTH SPACE}", "\\u202ex\\u200b"),
        ("é鍵", "é鍵"),
    ):
        assert visible(text) == seen


def test_byte_level_tokens():
    symbols = Symbols(TOKENIZER)
    assert [symbols[t] for t in words("hello", "Ġworld", "<end>")] == ["hello", "·world", "<end>"]
    assert symbols[encode("é")[0]] == "\N{REPLACEMENT CHARACTER}"  # half a character


def test_the_space_that_some_tokenizers_drop_is_kept():
    vocabulary = {"<unk>": 0, "▁big": 1, "ger": 2, "▁": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert wrapped.decode([1]) == "big"
    symbols = Symbols(wrapped)
    assert [symbols[i] for i in (1, 2, 3)] == ["·big", "ger", "·"]


def test_without_a_tokenizer():
    assert Symbols(None)[12] == "#12"


def colours(png):
    image = Image.open(io.BytesIO(png)).convert("RGB")
    return image.size, {colour for _, colour in image.getcolors(maxcolors=1 << 24)}


def test_report():
    from layerskip.lens.report import AGREES, draw_report

    report = nasty_report()
    size, found = colours(draw_report(report))
    assert tuple(bytes.fromhex(AGREES[1:])) in found
    fewer, _ = colours(draw_report(report.part(range(2, 4))))
    assert fewer[0] < size[0]


def test_agreement():
    from layerskip.lens.report import draw_agreement

    agreement = Agreement.of(hand_made_lens([[7, 7, 7, 7], [1, 7, 7, 7]]))
    _, found = colours(draw_agreement(agreement, "a $model$"))
    assert {(0x25, 0xA1, 0x8E), (0x35, 0x54, 0xA5)} <= found
