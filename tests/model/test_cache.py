"""The KV cache against a list for every row: any order of writes and truncations."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip.model import Architecture, KVCache
from layerskip.model.architecture import Rope

CAPACITY, LAYERS, HEADS, HEAD_DIM = 12, 2, 3, 4
ARCHITECTURE = Architecture(
    family="llama",
    n_layers=LAYERS,
    hidden_size=24,
    n_heads=6,
    n_kv_heads=HEADS,
    head_dim=HEAD_DIM,
    ffn_size=8,
    vocab_size=5,
    norm_eps=1e-5,
    max_context=64,
    sliding_windows=(None,) * LAYERS,
    ropes=(Rope(),) * LAYERS,
)


def new_cache(rows, capacity=CAPACITY):
    return KVCache(
        ARCHITECTURE, batch_size=rows, capacity=capacity, dtype=torch.float32, device="cpu"
    )


@st.composite
def histories(draw):
    """A number of rows, and actions: write n positions, or keep so much of every row."""
    rows = draw(st.integers(1, 3))
    write = st.integers(1, 5).map(lambda n: ("write", n))
    keep = st.lists(st.integers(0, CAPACITY), min_size=rows, max_size=rows)
    return rows, draw(st.lists(write | keep.map(lambda n: ("keep", n)), max_size=12))


@given(histories())
def test_cache_is_a_list_for_every_row(history):
    rows, actions = history
    cache = new_cache(rows)
    model = [[] for _ in range(rows)]  # what each row should hold: [2, heads, head_dim] a position
    for i, (action, argument) in enumerate(actions):
        if action == "keep":
            model = [row[:n] for row, n in zip(model, argument, strict=True)]
            cache.lengths.copy_(torch.tensor([len(row) for row in model]))
            continue
        if max(map(len, model)) + argument > CAPACITY:
            with pytest.raises(ValueError, match=f"holds {CAPACITY} positions"):
                cache.span(argument, 0, LAYERS)
            continue
        span = cache.span(argument, 0, LAYERS)
        new = torch.randint(-99, 99, (rows, argument, 2, HEADS, HEAD_DIM)).float()
        for layer in range(LAYERS):
            keys, values = span.write(layer, new + layer)
        cache.lengths += argument
        for row, positions in enumerate(new):
            model[row].extend(positions)
            expected = torch.stack(model[row], dim=2) + LAYERS - 1
            n = len(model[row])
            assert torch.equal(keys[row, :, :n], expected[0]), i
            assert torch.equal(values[row, :, :n], expected[1]), i
    for row, positions in enumerate(model):
        for layer in range(LAYERS):
            held = cache.slots[layer, :, row, :, : len(positions)]
            if positions:
                assert torch.equal(held, torch.stack(positions, dim=2) + layer)


def test_attention_looks_at_what_there_is_and_not_at_what_there_could_be():
    """Its cost follows the context's length, however large the cache is."""
    for capacity in (64, 4096):
        cache = new_cache(1, capacity)
        cache.lengths += 10
        span = cache.span(1, 0, LAYERS)
        keys, values = span.write(0, torch.zeros(1, 1, 2, HEADS, HEAD_DIM))
        assert keys.shape[2] == values.shape[2] == 11


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    n=st.integers(1, 6),
    window=st.none() | st.integers(1, 9),
    groups=st.integers(1, 3),
)
def test_mask_hides_the_future_and_what_left_the_window(lengths, n, window, groups):
    cache = new_cache(len(lengths))
    cache.lengths.copy_(torch.tensor(lengths))
    span = cache.span(n, 0, LAYERS)
    mask = span.mask(window, torch.float32, groups)
    if mask is None:
        mask = torch.zeros(len(lengths), 1, groups * n, span.end)
    for row, length in enumerate(lengths):
        for group in range(groups):
            for t in range(n):
                position = length + t
                first = 0 if window is None else max(0, position - window + 1)
                seen = (mask[row, 0, group * n + t] == 0).nonzero().flatten().tolist()
                assert seen == list(range(first, position + 1))


@pytest.mark.parametrize("lengths", [(2, 2), (0, 3)], ids=["even", "ragged"])
def test_writing_touches_its_own_layer_and_positions_only(lengths):
    cache = new_cache(2)
    cache.slots.fill_(7.0)
    cache.lengths.copy_(torch.tensor(lengths))
    before, place = cache.slots.clone(), cache.slots.data_ptr()
    keys, values = cache.span(2, 1, LAYERS).write(1, torch.zeros(2, 2, 2, HEADS, HEAD_DIM))
    for row, length in enumerate(lengths):
        before[1, :, row, :, length : length + 2] = 0.0
    assert torch.equal(cache.slots, before)
    # Nothing is copied: what is read lies in the cache itself.
    assert cache.slots.data_ptr() == place
    for part in (keys, values):
        assert part.untyped_storage().data_ptr() == cache.slots.untyped_storage().data_ptr()


@pytest.mark.parametrize("lengths", [(2, 2), (0, 3)], ids=["even", "ragged"])
def test_what_overflows_in_float16_does_not_outlast_a_mask(lengths):
    """A rejected draft's values stay in their slots, with weight 0; times NaN that is NaN."""
    cache = KVCache(
        ARCHITECTURE, batch_size=2, capacity=CAPACITY, dtype=torch.float16, device="cpu"
    )
    cache.lengths.copy_(torch.tensor(lengths))
    states = torch.full((2, 2, 2, HEADS, HEAD_DIM), 3.0)
    states[:, 1, 0, 0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    keys, values = cache.span(2, 1, LAYERS).write(1, states.half())
    assert keys.isfinite().all()
    assert values.isfinite().all()
    assert cache.slots[1].count_nonzero() == states.numel() - 2 * 3
