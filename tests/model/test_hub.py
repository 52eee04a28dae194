"""Loading by hub id from a server that speaks the hub's protocol, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

import layerskip
from tiny_models import reference

BROKEN_AT = 10_600_000  # bytes; what arrived before is kept in pieces of 10 MiB
FETCH = """
import sys
from layerskip.model.hub import resolve
for name in sys.argv[1:]:
    try:
        print(resolve(name))
    except ValueError as error:
        print("refused:", error)
"""


def fetch(hub, folder, *names, **environment):
    """Resolve some names, one result a line."""
    done = subprocess.run(
        [sys.executable, "-c", FETCH, *names],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "TRANSFORMERS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(folder / "hub"),
            "PYTHONPATH": str(Path(layerskip.__file__).parents[1]),
            **environment,
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Fetching" not in done.stderr  # which is no terminal
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A checkpoint among files that are not needed or not wanted."""
    folder = tmp_path_factory.mktemp("repository")
    reference("llama2").save_pretrained(folder)
    with (folder / "model.safetensors").open("ab") as file:
        file.truncate(11_000_000)  # large enough to break; only fetched here, and never read
    (folder / "original").mkdir()
    for name in ("pytorch_model.bin", "modeling_tiny.py", "consolidated.safetensors"):
        (folder / name).write_text("never fetch me")
    (folder / "original" / "params.json").write_text("{}")
    for name in ("adapter/adapter_config.json", "additional_chat_templates/tool_use.jinja"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def unusable(repository, tmp_path):
    """Repositories whose config says that their weights are of no use."""
    folders = {}
    for name, change in (
        ("owner/unknown", {"model_type": "mamba"}),
        ("owner/quantized", {"quantization_config": {"quant_method": "gptq"}}),
    ):
        folders[name] = tmp_path / name
        folders[name].mkdir(parents=True)
        config = json.loads((repository / "config.json").read_text()) | change
        (folders[name] / "config.json").write_text(json.dumps(config))
        (folders[name] / "gigabytes.safetensors").write_text("never fetch me")
    return folders


def test_repository_is_fetched_over_a_connection_that_breaks(repository, unusable, tmp_path):
    repositories = {"owner/tiny": repository, "owner/gated": repository, **unusable}
    breaks = {"model.safetensors": BROKEN_AT}
    with HubServer(repositories, gated=["owner/gated"], breaks=breaks) as hub:
        names = ("owner/tiny", "owner/gated", "owner/none", *unusable)
        fetched, gated, missing, unknown, quantized = fetch(hub, tmp_path, *names)
        for name in ("config.json", "generation_config.json", "model.safetensors"):
            assert (Path(fetched) / name).read_bytes() == (repository / name).read_bytes()
        # Nothing else, no pickle and no code, and no weights of what cannot be used.
        assert hub.fetched() == sorted(
            ["config.json", "generation_config.json", "model.safetensors", "tool_use.jinja"]
        )
        assert (Path(fetched) / "additional_chat_templates" / "tool_use.jinja").is_file()
        assert f"bytes={10 * 2**20}-" in [wanted for *_, wanted in hub.requests]  # it resumed
        assert gated.startswith("refused: owner/gated cannot be fetched from the hub: ")
        assert "Access to model owner/gated is restricted" in gated
        assert missing.startswith("refused: owner/none cannot be fetched from the hub: ")
        assert "Not Found" in missing
        assert unknown.startswith("refused: the architecture 'mamba' is not supported")
        assert quantized == "refused: weights quantized by 'gptq' are not supported"

        before = len(hub.requests)
        again, other = fetch(hub, tmp_path, "owner/tiny", "owner/other", HF_HUB_OFFLINE="1")
        assert again == fetched
        assert "offline" in other.lower()
        assert len(hub.requests) == before
