"""Engines of vLLM with a tiny random Llama, eager and in float32: one starts in two seconds."""

import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
VOCAB_SIZE = 512
EXIT_LAYER = 2
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # of a function that is called in workers
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
ENGINE = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "disable_log_stats": False,
    "generation_config": "vllm",
    "num_gpu_blocks_override": 96,
    "seed": 0,
}


def pytest_collection_modifyitems(items):
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # vLLM's own
            if missing:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make test-vllm"))


@pytest.fixture(scope="session")
def engine_options():
    return ENGINE


@dataclass
class Run:
    """Token ids of each prompt's continuations, and vLLM's counters."""

    token_ids: list
    counters: dict
    engine: object


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A Llama whose layers behind exit 2 change little, so that half of its drafts are accepted."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers[EXIT_LAYER:]:
            layer.self_attn.o_proj.weight.mul_(0.12)
            layer.mlp.down_proj.weight.mul_(0.12)
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    defaults = {"assistant_early_exit": EXIT_LAYER, "num_assistant_tokens": 4}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    return folder


@pytest.fixture(scope="session")
def tiny_with_draft_vocabulary(tiny, tmp_path_factory):
    """The same, and drafts are every other token, with two that no model of this vocabulary has."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("draft-vocabulary") / "model")
    file = folder / "generation_config.json"
    token_ids = [*range(1, VOCAB_SIZE, 2), VOCAB_SIZE, 10 * VOCAB_SIZE]
    vocabulary = {"layerskip": {"draft_vocabulary": " ".join(map(str, token_ids))}}
    file.write_text(json.dumps(json.loads(file.read_text()) | vocabulary))
    return folder


@pytest.fixture(scope="session")
def prompts():
    """Eight prompts of 5 to 54 tokens."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(3, VOCAB_SIZE, (5 + 7 * index,), generator=generator).tolist()
        for index in range(8)
    ]


@pytest.fixture(scope="session")
def functions_of_vllm():
    """Those that the plugin replaces on CPU, taken before an engine does so."""
    os.environ.update(ENVIRONMENT)
    from vllm.v1.sample import rejection_sampler

    names = ("expand_batch_to_tokens", "apply_top_k_top_p")
    return {name: getattr(rejection_sampler, name) for name in names}


@pytest.fixture(scope="session")
def start(tiny, functions_of_vllm):
    """Start an engine in this process; `speculative` is its speculative_config."""
    from vllm import LLM

    def start(speculative=None, **options):
        gc.collect()  # the engine before it
        options = {"model": str(tiny)} | ENGINE | options
        return LLM(speculative_config=speculative, **options)

    return start


@pytest.fixture(scope="session")
def run(start):
    """Generate with a new engine."""
    from vllm import SamplingParams

    def run(prompts, sampling, speculative=None, **options):
        engine = start(speculative, **options)
        if isinstance(sampling, dict):
            sampling = SamplingParams(detokenize=False, **sampling)
        else:
            sampling = [SamplingParams(detokenize=False, **each) for each in sampling]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = engine.generate(requests, sampling, use_tqdm=False)
        token_ids = [[list(each.token_ids) for each in output.outputs] for output in outputs]
        return Run(token_ids, counters(engine), engine)

    return run


def counters(engine):
    return {
        metric.name.removeprefix("vllm:"): metric.value
        for metric in engine.get_metrics()
        if hasattr(metric, "value")
    }


@pytest.fixture(scope="session")
def in_a_process(tiny):
    """Run greedy_ids.py: what it writes about each engine, and its log."""

    def in_a_process(engines, prompts, *flags, **environment):
        engines = [{"model": str(tiny)} | ENGINE | options for options in engines]
        done = subprocess.run(
            [sys.executable, HERE / "greedy_ids.py", json.dumps([engines, prompts]), *flags],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | ENVIRONMENT | environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1]), done.stderr + done.stdout

    return in_a_process
