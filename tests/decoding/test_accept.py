"""The acceptance rule by enumeration on tiny vocabularies.

Letters: V vocabulary, d drafted tokens, R rows of a batch (one for every case enumerated).
"""

import itertools
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip.decoding import Sampling, accept, sampling
from layerskip.decoding.accept import accept_greedy, accept_sampled
from layerskip.model import Distributions, most_likely, pick

# --- greedy -------------------------------------------------------------------------------------


def accepted_by_hand(drafted, best):
    agreeing = (mine == theirs for mine, theirs in zip(drafted, best, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, agreeing))


@pytest.mark.parametrize("d", [0, 1, 2, 3])
def test_greedy_over_all_patterns(d):
    vocabulary = 3
    cases = [
        (drafted, best)
        for drafted in itertools.product(range(vocabulary), repeat=d)
        for best in itertools.product(range(vocabulary), repeat=d + 1)
    ]
    drafted = torch.tensor([case[0] for case in cases], dtype=torch.int64)
    best = torch.tensor([case[1] for case in cases])
    # The best token leads by a hair, so that nothing but the argmax can tell.
    logits = torch.ones(*best.shape, vocabulary)
    logits.scatter_add_(2, best[..., None], torch.full_like(logits[..., :1], 1e-6))
    accepted, following = accept_greedy(drafted, logits.argmax(-1))
    counts = [accepted_by_hand(*case) for case in cases]
    assert accepted.tolist() == counts
    assert set(counts) == set(range(d + 1))  # rows with different counts in one batch
    assert following.tolist() == [case[1][count] for case, count in zip(cases, counts, strict=True)]


def test_greedy_refuses_a_likely_token_that_is_not_the_most_likely():
    logits = torch.tensor([[[5.0, 5.001, -9.0], [0.0, 0.0, 0.0]]])
    decoder = SimpleNamespace(
        logits=lambda hidden: logits, choose=lambda hidden: most_likely(logits)
    )
    for penalty, seen in ((1.0, None), (2.0, torch.zeros_like(logits, dtype=torch.bool))):
        how = Sampling(repetition_penalty=penalty)
        drafted, q = torch.tensor([[0]]), logits[:, :1].softmax(-1)
        accepted, following = accept.accept(drafted, q, decoder, None, how, None, seen)
        assert (accepted.tolist(), following.tolist()) == ([0], [[1]])


def test_greedy_ties_go_to_the_token_that_plain_decoding_takes():
    logits = torch.zeros(1, 2, 4)
    accepted, following = accept_greedy(logits[:, :1].argmax(-1), most_likely(logits))
    assert (accepted.tolist(), following.tolist()) == ([1], logits[:, 1].argmax(-1).tolist())


# --- sampled ------------------------------------------------------------------------------------


def run_rule(drafted, q, p, draws):
    """The rule under given uniform numbers, with the last draw replaced by its distribution.

    Returns:
        accepted [R], and the distribution of the following token [R, V].
    """
    weights = []

    def recorded(distribution, generator):
        weights.append(distribution)
        return torch.zeros(len(distribution), 1, dtype=torch.int64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, **options: draws.reshape(shape))
        patch.setattr(accept, "draw", recorded)
        accepted, _ = accept_sampled(drafted, q, p)
    (weights,) = weights
    return accepted, weights / weights.sum(-1, keepdim=True)


