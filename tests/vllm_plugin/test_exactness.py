"""Greedy token ids with drafts are vLLM's plain ones, in float32."""

import pytest

LAYERSKIP = {"method": "layerskip"}
GREEDY = {"temperature": 0, "max_tokens": 32}
SHARED_PREFIX = list(range(100, 170))  # no multiple of the block size


def accepted(run):
    return run.counters["spec_decode_num_accepted_tokens"]


@pytest.fixture(scope="module")
def plain(run, prompts):
    return run(prompts, GREEDY).token_ids


@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_batches(run, prompts, plain, batch_size):
    drafted = run(prompts, GREEDY, LAYERSKIP, max_num_seqs=batch_size)
    assert drafted.token_ids == plain
    assert accepted(drafted) > 0


def test_settings_default_to_the_checkpoint(run, prompts, plain):
    defaults = run(prompts, GREEDY, LAYERSKIP)
    given = run(prompts, GREEDY, LAYERSKIP | {"exit_layer": 2, "num_speculative_tokens": 4})
    other = run(prompts, GREEDY, LAYERSKIP | {"exit-layer": 5, "num_speculative_tokens": 3})
    assert defaults.token_ids == given.token_ids == other.token_ids == plain
    assert defaults.counters == given.counters != other.counters
    assert accepted(other) > accepted(given)


def test_chunks_of_prompts_small_blocks_and_prefixes_in_the_cache(run, prompts):
    prompts = [SHARED_PREFIX * (1 + index % 2) + prompt for index, prompt in enumerate(prompts)]
    sampling = [{"temperature": 0, "max_tokens": 8 + 9 * index} for index in range(8)]
    options = {"block_size": 32, "max_num_batched_tokens": 64, "max_num_seqs": 5}
    plain = run(prompts * 2, sampling * 2, **options)
    drafted = run(prompts * 2, sampling * 2, LAYERSKIP, **options)
    assert drafted.token_ids == plain.token_ids
    assert drafted.counters["prefix_cache_hits"] > 0
    assert accepted(drafted) > 0


def test_preemption(run, prompts):
    sampling = {"temperature": 0, "max_tokens": 100, "ignore_eos": True}
    options = {"block_size": 32, "num_gpu_blocks_override": 24}
    plain = run(prompts, sampling, **options)
    drafted = run(prompts, sampling, LAYERSKIP, **options)
    assert drafted.token_ids == plain.token_ids
    assert drafted.counters["num_preemptions"] > 0
    assert accepted(drafted) > 0


def test_stop_tokens_inside_a_draft(run, prompts, plain):
    stops = [ids[0][4 + index] for index, ids in enumerate(plain)]
    sampling = [GREEDY | {"stop_token_ids": [stop]} for stop in stops]
    drafted = run(prompts, sampling, LAYERSKIP).token_ids
    assert drafted == [
        [ids[0][: ids[0].index(stop) + 1]] for ids, stop in zip(plain, stops, strict=True)
    ]


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_fewer_tokens_than_a_draft(run, prompts, plain, max_tokens):
    drafted = run(prompts, GREEDY | {"max_tokens": max_tokens}, LAYERSKIP)
    assert drafted.token_ids == [[ids[0][:max_tokens]] for ids in plain]


def test_up_to_the_longest_sequence(run, prompts):
    sampling = {"temperature": 0, "max_tokens": None, "ignore_eos": True}
    plain = run(prompts, sampling, max_model_len=80)
    drafted = run(prompts, sampling, LAYERSKIP, max_model_len=80)
    assert drafted.token_ids == plain.token_ids
    assert [len(ids[0]) for ids in plain.token_ids] == [80 - len(prompt) for prompt in prompts]


def test_draft_length_by_batch_size(run, prompts, plain, monkeypatch):
    from layerskip.vllm_plugin.proposer import LayerSkipProposer

    propose = LayerSkipProposer.propose
    shapes = []

    def recorded(self, *args, **kwargs):
        drafts = propose(self, *args, **kwargs)
        shapes.append(tuple(drafts.shape))
        return drafts

    monkeypatch.setattr(LayerSkipProposer, "propose", recorded)
    table = {"num_speculative_tokens_per_batch_size": [[1, 2, 4], [3, 5, 1], [6, 8, 0]]}
    sampling = [GREEDY | {"max_tokens": 8 + 3 * index} for index in range(8)]
    drafted = run(prompts, sampling, LAYERSKIP | table)
    assert drafted.token_ids == [[ids[0][: 8 + 3 * i]] for i, ids in enumerate(plain)]
    assert accepted(drafted) > 0
    lengths = {1: 4, 2: 4, 3: 1, 4: 1, 5: 1, 6: 0, 7: 0, 8: 0}
    assert {length for _, length in shapes} == {0, 1, 4}
    assert all(length == lengths[batch_size] for batch_size, length in shapes)


def test_no_drafts_at_large_batches(run, prompts):
    table = {"num_speculative_tokens_per_batch_size": [[1, 4, 4], [5, 8, 0]]}
    sampling = GREEDY | {"ignore_eos": True}  # all end at once
    drafted = run(prompts, sampling, LAYERSKIP | table)
    assert drafted.token_ids == run(prompts, sampling).token_ids
    assert drafted.counters["spec_decode_num_draft_tokens"] == 0


def test_draft_vocabulary(run, prompts, plain, tiny_with_draft_vocabulary):
    model = {"model": str(tiny_with_draft_vocabulary)}
    listed = run(prompts, GREEDY, LAYERSKIP, **model)
    fewer = run(prompts, GREEDY, LAYERSKIP | {"draft_vocab_size": 32}, **model)
    whole = run(prompts, GREEDY, LAYERSKIP | {"draft_vocab_size": 0}, **model)
    assert listed.token_ids == fewer.token_ids == whole.token_ids == plain
    assert 0 < accepted(fewer) < accepted(listed) < accepted(whole)
    assert accepted(whole) == accepted(run(prompts, GREEDY, LAYERSKIP))


def test_tensor_parallel(in_a_process, prompts, plain, tiny_with_draft_vocabulary):
    options = {"speculative_config": LAYERSKIP, "model": str(tiny_with_draft_vocabulary)}
    (single,), _ = in_a_process([options], prompts)
    (parallel,), _ = in_a_process(
        [options | {"tensor_parallel_size": 2}], prompts, VLLM_ENABLE_V1_MULTIPROCESSING="1"
    )
    assert single == parallel
    assert parallel["proposer"] == "LayerSkipProposer"
    assert parallel["token_ids"] == [ids[0][:24] for ids in plain]
