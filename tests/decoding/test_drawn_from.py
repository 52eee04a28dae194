"""What drafted tokens were drawn from."""

import pytest
import torch
from layerskip.decoding.drawn_from import DrawnFrom
from layerskip.decoding.short_head import ReducedHead
from tiny_decoders import tiny_decoder

from layerskip.decoding.accept import accept_sampled
from layerskip.model import Distributions


def drawn_from(rows, short):
    """Two tokens of an early exit with tokens of n-grams behind them."""
    decoder = tiny_decoder("llama2")
    head = ReducedHead(decoder, [9, 4, 1]).also(decoder, [30, 0]) if short else None
    ids = head.token_ids if short else torch.arange(decoder.architecture.vocab_size)
    generator = torch.Generator().manual_seed(0)
    exits = tuple(torch.randn(rows, 1, len(ids), generator=generator).softmax(-1) for _ in range(2))
    chosen = tuple(torch.multinomial(q[:, 0], 1, generator=generator) for q in exits)
    behind = torch.randint(decoder.architecture.vocab_size, (rows, 3), generator=generator)
    tokens = torch.cat([*(ids[at] for at in chosen), behind], dim=1)
    exits = tuple(map(Distributions, exits))
    return DrawnFrom(tokens, decoder.architecture.vocab_size, exits, chosen, head)


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_parts_are_those_of_the_whole(rows, short):
    drawn = drawn_from(rows, short)
    whole = drawn.whole
    assert whole.shape == (rows, 5, drawn.vocab_size)
    torch.testing.assert_close(whole.sum(-1), torch.ones(rows, 5))
    assert torch.equal(whole.gather(2, drawn.tokens[..., None])[..., 0], drawn.chances)
    for row in range(rows):
        for i in range(5):
            assert torch.equal(drawn[row, i], whole[row, i])
            chances = [drawn.chance(row, i, token) for token in range(drawn.vocab_size)]
            assert chances == whole[row, i].tolist()
    assert torch.equal(drawn.chances[:, 2:], torch.ones(rows, 3))


def test_n_grams_alone_are_certain():
    drawn = DrawnFrom(torch.tensor([[4, 2]]), 6)
    expected = torch.tensor([[[0, 0, 0, 0, 1.0, 0], [0, 0, 1.0, 0, 0, 0]]])
    assert torch.equal(drawn.whole, expected)
    assert drawn.chances.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("short", [False, True])
def test_acceptance_is_that_of_the_whole(short):
    drawn = drawn_from(3, short)
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(3, 6, drawn.vocab_size, generator=generator)
    p[:, :5].scatter_add_(2, drawn.tokens[..., None], torch.full((3, 5, 1), 3.0))
    p = p.softmax(-1)
    for seed in range(40):
        found, expected = (
            accept_sampled(drawn.tokens, q, p, torch.Generator().manual_seed(seed))
            for q in (drawn, drawn.whole)
        )
        assert all(map(torch.equal, found, expected))
