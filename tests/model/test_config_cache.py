"""The configuration with transformers' defaults filled in is kept, and never stands in the way."""

import json

import pytest
import transformers

import tiny_checkpoint
from layerskip.model import checkpoint
from layerskip.model.checkpoint import open_files


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "configs"


@pytest.fixture
def folder(cache, tmp_path):
    return tiny_checkpoint.save(tmp_path / "model")


def test_the_second_time_transformers_is_not_asked(folder, cache, monkeypatch):
    first = open_files(folder)
    assert first.config["model_type"] == "llama"
    assert len(list(cache.iterdir())) == 1

    def refused(*args, **kwargs):
        raise AssertionError("transformers was asked")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refused)
    second = open_files(folder)
    assert (second.config, second.architecture) == (first.config, first.architecture)


def test_another_configuration_is_another_entry(folder, cache):
    before = open_files(folder).architecture
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))
    after = open_files(folder).architecture
    assert (before.norm_eps, after.norm_eps) != (0.5, 0.5)
    assert after.norm_eps == 0.5
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_entry_is_made_again(folder, cache, content):
    whole = open_files(folder)
    (entry,) = cache.iterdir()
    entry.write_text(content)
    assert open_files(folder).config == whole.config
    assert json.loads(entry.read_text()) == whole.config


def test_a_cache_that_cannot_be_written_is_done_without(folder, cache):
    cache.parent.write_text("a file where the folder should be")
    assert open_files(folder).architecture.n_layers > 0
