"""Built-in models that are a built-in base and a weight delta: pulled, found, interrupted, refused."""

import hashlib
import subprocess
from types import SimpleNamespace

import pytest
import torch

import weight_deltas
from layerskip import LayerSkipModel, SourceError, cli, paths, pull
from layerskip.model import hub as merge
from layerskip.model import hub as source
from layerskip.model import resolve, tokenizer
from layerskip.model.weights import GgufFile
from layerskip.training.loading import pretrained, pretrained_weights

BASE, NAME = "tiny", "tiny-trained"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base folder as `pull` leaves it, and a weight delta to it."""
    folder = tmp_path_factory.mktemp("made")
    base = folder / BASE
    base.mkdir()
    weight_deltas.gguf_base(base / "model.gguf", folder / "plain")
    tokenizer.load(base, GgufFile(base / "model.gguf")).save_pretrained(str(base))
    (base / "generation_config.json").write_text("{}")
    weight_deltas.trained(folder / "plain", folder / "trained")
    file = folder / "x.safetensors"
    weight_deltas.write(file, folder / "plain", folder / "trained")
    return base, file


@pytest.fixture
def cache(made, tmp_path, monkeypatch):
    """A cache with the base in it, and a derived model that is known."""
    base, file = made
    monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / BASE).symlink_to(base)
    wheel = dict.fromkeys(("wheel_sha256", "member"), "")
    wheel["member_sha256"] = hashlib.sha256((base / "model.gguf").read_bytes()).hexdigest()
    monkeypatch.setitem(
        source.BUILTIN_MODELS, BASE, source.BuiltinModel(requirement="tiny==1", **wheel)
    )
    register(monkeypatch, file)
    return tmp_path / "cache"


def register(monkeypatch, file, sha256=None):
    sha256 = sha256 or hashlib.sha256(file.read_bytes()).hexdigest()
    model = source.DerivedModel(base=BASE, difference=str(file), sha256=sha256)
    monkeypatch.setitem(source.BUILTIN_MODELS, NAME, model)


def left_in(cache):
    return sorted(path.name.split("-")[0] for path in cache.iterdir())


def test_pulled_model_is_a_checkpoint(cache):
    lines = []
    assert not source.is_pulled(NAME)
    folder = pull(NAME, report=lines.append)
    assert source.is_pulled(NAME)
    assert folder.parent == cache
    assert left_in(cache) == [BASE, BASE]  # tiny, and tiny-trained-...
    assert lines
    model = LayerSkipModel.from_pretrained(NAME, dtype="float32")
    assert (model.settings.exit_layer, model.settings.draft_tokens) == (2, 3)
    plain = model.generate("a  7", mode="plain", max_new_tokens=8)
    assert model.generate("a  7", mode="auto", max_new_tokens=8).token_ids == plain.token_ids


def test_what_an_older_merge_wrote_is_made_again(cache, monkeypatch):
    pull(NAME)
    monkeypatch.setattr(source, "_MERGE_VERSION", source._MERGE_VERSION + 1)
    assert not source.is_pulled(NAME)


def test_second_pull_does_no_work(cache, monkeypatch):
    first = pull(NAME)
    monkeypatch.delattr(source, "_derive")
    lines = []
    assert pull(NAME, report=lines.append) == first == resolve(NAME)
    assert not lines


def test_another_delta_of_the_name_is_another_checkpoint(cache, made, monkeypatch, tmp_path):
    """A newer package may bring a better one; what an older one has made must not pass for it."""
    first = pull(NAME)
    plain = made[0].parent / "plain"
    weight_deltas.write(tmp_path / "y.safetensors", plain, plain)
    register(monkeypatch, tmp_path / "y.safetensors")
    assert not source.is_pulled(NAME)
    assert pull(NAME) != first


def test_the_base_is_fetched_first(cache, monkeypatch):
    (cache / BASE).unlink()
    calls = []

    def run(command, **options):
        calls.append(command)
        return SimpleNamespace(returncode=1, stderr="ERROR: no network", stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SourceError, match="could not fetch tiny==1: ERROR: no network"):
        pull(NAME)
    assert calls[0][-1] == "tiny==1"
    assert left_in(cache) == []


@pytest.mark.parametrize(
    "owner",
    [
        pytest.param((source, "_check"), id="check"),
        pytest.param((merge, "save_file"), id="weights"),
        pytest.param((tokenizer, "write"), id="tokenizer"),
        pytest.param((source, "_move_into_place"), id="moving into place"),
    ],
)
@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError("disk full")], ids=["Ctrl-C", "disk"])
def test_interruption_leaves_nothing_behind(cache, monkeypatch, owner, fault):
    def interrupted(*args, **options):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(*owner, interrupted)
        with pytest.raises(KeyboardInterrupt if fault is KeyboardInterrupt else SourceError):
            pull(NAME)
    assert left_in(cache) == [BASE]
    assert pull(NAME).is_dir()


def test_wrong_hash_is_refused(cache, made, monkeypatch):
    register(monkeypatch, made[1], sha256="0" * 64)
    with pytest.raises(
        SourceError, match=r"x\.safetensors has the sha256 .*install layerskip again"
    ):
        pull(NAME)
    assert left_in(cache) == [BASE]


def test_a_damaged_base_is_to_be_removed(cache, made):
    (cache / BASE).unlink()
    (cache / BASE).mkdir()
    damaged = bytearray((made[0] / "model.gguf").read_bytes())
    damaged[-1] ^= 1
    (cache / BASE / "model.gguf").write_bytes(damaged)
    for name in source.FILES_BESIDE:
        (cache / BASE / name).touch()
    with pytest.raises(SourceError, match=rf"model\.gguf has the sha256 .*remove .*{BASE} and try"):
        pull(NAME)
    assert left_in(cache) == [BASE]


def test_missing_file_is_named(cache, monkeypatch, tmp_path):
    register(monkeypatch, tmp_path / "none.safetensors", sha256="0" * 64)
    with pytest.raises(SourceError, match=r"none\.safetensors is missing; install layerskip again"):
        pull(NAME)


def test_a_run_may_begin_with_it(cache):
    folder, arguments = pretrained(NAME)
    assert folder == str(pull(NAME))
    assert arguments == {}
    assert pretrained_weights(NAME) == (folder, {})
    assert pretrained(BASE) == (str(pull(BASE)), {"gguf_file": "model.gguf"})


def test_commands_take_its_name(cache, capsys, tmp_path):
    arguments = ["--model", NAME, "--prompt", "a  7", "--max-new-tokens", "4", "--dtype", "float32"]
    assert cli.run(["generate", *arguments]) == 0
    assert f"{NAME}: adding what training changed to {BASE} ..." in capsys.readouterr().err
    assert cli.run(["export", "--model", NAME, "--to", "hf", str(tmp_path / "out")]) == 0
    assert torch.equal(
        *(
            weight_deltas.weights(folder)["model.norm.weight"]
            for folder in (tmp_path / "out", pull(NAME))
        )
    )
