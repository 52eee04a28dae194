"""Drafts scored over few tokens: the same answers, from a smaller head."""

import copy
import dataclasses

import pytest
import torch
from layerskip.decoding.short_head import ReducedHead
from tiny_decoders import LAYERS, PLAIN, ids, random_prompt, speculative, steps, tiny_decoder

SAMPLES = 1500


def short(plan, vocabulary):
    return dataclasses.replace(plan, draft_vocabulary=vocabulary)


@pytest.mark.parametrize("case", ["llama2", "smollm2", "gemma2"])  # own head, tied, soft cap
def test_logits_of_the_kept_tokens_are_the_whole_heads(case):
    decoder = tiny_decoder(case)
    hidden = decoder.embed(torch.tensor([random_prompt(decoder, 5)]))
    kept = [7, 3, 3, 50]
    head = ReducedHead(decoder, kept)
    whole = decoder.logits(hidden)
    torch.testing.assert_close(head.short.logits(hidden), whole[..., [3, 7, 50]])
    more = head.also(decoder, [9, 7, 2])
    assert more.token_ids.tolist() == [3, 7, 50, 2, 9]
    torch.testing.assert_close(more.short.logits(hidden), whole[..., more.token_ids])
    assert more.share == 5 / decoder.architecture.vocab_size


def test_probabilities_are_spread_over_all_tokens():
    head = ReducedHead(tiny_decoder("llama2"), [4, 1]).also(tiny_decoder("llama2"), [0])
    spread = head.spread(torch.tensor([[0.5, 0.2, 0.3]]))
    assert spread.shape == (1, tiny_decoder("llama2").architecture.vocab_size)
    assert spread[0, [0, 1, 4]].tolist() == pytest.approx([0.3, 0.5, 0.2])
    assert float(spread.sum()) == pytest.approx(1.0)


def test_the_list_s_head_is_made_once_and_prompts_add_their_own_rows(monkeypatch):
    decoder = copy.copy(tiny_decoder("llama2"))  # whose heads are not made yet
    made, cut = [], type(decoder).with_short_head

    def counted(self, token_ids):
        made.append(len(token_ids))
        return cut(self, token_ids)

    monkeypatch.setattr(type(decoder), "with_short_head", counted)
    plan = short(speculative(1, 2), (1, 2, 5))
    for _ in range(3):
        ids(decoder, [1, 2, 5], plan)
        ids(decoder, [7, 8, 5, 2], plan)
    assert made == [3, 2, 2, 2]
    # Several lists in turns, as rows of a comparison have them, are made once each.
    for _ in range(2):
        for kept in ((1, 2, 5), (1, 2, 5, 9), (1, 2, 5, 9, 11)):
            ids(decoder, [1, 2, 5], short(speculative(1, 2), kept))
    assert made == [3, 2, 2, 2, 4, 5]


def test_the_weight_in_onednn_layout_gives_the_same_rows():
    decoder = tiny_decoder("llama2")
    packed = torch.randn(64, 32, dtype=torch.bfloat16)
    from layerskip.model.quantize import linear

    x, index = torch.randn(2, 32, dtype=torch.bfloat16), torch.tensor([5, 60, 0])
    whole, rows = linear(packed), linear(packed).rows(index)
    torch.testing.assert_close(rows(x), whole(x)[:, index])
    assert rows.weight_bytes == 3 * 32 * 2
    assert decoder.head.rows(index).weight_bytes < decoder.head.weight_bytes


@pytest.mark.parametrize("case", ["llama2", "smollm2"])
@pytest.mark.parametrize("size", [1, 20])
@pytest.mark.parametrize("plan", [speculative(1, 4), speculative(LAYERS, 2)], ids=str)
def test_greedy_is_plain(case, size, plan):
    decoder = tiny_decoder(case)
    for seed in range(3):
        prompt = random_prompt(decoder, 9, seed)
        assert ids(decoder, prompt, short(plan, tuple(range(size)))) == ids(decoder, prompt, PLAIN)


def test_only_kept_tokens_and_the_prompts_are_drafted():
    decoder = tiny_decoder("llama3.1")
    prompt = random_prompt(decoder, 6)
    made = steps(decoder, prompt, short(speculative(1, 4), (1, 2)), n=40)
    drafted = {t for step in made for t in (*step.tokens[: step.accepted], *step.rejected)}
    assert drafted
    assert drafted <= {1, 2, *prompt}
