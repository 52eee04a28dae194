"""Loading by hub id from a server that speaks the hub's protocol, in a process of its own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import gguf_files
import pytest
import torch
from hub_server import HubServer, sibling

import layerskip
from layerskip.model import SourceError, load
from layerskip.model import repository as hub_cache
from layerskip.model.repository import choose
from tiny_models import build, logits_of, reference, token_ids

BROKEN_AT = 10_600_000  # bytes; what arrived before is kept in pieces of 10 MiB
FETCH = """
import sys
from layerskip.model import repository
from layerskip.model.hub import resolve
repository._TIMEOUT_S = 2.0
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
        timeout=100,
    )
    assert "%|" not in done.stderr  # no progress bar, since it is no terminal
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


# --- GGUF files


@pytest.fixture(scope="module")
def gguf_repository(tmp_path_factory):
    """A repository of GGUF files: three quantizations, one in a folder and in two parts."""
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "Q8_0").mkdir()
    model = build("llama2", head_dim=32)
    gguf_files.write(folder / "tiny-q4_k_m.gguf", model)
    gguf_files.write(folder / "tiny.F16.gguf", model, kind=gguf.GGMLQuantizationType.F16)
    (folder / "mmproj-tiny-Q4_K_M.gguf").write_text("never fetch me")
    (folder / "README.md").write_text("never fetch me")
    gguf_files.write(folder / "Q8_0" / "tiny-Q8_0.gguf", model, parts=2)
    return folder


