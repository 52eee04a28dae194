"""Costs on a decoder whose parts take written times: the clock is scripted, no time is asserted."""

import random

import numpy as np
import pytest

from layerskip.tune import costs as costs_module
from layerskip.tune.costs import measure_costs
from timed import TimedDecoder

LAYER, ROW, HEAD = 8.0, 0.25, 2.0


@pytest.fixture
def measured(monkeypatch):
    decoder = TimedDecoder(
        range(40, 60), layer=LAYER, row=ROW, context=0.001, head=HEAD, max_context=400
    )
    decoder.keep_time(monkeypatch)
    return measure_costs(
        decoder, [5, 6], contexts=[100, 100, 200], exits=[1, 2, 3], max_draft_tokens=8, sweeps=2
    )


def test_every_part_is_found(measured):
    assert measured.contexts == [100, 200]
    assert measured.head_s.tolist() == [HEAD] * 2
    for c, context in enumerate(measured.contexts):
        layer = LAYER + 0.001 * context
        near = 0.001 * 4 * 8 * 3  # contexts grow by a few tokens while they are timed
        assert measured.plain_s[c] == pytest.approx(4 * layer + HEAD, abs=near)
        for x, e in enumerate([1, 2, 3]):
            assert measured.first_draft_s[c, x] == pytest.approx(2 * e * layer + HEAD, abs=0.01)
            assert measured.draft_step_s[c, x] == pytest.approx(e * layer + HEAD, abs=0.02)
            rows = [(4 - e) * (layer + ROW * (n - 1)) + HEAD for n in range(1, 10)]
            np.testing.assert_allclose(measured.verify_s[c, x], rows, atol=0.01)


def test_a_round_is_its_parts_and_nothing_else_costs(measured):
    """The step loop of the scripted decoder does nothing beyond a draft and a verification."""
    assert np.abs(measured.round_overhead_s).max() < 0.5
    one = measured.round_s(2, 4)
    layer = LAYER + 0.001 * 100
    expected = 5 * 2 * layer + 4 * HEAD + 2 * (layer + 4 * ROW) + HEAD
    assert one[0] == pytest.approx(expected, abs=0.5)


def test_a_context_that_is_too_short_is_refused():
    decoder = TimedDecoder(range(40, 60), max_context=80)
    with pytest.raises(ValueError, match="context holds 80 tokens"):
        measure_costs(decoder, [5], contexts=[8], exits=[1], max_draft_tokens=16)


def test_contexts_are_kept_inside_the_models_own():
    decoder = TimedDecoder(range(40, 60), max_context=120)
    seen = []
    found = measure_costs(
        decoder,
        [5],
        contexts=[10, 120],
        exits=[1, 3],
        max_draft_tokens=2,
        sweeps=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert found.contexts[0] == 10
    assert 10 < found.contexts[1] < 120
    total = seen[-1][1]
    assert seen == [(done, total) for done in range(1, total + 1)]
    assert total % 4 == 0 < total // 4  # two contexts, a warm-up and a sweep
    assert isinstance(found.to_dict()["verify_s"][0][0][0], float)


def test_the_cache_is_left_as_deep_as_it_was():
    decoder = TimedDecoder(range(40, 60), max_context=400)
    workbench = costs_module._Workbench(decoder, [5] * 20, [1, 2], 4, 80)
    before = workbench.committed.clone()
    assert len(list(workbench.sweep(random.Random(0)))) == len(workbench.works)
    assert workbench.committed.equal(before)
    assert workbench.cache.lengths.equal(before)
