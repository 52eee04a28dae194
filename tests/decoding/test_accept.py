"""The acceptance rule by enumeration on tiny vocabularies.

Letters: V vocabulary, d drafted tokens, R rows of a batch (one for every case enumerated).
"""

import itertools
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip.decoding import accept
from layerskip.decoding.accept import accept_greedy, accept_sampled

# --- greedy -------------------------------------------------------------------------------------


def test_greedy_over_all_patterns():
    for d in (0, 1, 2, 3):
        for draft in itertools.product(range(3), repeat=d):
            for target in itertools.product(range(3), repeat=d + 1):
                count = next((i for i in range(d) if draft[i] != target[i]), d)
                assert accept_greedy(draft, target) == count


# --- sampled ------------------------------------------------------------------------------------


def run_rule(draft, q, p, uniform):
    """Apply the rule to given uniform numbers.

    Returns:
        accepted [R], and the distribution [R, V] that the following token is sampled from.
    """
    recorded = []

    def record(weights, generator):
        recorded.append(weights)
        return torch.zeros(len(weights), dtype=torch.int64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda shape, **_: uniform.reshape(shape))
        patch.setattr(accept, "sample", record)
        accepted, _ = accept_sampled(draft, q, lambda i, j: p[:, i:j])
    (weights,) = recorded
    return accepted, weights / weights.sum(-1, keepdim=True)