def test_a_quantization_chooses_the_gguf_file(gguf_repository, tmp_path):
    with HubServer({"owner/tiny": gguf_repository}) as hub:
        names = (
            "owner/tiny",
            "owner/tiny:Q4_K_M",
            "owner/tiny:f16",
            "owner/tiny:Q8_0",
            "owner/tiny:Q2_K",
        )
        default, q4, f16, parts, none = fetch(hub, tmp_path, *names)
        assert default == q4
        assert [Path(path).name for path in (q4, f16)] == ["tiny-q4_k_m.gguf", "tiny.F16.gguf"]
        assert parts.endswith("Q8_0/tiny-Q8_0-00001-of-00002.gguf")
        assert none == (
            "refused: owner/tiny has no GGUF file of Q2_K; name one of owner/tiny:Q8_0,"
            " owner/tiny:q4_k_m, owner/tiny:F16"
        )
        assert hub.fetched() == sorted(
            [Path(q4).name, Path(f16).name, *(f"tiny-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2))]
        )
    whole, split = (load(Path(path), dtype=torch.float32).decoder for path in (q4, parts))
    tokens = token_ids("llama2", 1, 9)
    torch.testing.assert_close(logits_of(whole, tokens), logits_of(split, tokens))


def test_a_download_that_broke_goes_on_in_the_next_process(repository, tmp_path):
    """The first process is stopped in the middle of a file."""
    with HubServer({"owner/tiny": repository}) as hub:
        (whole,) = fetch(hub, tmp_path / "one", "owner/tiny")
        blob = (Path(whole) / "model.safetensors").resolve()
        content = blob.read_bytes()
        blob.rename(blob.with_name(f"{blob.name}.incomplete"))
        os.truncate(f"{blob}.incomplete", 1_000_003)
        (Path(whole) / "model.safetensors").unlink()
        hub.requests.clear()
        assert fetch(hub, tmp_path / "one", "owner/tiny") == [whole]
        assert [part for *_, part in hub.requests if part] == ["bytes=1000003-"]
        assert blob.read_bytes() == content
        damaged = bytes(1_000_003)
        blob.unlink()
        (Path(whole) / "model.safetensors").unlink()
        blob.with_name(f"{blob.name}.incomplete").write_bytes(damaged)
        (refused,) = fetch(hub, tmp_path / "one", "owner/tiny")
        assert refused == "refused: model.safetensors of owner/tiny arrived damaged; try again"
        assert fetch(hub, tmp_path / "one", "owner/tiny") == [whole]
        assert blob.read_bytes() == content


def test_a_hub_that_cannot_be_reached_is_refused_at_once(tmp_path):
    """Nobody listens there, or nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        closed = SimpleNamespace(endpoint="http://127.0.0.1:9")
        mute = SimpleNamespace(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        for hub in (closed, mute):
            (refused,) = fetch(hub, tmp_path, "owner/tiny")
            assert refused.startswith("refused: owner/tiny cannot be fetched from the hub: ")


def test_nothing_of_the_hub_leaves_its_cache(gguf_repository, tmp_path):
    bad_hash = {"lfs": {"sha256": "../../evil", "size": 1, "pointerSize": 1}}
    lies = {
        "evil/commit": {"sha": "../../../../evil"},
        "evil/parent": {"siblings": [sibling("../../../evil.gguf", b"x")]},
        "evil/root": {"siblings": [sibling("/tmp/evil.gguf", b"x")]},
        "evil/title": {"siblings": [sibling("evil\x1b]0;title\x07.gguf", b"x")]},
        "evil/hash": {"siblings": [sibling("evil.gguf", b"x") | bad_hash]},
    }
    with HubServer(dict.fromkeys(lies, gguf_repository), lies=lies) as hub:
        answers = fetch(hub, tmp_path / "a" / "b", *lies)
        assert len(answers) == len(lies)
        for answer in answers:
            assert answer.startswith("refused: ")
            assert answer.isprintable()
        assert not hub.fetched()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("evil")]


def test_names_of_quantizations():
    """The ends of published names, from several publishers."""
    for stem, name in (
        ("Qwen3-0.6B-Q8_0", "Q8_0"),
        ("qwen2.5-coder-0.5b-instruct-q4_k_m", "q4_k_m"),
        ("gemma-3-270m.Q4_K_M", "Q4_K_M"),
        ("Qwen3-4B-UD-Q4_K_XL", "UD-Q4_K_XL"),
        ("BF16/Qwen3-4B-BF16", "BF16"),
        ("model-IQ4_NL", "IQ4_NL"),
        ("model-fp16", "fp16"),
        ("gemma-3-270m", "gemma-3-270m"),
    ):
        assert hub_cache._quantization(stem) == name
        assert choose("o/n", [f"{stem}.gguf"], name) == [f"{stem}.gguf"]
    files = ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"]
    with pytest.raises(SourceError, match="is the end of several files; name one of"):
        choose("o/n", files, "Q4_K_M")
    assert choose("o/n", files, "b-Q4_K_M") == ["b-Q4_K_M.gguf"]


def test_the_cache_is_listed_and_emptied(repository, gguf_repository, tmp_path, monkeypatch):
    with HubServer({"owner/tiny": repository, "owner/files": gguf_repository}) as hub:
        names = ["owner/tiny", "owner/files:Q8_0", "owner/files:F16"]
        paths = [Path(path) for path in fetch(hub, tmp_path, *names)]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub" / "hub"))
    other = tmp_path / "hub" / "hub" / "models--owner--broken" / "blobs"
    other.mkdir(parents=True)
    (other / f"{'0' * 64}.incomplete").write_bytes(b"part")
    listed = {model.name: model for model in hub_cache.cached()}
    assert sorted(listed) == sorted([*names, "owner/broken"])
    assert listed["owner/broken"].n_bytes == 4
    assert [name for name, model in listed.items() if not model.is_complete] == ["owner/broken"]
    assert listed["owner/tiny"].n_bytes > 11_000_000
    assert listed["owner/files:Q8_0"].path == paths[1]

    assert hub_cache.remove("owner/files:q8_0") == listed["owner/files:Q8_0"].n_bytes
    assert paths[2].is_file()
    assert not paths[1].exists()
    assert hub_cache.remove("owner/files:F16") == listed["owner/files:F16"].n_bytes
    for name in ("owner/tiny", "owner/broken"):
        assert hub_cache.remove(name) >= listed[name].n_bytes
    assert hub_cache.cached() == []
    assert not list((tmp_path / "hub" / "hub").glob("models--*"))
    for name in ("owner/tiny", "owner/files:F16", "../hub", "gpt-5"):
        with pytest.raises(SourceError, match="is not in the cache; layerskip list shows what is"):
            hub_cache.remove(name)


FETCH_ADAPTER = FETCH.replace("resolve", "resolve_adapter")


def test_an_exit_adapter_is_fetched_alone(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in ("exit_adapter.safetensors", "README.md", "model.safetensors"):
        (repository / name).write_text(name)
    monkeypatch.setitem(globals(), "FETCH", FETCH_ADAPTER)
    with HubServer({"some/adapter": repository}) as hub:
        folder, refused = fetch(hub, tmp_path, "some/adapter", "nowhere")
    assert [file.name for file in Path(folder).iterdir()] == ["exit_adapter.safetensors"]
    assert refused.startswith("refused: there is no exit adapter nowhere")