def output_distribution(q, p, draws_of):
    """Probability of every sequence of d + 1 tokens that the rule can begin and p then completes.

    p and q are tables over prefixes, so that what follows depends on what stands before it: p[i] is
    [V] * (i + 1) with the next token last. What a round leaves open is drawn from p.

    Args:
        q: d tables.
        p: d + 1 tables.
        draws_of: (p(x), q(x)) [d] each to a list of (uniform numbers [d], their weight).
    """
    d, vocabulary = len(q), p[0].shape[0]
    drafts, rows_q, rows_p, draws, weights = [], [], [], [], []
    for tokens in itertools.product(range(vocabulary), repeat=d):
        row_q = [q[i][tokens[:i]] for i in range(d)]
        row_p = [p[i][tokens[:i]] for i in range(d + 1)]
        q_x = torch.tensor([row_q[i][tokens[i]] for i in range(d)])
        if (q_x == 0).any():
            continue  # never drafted
        p_x = torch.tensor([row_p[i][tokens[i]] for i in range(d)])
        for draw, weight in draws_of(p_x, q_x):
            drafts.append(tokens)
            rows_q.append(torch.stack(row_q))
            rows_p.append(torch.stack(row_p))
            draws.append(draw)
            weights.append(float(q_x.double().prod()) * weight)
    accepted, following = run_rule(
        torch.tensor(drafts), torch.stack(rows_q), torch.stack(rows_p), torch.stack(draws)
    )
    total = torch.zeros([vocabulary] * (d + 1), dtype=torch.float64)
    for tokens, count, own, weight in zip(
        drafts, accepted.tolist(), following, weights, strict=True
    ):
        rest = own.double() * weight
        for table in p[count + 1 :]:
            rest = rest[..., None] * table[tokens[:count]].double()
        total[tokens[:count]] += rest
    return total


def joint(p):
    """Probability of every sequence under the tables p."""
    total = torch.ones([], dtype=torch.float64)
    for table in p:
        total = total[..., None] * table.double()
    return total


def around_the_threshold(p_x, q_x):
    """Integrates the uniform numbers: accepted just below p(x) / q(x), rejected just above it."""
    thresholds = (p_x.double() / q_x.double()).clamp(max=1.0)
    cases = []
    for above in itertools.product((False, True), repeat=len(thresholds)):
        above = torch.tensor(above, dtype=torch.bool)
        weight = float(torch.where(above, 1.0 - thresholds, thresholds).prod())
        if weight > 0:
            draw = torch.where(
                above, (thresholds * (1 + 1e-5)).clamp(max=1 - 1e-7), thresholds * (1 - 1e-5)
            )
            cases.append((draw.float(), weight))
    return cases


def twelfths_grid(p_x, q_x):
    """All midpoints of a grid of twelfths: exact where every p(x) / q(x) is a whole number of them."""
    midpoints = (torch.arange(12) + 0.5) / 12
    grid = torch.cartesian_prod(*[midpoints] * len(p_x)).reshape(-1, len(p_x))
    return [(draw, 12.0 ** -len(p_x)) for draw in grid]


def tables(rows, vocabulary, n):
    """Tables over prefixes from an endless iterator of distributions."""
    return [
        torch.stack([next(rows) for _ in range(vocabulary**i)]).reshape([vocabulary] * (i + 1))
        for i in range(n)
    ]


def twelfths(*numerators):
    assert sum(numerators) == 12
    return torch.tensor([float(Fraction(n, 12)) for n in numerators])


@pytest.mark.parametrize("d", [1, 2])
def test_output_is_distributed_as_p_on_a_grid_of_draws(d):
    """Every draft and every cell of the unit cube, in exact twelfths (float32 to 1e-6)."""
    q_rows = itertools.cycle(
        [twelfths(6, 4, 2), twelfths(0, 6, 6), twelfths(3, 3, 6), twelfths(12, 0, 0)]
    )
    p_rows = itertools.cycle(
        [
            twelfths(1, 4, 7),
            twelfths(12, 0, 0),
            twelfths(5, 5, 2),
            twelfths(0, 3, 9),
            twelfths(4, 4, 4),
        ]
    )
    q, p = tables(q_rows, 3, d), tables(p_rows, 3, d + 1)
    made = output_distribution(q, p, twelfths_grid)
    torch.testing.assert_close(made, joint(p), rtol=0, atol=1e-6)


SAMPLINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.5, top_k=2),
    Sampling(temperature=1.5, top_p=0.7),
    Sampling(temperature=0.8, min_p=0.3),
    Sampling(temperature=1.2, top_k=3, top_p=0.8, min_p=0.1),
]


