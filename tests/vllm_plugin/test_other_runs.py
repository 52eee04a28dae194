"""Runs without the method are the same whether the plugin is there or not."""

from importlib.metadata import entry_points


def engines(tiny):
    draft = {"method": "draft_model", "model": str(tiny), "num_speculative_tokens": 3}
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    # vLLM on CPU starts no other engine in a process after one with ngram.
    return [{"speculative_config": speculative} for speculative in (None, draft, ngram)]


def test_entry_point():
    (plugin,) = entry_points(group="vllm.general_plugins", name="layerskip")
    assert plugin.value == "layerskip.vllm_plugin:register"


def test_plain_ngram_and_draft_model_are_not_changed(in_a_process, tiny, prompts):
    present, _ = in_a_process(engines(tiny), prompts)
    absent, _ = in_a_process(engines(tiny), prompts, VLLM_PLUGINS="none")
    assert present == absent
    assert [each["proposer"] for each in present] == [
        "NoneType",
        "DraftModelProposer",
        "NgramProposer",
    ]


def test_plain_run_after_one_with_the_method(in_a_process, tiny, prompts):
    layerskip = {"speculative_config": {"method": "layerskip"}}
    results, _ = in_a_process([layerskip, *engines(tiny)], prompts)
    assert [each["proposer"] for each in results] == [
        "LayerSkipProposer",
        "NoneType",
        "DraftModelProposer",
        "NgramProposer",
    ]
    assert all(each["token_ids"] == results[0]["token_ids"] for each in results)


def test_broken_plugin_does_not_keep_vllm_from_starting(in_a_process, prompts):
    results, log = in_a_process([{}], prompts, "--break-plugin")
    assert len(results[0]["token_ids"]) == len(prompts)
    assert "layerskip: plugin not loaded, vLLM runs without it: ModuleNotFoundError" in log


def test_registering_twice_changes_nothing_more(start):
    from vllm.engine.arg_utils import EngineArgs

    from layerskip.vllm_plugin import register

    start({"method": "layerskip"})
    method = EngineArgs.create_speculative_config
    register()
    assert EngineArgs.create_speculative_config is method
