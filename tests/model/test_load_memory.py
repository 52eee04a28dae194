"""Loading needs little more memory than the loaded weights, whatever the files' type."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import layerskip

MEASURE = """
import json, sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import torch
import transformers.models.llama.configuration_llama  # what loading imports is not its memory
from layerskip.model import load
load(Path(sys.argv[1]) / "small", dtype=getattr(torch, sys.argv[2]))

def anonymous():  # the process's own memory in bytes; pages of mapped files can be taken back
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        done.wait(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
decoder = load(Path(sys.argv[1]), dtype=getattr(torch, sys.argv[2]), weights=sys.argv[4]).decoder
done.set()
watcher.join()
loaded = decoder.weight_bytes + decoder.embedding.weight.nbytes
print(json.dumps({"ratio": (peak[0] - before) / loaded, "loaded": loaded}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As many layers and as wide a vocabulary, relative to the rest, as a model with 1B weights."""
    path = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    for folder, layers in ((path / "small", 1), (path, 16)):
        config = AutoConfig.for_model("llama", **sizes, num_hidden_layers=layers, vocab_size=32_000)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.to_empty(device="cpu")
        for tensor in model.state_dict().values():
            tensor.zero_()
        model.save_pretrained(folder, max_shard_size="30MB")
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "weights", "above"),
    [
        pytest.param("bfloat16", "16bit", 0.05, marks=pytest.mark.long),
        ("float32", "16bit", 0.05),
        # Less is loaded: one matrix of the vocabulary is more beside it.
        pytest.param("float32", "int8", 0.3, marks=pytest.mark.long),
        ("float32", "int4", 0.5),
    ],
)
def test_peak_is_near_the_loaded_size(folder, dtype, weights, above):
    assert len(list(folder.glob("*.safetensors"))) > 4
    source = str(Path(layerskip.__file__).parents[1])
    command = [sys.executable, "-c", MEASURE, str(folder), dtype, source, weights]
    # What glibc keeps for later differs from run to run; so it gives every tensor back at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    measured = json.loads(done.stdout)
    assert measured["loaded"] > {"16bit": 150e6, "int8": 90e6, "int4": 70e6}[weights]
    assert measured["ratio"] <= 1 + above, measured