def sampled_rows(sampling, vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield sampling.probabilities(torch.randn(vocabulary, generator=generator) * 2)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("vocabulary", "d"), [(5, 1), (4, 2), (3, 3)])
def test_output_is_distributed_as_p_after_temperature_and_truncation(sampling, vocabulary, d):
    q = tables(sampled_rows(sampling, vocabulary, 1), vocabulary, d)
    p = tables(sampled_rows(sampling, vocabulary, 2), vocabulary, d + 1)
    made = output_distribution(q, p, around_the_threshold)
    torch.testing.assert_close(made, joint(p), rtol=0, atol=1e-6)  # float32


def distributions(vocabulary):
    """Distributions of few distinct values: zeros, ties and equal p and q come up often."""
    weights = st.lists(st.integers(0, 4), min_size=vocabulary, max_size=vocabulary)
    return weights.filter(any).map(lambda w: torch.tensor(w, dtype=torch.float32) / sum(w))


@given(data=st.data(), vocabulary=st.integers(2, 4), d=st.integers(1, 2))
def test_output_is_distributed_as_p_whatever_the_draft(data, vocabulary, d):
    rows = iter(lambda: data.draw(distributions(vocabulary)), None)
    q, p = tables(rows, vocabulary, d), tables(rows, vocabulary, d + 1)
    made = output_distribution(q, p, around_the_threshold)
    torch.testing.assert_close(made, joint(p), rtol=0, atol=1e-6)


@given(data=st.data(), rows=st.integers(1, 5), vocabulary=st.integers(2, 6), d=st.integers(0, 6))
def test_accepted_and_following_are_possible(data, rows, vocabulary, d):
    """Counts from 0 to d, and no token that the model gives no probability."""
    p = torch.stack([data.draw(distributions(vocabulary)) for _ in range(rows * (d + 1))])
    q = torch.stack([data.draw(distributions(vocabulary)) for _ in range(rows * (d + 1))])
    p, q = (table.view(rows, d + 1, vocabulary) for table in (p, q))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    drafted = torch.multinomial(q.view(-1, vocabulary), 1, generator=generator).view(rows, d + 1)
    accepted, following = accept_sampled(drafted[:, :d], q[:, :d], p, generator)
    assert accepted.shape == following.shape == (rows,)
    for row, (count, token) in enumerate(zip(accepted.tolist(), following.tolist(), strict=True)):
        assert 0 <= count <= d
        stands = [*drafted[row, :count].tolist(), token]
        assert all(p[row, i, x] > 0 for i, x in enumerate(stands))


def test_rows_are_judged_apart():
    """One batch with every accepted count; each row's token comes from its own position."""
    vocabulary, d = 6, 3
    drafted = torch.zeros(d + 1, d, dtype=torch.int64)
    q = torch.nn.functional.one_hot(drafted, vocabulary).float()
    p = torch.nn.functional.one_hot(
        torch.zeros(d + 1, d + 1, dtype=torch.int64), vocabulary
    ).float()
    for row in range(d + 1):  # row r disagrees first at position r, with a token of its own
        p[row, row] = torch.nn.functional.one_hot(torch.tensor(row + 2), vocabulary)
    accepted, following = accept_sampled(drafted, q, p, torch.Generator().manual_seed(0))
    assert accepted.tolist() == [0, 1, 2, 3]
    assert following.tolist() == [2, 3, 4, 5]


def test_equal_distributions_accept_everything():
    p = torch.rand(4, 6, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    drafted = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(1))
    largest = torch.full((4, 5), 1 - 2**-24)  # the largest number that torch.rand gives
    accepted, following = run_rule(drafted, p[:, :-1], p, largest)
    assert accepted.tolist() == [5] * 4
    torch.testing.assert_close(following, p[:, -1])


