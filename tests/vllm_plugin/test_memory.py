"""Drafts share the target's weights and its KV cache."""

import pytest


@pytest.fixture(scope="module")
def engine(start):
    return start({"method": "layerskip"})


@pytest.fixture
def runner(engine):
    return engine.llm_engine.model_executor.driver_worker.worker.model_runner


def test_no_weight_is_in_memory_twice(runner):
    target = runner.model
    assert {id(weight) for weight in runner.drafter.model.parameters()} <= {
        id(weight) for weight in target.parameters()
    }


def test_draft_head_is_rows_of_the_targets_head(start, tiny_with_draft_vocabulary):
    import torch

    engine = start({"method": "layerskip"}, model=str(tiny_with_draft_vocabulary))
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    head, whole = runner.drafter.draft_head, runner.model.lm_head
    assert head.token_ids.tolist() == list(range(1, 512, 2))
    states = torch.randn(3, 128)
    scores = states @ whole.weight.T
    assert torch.equal(head.top_token_ids(states), 1 + 2 * scores[:, 1:512:2].argmax(dim=-1))


def test_target_keeps_all_its_layers(runner):
    assert runner.model.model.end_layer == 6
    assert runner.drafter.model.model.end_layer == 2


def test_layers_of_the_kv_cache_are_the_targets(runner):
    (group,) = runner.kv_cache_config.kv_cache_groups
    assert len(group.layer_names) == 6
    assert runner.drafter._draft_attn_layer_names == {
        f"model.layers.{i}.self_attn.attn" for i in (0, 1)
    }


def test_kv_capacity_is_that_of_a_plain_run(start):
    def capacity(speculative):
        engine = start(speculative, num_gpu_blocks_override=None)
        return engine.llm_engine.vllm_config.cache_config.num_gpu_blocks

    assert capacity({"method": "layerskip"}) == capacity(None)