def output_distribution(q, p, uniform_numbers):
    """Return the probability of every sequence of d + 1 tokens that the rule begins and p completes.

    p and q are tables over prefixes, so that each distribution depends on the tokens before it: p[i]
    is [V] * (i + 1) with the next token last. Positions that a round leaves open are sampled from p.

    Args:
        q: d tables.
        p: d + 1 tables.
        uniform_numbers: (p(x), q(x)) [d] each to a list of (uniform numbers [d], their weight).
    """
    d, vocabulary = len(q), p[0].shape[0]
    drafts, rows_q, rows_p, uniforms, weights = [], [], [], [], []
    for tokens in itertools.product(range(vocabulary), repeat=d):
        row_q = [q[i][tokens[:i]] for i in range(d)]
        row_p = [p[i][tokens[:i]] for i in range(d + 1)]
        q_x = torch.tensor([row_q[i][tokens[i]] for i in range(d)])
        if (q_x == 0).any():
            continue  # never drafted
        p_x = torch.tensor([row_p[i][tokens[i]] for i in range(d)])
        for uniform, weight in uniform_numbers(p_x, q_x):
            drafts.append(tokens)
            rows_q.append(torch.stack(row_q))
            rows_p.append(torch.stack(row_p))
            uniforms.append(uniform)
            weights.append(float(q_x.double().prod()) * weight)
    draft, q_rows, p_rows = torch.tensor(drafts), torch.stack(rows_q), torch.stack(rows_p)
    accepted, following = run_rule(draft, q_rows, p_rows, torch.stack(uniforms))
    for i in range(0, len(draft), len(draft) // 20 + 1):  # one row alone, position by position
        row = slice(i, i + 1)
        alone = run_rule(draft[row], q_rows[row], p_rows[row], uniforms[i][None])
        assert torch.equal(alone[0], accepted[row])
        assert torch.equal(alone[1], following[row])
    if bool((q_rows.amax(-1) == 1).all()):  # point masses may be left out
        without_q = run_rule(draft, None, p_rows, torch.stack(uniforms))
        assert torch.equal(without_q[0], accepted)
        assert torch.equal(without_q[1], following)
    total = torch.zeros([vocabulary] * (d + 1), dtype=torch.float64)
    rows = zip(drafts, accepted.tolist(), following, weights, strict=True)
    for tokens, count, next_probs, weight in rows:
        rest = next_probs.double() * weight
        for table in p[count + 1 :]:
            rest = rest[..., None] * table[tokens[:count]].double()
        total[tokens[:count]] += rest
    return total


def joint(p):
    """Return the probability of every sequence under the tables p."""
    total = torch.ones([], dtype=torch.float64)
    for table in p:
        total = total[..., None] * table.double()
    return total


def around_the_threshold(p_x, q_x):
    """Integrate over the uniform numbers: accepted just below p(x) / q(x), rejected just above it."""
    thresholds = (p_x.double() / q_x.double()).clamp(max=1.0)
    cases = []
    for above in itertools.product((False, True), repeat=len(thresholds)):
        above = torch.tensor(above, dtype=torch.bool)
        weight = float(torch.where(above, 1.0 - thresholds, thresholds).prod())
        if weight > 0:
            high = (thresholds * (1 + 1e-5)).clamp(max=1 - 1e-7)
            cases.append((torch.where(above, high, thresholds * (1 - 1e-5)), weight))
    return cases


def twelfths_grid(p_x, q_x):
    """Return all midpoints of a grid of twelfths: exact where every p(x) / q(x) is a multiple of one."""
    midpoints = (torch.arange(12).double() + 0.5) / 12
    grid = torch.cartesian_prod(*[midpoints] * len(p_x)).reshape(-1, len(p_x))
    return [(uniform, 12.0 ** -len(p_x)) for uniform in grid]


def tables(rows, vocabulary, n):
    """Return n tables over prefixes from an endless iterator of distributions."""
    return [
        torch.stack([next(rows) for _ in range(vocabulary**i)]).reshape([vocabulary] * (i + 1))
        for i in range(n)
    ]


def twelfths(*numerators):
    return torch.tensor([float(Fraction(n, 12)) for n in numerators])


DRAFTS = {
    "distributions": [twelfths(6, 4, 2), twelfths(0, 6, 6), twelfths(3, 3, 6)],
    "point masses": [twelfths(12, 0, 0), twelfths(0, 0, 12), twelfths(0, 12, 0)],
    "mixed": [twelfths(0, 12, 0), twelfths(6, 4, 2), twelfths(12, 0, 0), twelfths(0, 6, 6)],
}
TARGETS = [
    twelfths(1, 4, 7),
    twelfths(12, 0, 0),
    twelfths(5, 5, 2),
    twelfths(0, 3, 9),
    twelfths(4, 4, 4),
]


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("draft", DRAFTS)
def test_outputs_are_distributed_as_p_on_a_grid_of_uniform_numbers(d, draft):
    """Every draft and every cell of the unit cube, in exact twelfths (float32 to 1e-6)."""
    q = tables(itertools.cycle(DRAFTS[draft]), 3, d)
    p = tables(itertools.cycle(TARGETS), 3, d + 1)
    result = output_distribution(q, p, twelfths_grid)
    torch.testing.assert_close(result, joint(p), rtol=0, atol=1e-6)


def distributions(vocabulary):
    """Distributions of few distinct values: zeros, ties and equal p and q come up often."""
    weights = st.lists(st.integers(0, 4), min_size=vocabulary, max_size=vocabulary)
    return weights.filter(any).map(lambda w: torch.tensor(w, dtype=torch.float32) / sum(w))


@settings(max_examples=50)
@given(data=st.data(), vocabulary=st.integers(2, 4), d=st.integers(1, 2))
def test_outputs_are_distributed_as_p_for_any_draft(data, vocabulary, d):
    rows = iter(lambda: data.draw(distributions(vocabulary)), None)
    q, p = tables(rows, vocabulary, d), tables(rows, vocabulary, d + 1)
    result = output_distribution(q, p, around_the_threshold)
    torch.testing.assert_close(result, joint(p), rtol=0, atol=1e-6)


def test_a_token_that_the_model_rules_out_is_never_accepted():
    p = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    for q in (None, torch.tensor([[[1.0, 0.0]]])):
        accepted, following = run_rule(torch.tensor([[0]]), q, p, torch.tensor([[0.0]]))
        assert accepted.tolist() == [0]
        assert following.tolist() == [[0.0, 1.0]]


def test_equal_distributions_accept_everything():
    p = torch.rand(4, 6, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    draft = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(1))
    largest = torch.full((4, 5), 1 - 2**-53, dtype=torch.float64)  # that torch.rand gives
    accepted, following = run_rule(draft, p[:, :-1], p, largest)
    assert accepted.tolist() == [5] * 4
    torch.testing.assert_close(following, p[:, -1])


def test_all_zero_residual():
    """p and q differ by one rounding where the token is rejected, and p is above q nowhere."""
    q = torch.tensor([[[0.5, 0.5]]])
    p = torch.tensor([[[0.5 - 2**-25, 0.5], [0.25, 0.75]]])
    largest = torch.tensor([[1 - 2**-53]], dtype=torch.float64)
    accepted, following = run_rule(torch.tensor([[0]]), q, p, largest)
    assert accepted.tolist() == [0]
    torch.testing.assert_close(following, p[:, 0])


def test_without_a_draft_the_token_is_sampled_from_p(monkeypatch):
    p = torch.tensor([[[0.1, 0.2, 0.7]]]).expand(4, 1, 3)
    nothing = torch.zeros(4, 0, dtype=torch.int64)
    uniform = torch.tensor([[0.09], [0.11], [0.29], [0.31]], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: uniform[:, : shape[-1] != (4, 0)])
    accepted, following = accept_sampled(nothing, None, lambda i, j: p[:, i:j])
    assert accepted.tolist() == [0, 0, 0, 0]
    assert following.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("accepted", [0, 1, 3])
def test_one_row_computes_no_distribution_after_the_first_rejection(accepted):
    draft = torch.tensor([[0, 1, 2]])
    p = F.one_hot(torch.tensor([0, 1, 2, 0]), 4).float()
    p[accepted] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    computed = []

    def target_probs(i, j):
        computed.append((i, j))
        return p[None, i:j]

    count, following = accept_sampled(draft, None, target_probs)
    assert (count.tolist(), following.tolist()) == ([accepted], [3])
    assert computed == [(i, i + 1) for i in range(accepted + 1)]


def test_rows_of_a_batch_are_computed_at_once():
    calls = []
    accept_sampled(
        torch.zeros(2, 3, dtype=torch.int64),
        None,
        lambda i, j: calls.append((i, j)) or torch.ones(2, j - i, 4),
    )
    assert calls == [(0, 4)]
