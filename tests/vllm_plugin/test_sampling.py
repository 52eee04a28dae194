"""Sampled tokens with drafts have vLLM's plain distribution; on CPU that takes a repair."""

from collections import Counter

import pytest

PROMPT = [7, 77, 177, 277]
SAMPLES = 4_800
LEAST_EXPECTED = 10


@pytest.fixture(scope="session")
def sample(run):
    """Count the first three tokens of many continuations."""

    def sample(sampling, speculative=None):
        sampling = {"max_tokens": 6, "ignore_eos": True, "n": SAMPLES // 8} | sampling
        result = run([PROMPT] * 8, sampling, speculative, max_num_seqs=64, max_model_len=64)
        counts = Counter(tuple(ids[:3]) for prompt in result.token_ids for ids in prompt)
        assert counts.total() == SAMPLES
        return counts, result.counters

    return sample


def excess(first, second):
    """Standard deviations by which chi-square of two samples exceeds its mean (Wilson-Hilferty)."""
    kinds = [kind for kind in first if first[kind] + second[kind] >= 2 * LEAST_EXPECTED]
    pairs = [(first[kind], second[kind]) for kind in kinds]
    pairs.append(tuple(SAMPLES - sum(column) for column in zip(*pairs, strict=True)))
    chi_square = sum((a - b) ** 2 / (a + b) for a, b in pairs if a + b)
    spread = 2 / (9 * (len(pairs) - 1))
    return ((chi_square / (len(pairs) - 1)) ** (1 / 3) - 1 + spread) / spread**0.5


@pytest.mark.parametrize("drafts", ["greedy", "probabilistic"])
@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.0, "top_k": 5}],
    ids=str,
)
def test_distribution(sample, sampling, drafts):
    plain, _ = sample(sampling)
    drafted, counters = sample(sampling, {"method": "layerskip", "draft_sample_method": drafts})
    assert counters["spec_decode_num_accepted_tokens"] > 0
    assert excess(plain, drafted) < 4


def test_faults_of_vllm_and_their_repair(functions_of_vllm, monkeypatch):
    import torch
    from vllm.v1.sample import rejection_sampler

    from layerskip.vllm_plugin import cpu_sampling

    values = torch.tensor([0.25, 0.0, 0.75])
    ends = torch.tensor([3, 4, 6], dtype=torch.int32)
    no_rows = torch.empty(0, 8), torch.empty(0, dtype=torch.int32), None
    for name, function in functions_of_vllm.items():
        monkeypatch.setattr(rejection_sampler, name, function)

    broken = rejection_sampler.expand_batch_to_tokens(values, ends, 6, 0, 1).tolist()
    repaired = [0.25, 0.25, 0.25, 1.0, 0.75, 0.75]
    assert broken != repaired, "vLLM has repaired it: remove it from cpu_sampling.py"
    with pytest.raises(RuntimeError, match="Expected reduction dim"):
        rejection_sampler.apply_top_k_top_p(*no_rows)

    assert cpu_sampling.repair(rejection_sampler) == list(functions_of_vllm)
    assert rejection_sampler.expand_batch_to_tokens(values, ends, 6, 0, 1).tolist() == repaired
    assert rejection_sampler.apply_top_k_top_p(*no_rows).shape == (0, 8)
    assert cpu_sampling.repair(rejection_sampler) == []