def test_all_zero_residual():
    """p and q differ by one rounding where the token is rejected, and nowhere p is above q."""
    q = torch.tensor([[[0.5, 0.5]]])
    p = torch.tensor([[[0.5 - 2**-25, 0.5], [0.25, 0.75]]])
    largest = torch.tensor([[1 - 2**-24]])
    accepted, following = run_rule(torch.tensor([[0]]), q, p, largest)
    assert accepted.tolist() == [0]
    torch.testing.assert_close(following, p[:, 0])
    # With the real draw it does not crash either.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, **options: largest)
        accept_sampled(torch.tensor([[0]]), q, p, torch.Generator().manual_seed(0))


def test_without_a_draft_the_token_is_drawn_from_p():
    p = torch.tensor([[[0.1, 0.2, 0.7]]]).expand(4, 1, 3)
    nothing = torch.zeros(4, 0, dtype=torch.int64)
    shares = torch.tensor([[0.09], [0.11], [0.29], [0.31]], dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, **options: shares.reshape(shape))
        accepted, following = accept_sampled(nothing, None, p)
    assert accepted.tolist() == [0, 0, 0, 0]
    assert following.tolist() == [0, 1, 1, 2]


def test_the_generator_makes_it_repeatable():
    p = torch.rand(64, 3, 8, generator=torch.Generator().manual_seed(0)).softmax(-1)
    q = torch.rand(64, 2, 8, generator=torch.Generator().manual_seed(1)).softmax(-1)
    drafted = torch.randint(8, (64, 2), generator=torch.Generator().manual_seed(2))
    first, second, other = (
        torch.stack(accept_sampled(drafted, q, p, torch.Generator().manual_seed(seed)))
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_of_the_model_no_more_is_looked_at_than_decides():
    looked_at = []

    class Recorded(Distributions):
        def __init__(self):
            pass

        def __getitem__(self, at):
            looked_at.append(at)
            return torch.tensor([0.0, 1.0]) if at[1] == 2 else torch.tensor([1.0, 0.0])

    q = torch.tensor([[[1.0, 0.0]] * 4])
    made = accept_sampled(torch.zeros(1, 4, dtype=torch.int64), q, Recorded())
    assert [part.tolist() for part in made] == [[2], [1]]
    assert looked_at == [(0, 0), (0, 1), (0, 2)]


class Elsewhere(torch.Tensor):
    """A tensor of the CPU that says it is on another device."""

    device = torch.device("cuda")


def test_an_accelerators_branch_gives_the_same():
    tokens = torch.tensor(list(itertools.product([0, 1], repeat=7)))
    there = accept_greedy(*(part.as_subclass(Elsewhere) for part in tokens.split([3, 4], dim=1)))
    here = accept_greedy(*tokens.split([3, 4], dim=1))
    assert [part.tolist() for part in there] == [part.tolist() for part in here]
    scores = torch.randn(3, 9)
    for top_p, top_k in ((0.3, None), (0.9, 5), (0.999, None), (None, 3)):
        kinds = sampling.Sampling(temperature=0.8, top_p=top_p, top_k=top_k)
        found = kinds.probabilities(scores.as_subclass(Elsewhere))
        expected = kinds.probabilities(scores)
        assert ((found > 0) == (expected > 0)).all()
        torch.testing.assert_close(found.as_subclass(torch.Tensor), expected, rtol=0, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.rand(64, n, 5, generator=generator).softmax(-1) for n in (4, 3))
    drafted = torch.randint(5, (64, 3), generator=generator)
    least = torch.rand(64, 3, generator=generator) * 0.4
    share = torch.rand(64, 1, generator=generator, dtype=torch.float64)
    weights = torch.rand(64, 3000, generator=generator).double()
    assert torch.equal(pick(weights, share), pick(weights.as_subclass(Elsewhere), share))
    how = drafted, q, Distributions(p), least
    here, there = (judged(*how) for judged in (accept._in_turn, accept._at_once))
    assert all(map(torch.equal, here, there))
    assert set(here[0].tolist()) == {0, 1, 2, 3}
