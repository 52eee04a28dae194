"""Predictions against costs and rounds worked out by hand."""

import numpy as np
import pytest

from layerskip.tune.costs import Costs
from layerskip.tune.predict import Continuation, predict, predict_plain


def costs(**changes):
    """Exits 1 and 2 of three layers, drafts of up to 2 tokens, contexts of 10 and 20 tokens."""
    fields = {
        "contexts": [10, 20],
        "exits": [1, 2],
        "plain_s": np.array([4.0, 5.0]),
        "head_s": np.array([0.5, 0.5]),
        "first_draft_s": np.array([[1.5, 2.5], [2.5, 3.5]]),
        "draft_step_s": np.array([[1.0, 2.0], [1.0, 2.0]]),
        "verify_s": np.array([[[3.0, 3.5, 4.0], [2.0, 2.5, 3.0]]] * 2),
        "round_overhead_s": np.array([0.25, 0.25]),
    }
    return Costs(**{**fields, **changes})


def continuation(marks, *, prompt_tokens=10, limit=64):
    return Continuation(
        prompt_tokens=prompt_tokens,
        token_ids=list(range(len(marks[1]) + 1)),
        limit=limit,
        agreement=marks,
    )


def by_pair(predictions):
    return {(p.exit_layer, p.draft_tokens): p for p in predictions}


def test_the_price_of_a_round_is_its_parts():
    c = costs()
    assert c.round_s(1, 0).tolist() == [4.0, 5.0]  # a plain step
    assert c.round_s(1, 2).tolist() == [1.5 + 1.0 + 4.0 + 0.25, 2.5 + 1.0 + 4.0 + 0.25]
    assert c.round_s(2, 1).tolist() == [2.5 + 2.5 + 0.25, 3.5 + 2.5 + 0.25]


def test_plain_costs_grow_with_the_context():
    """Five tokens after the first, from positions 10 to 14: 4.0, 4.1, ... 4.4 seconds."""
    c = continuation({1: [True] * 5, 2: [True] * 5})
    assert predict_plain(costs(), [c]) == pytest.approx(5 / 21.0)


def test_every_pair_by_hand():
    """E=1 agrees at tokens 1, 2, 4, 5 of the answer, E=2 everywhere; five tokens to go."""
    c = continuation({1: [True, True, False, True, True], 2: [True] * 5})
    found = by_pair(predict(costs(), [c], 2))
    assert set(found) == {(1, 1), (1, 2), (2, 1), (2, 2)}
    # E=1, d=2: a round at 10 settles 3 tokens, one at 13 the last two. A tenth a position.
    seconds = 6.75 + (6.75 + 0.3)
    assert found[1, 2].tokens_per_s == pytest.approx(5 / seconds)
    assert found[1, 2].speedup == pytest.approx(21.0 / seconds)
    assert found[1, 2].mean_accepted_length == 2.5
    assert found[1, 2].acceptance_rate == 1.0
    # E=1, d=1: rounds at 10 (accepted), 12 (missed at token 3), 13 (accepted).
    seconds = 3 * 5.25 + 0.0 + 0.2 + 0.3
    assert found[1, 1].tokens_per_s == pytest.approx(5 / seconds)
    assert found[1, 1].acceptance_rate == pytest.approx(2 / 3)
    assert found[1, 1].mean_accepted_length == pytest.approx(5 / 3)


def test_the_fastest_comes_first_and_slow_drafts_do_not_pay():
    never = continuation({1: [False] * 6, 2: [False] * 6})
    always = continuation({1: [True] * 6, 2: [True] * 6})
    hopeless = predict(costs(), [never], 2)
    assert [p.speedup for p in hopeless] == sorted((p.speedup for p in hopeless), reverse=True)
    assert hopeless[0].speedup < 1.0
    assert (hopeless[0].exit_layer, hopeless[0].draft_tokens) == (1, 1)
    best = predict(costs(), [always], 2)[0]
    assert best.speedup > 1.0
    assert (best.exit_layer, best.draft_tokens) == (1, 2)


def test_a_draft_that_reaches_beyond_the_answer_is_paid_in_full():
    """One token is left of the answer, room for more: d=2 is drafted, one draft counts."""
    c = continuation({1: [True], 2: [True]})
    found = by_pair(predict(costs(), [c], 2))
    assert found[1, 2].tokens_per_s == pytest.approx(1 / 6.75)
    assert found[1, 2].acceptance_rate == 1.0
    # Without room for a draft the round is a plain step.
    alone = by_pair(predict(costs(), [continuation({1: [True], 2: [True]}, limit=2)], 2))
    assert alone[1, 2].tokens_per_s == pytest.approx(1 / 4)
    assert alone[1, 2].acceptance_rate is None


def test_prompts_are_summed_not_averaged():
    one = continuation({1: [True] * 2, 2: [True] * 2})
    other = continuation({1: [False] * 3, 2: [False] * 3}, prompt_tokens=20)
    found = by_pair(predict(costs(), [one, other], 2))
    seconds = 6.75 + 3 * 7.75  # beyond the last context the cost stays as it is there
    assert found[1, 2].tokens_per_s == pytest.approx(5 / seconds)
