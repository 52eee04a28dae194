"""The trained model and the exit adapter that are parts of the package."""

import json

import pytest
from huggingface_hub.repocard import metadata_load

from layerskip import LayerSkipModel, pull
from layerskip.cli.demo import SCENES
from layerskip.fileio import sha256_of
from layerskip.model.hub import (
    BUILTIN_MODELS,
    DEFAULT_MODEL,
    PACKAGED,
    TRAINED_MODEL,
    PackagedModel,
    packaged_adapter,
)

MODELS = {name: m for name, m in BUILTIN_MODELS.items() if isinstance(m, PackagedModel)}
MOST_BYTES = 80_000_000


def test_packaged_models_are_the_files_that_the_package_knows():
    assert TRAINED_MODEL in MODELS
    assert {path.name for path in PACKAGED.iterdir() if path.is_dir()} == set(MODELS)
    for name, model in MODELS.items():
        file = PACKAGED / name / "model.gguf"
        assert sha256_of([file]) == model.sha256
        assert file.stat().st_size <= MOST_BYTES
        assert model.base in BUILTIN_MODELS


def test_packaged_models_have_settings_and_a_card():
    for name in MODELS:
        settings = json.loads((PACKAGED / name / "generation_config.json").read_text())
        assert settings["assistant_early_exit"] > 0
        assert settings["layerskip"]["prompt_form"]
        assert "draft_text" not in settings["layerskip"]  # no answers from training
        card = metadata_load(PACKAGED / name / "README.md")
        assert {"base_model", "datasets", "license", "tags", "metrics"} <= card.keys()


@pytest.mark.real
def test_trained_model_drafts_well_and_answers_like_plain_decoding():
    model = LayerSkipModel.from_pretrained(pull(TRAINED_MODEL))
    commands = SCENES[0]
    drafted = accepted = 0
    for text in commands.texts[:2]:
        prompt = commands.prompt(text)
        plain = model.generate(prompt, mode="plain", max_new_tokens=commands.max_new_tokens)
        answer = model.generate(
            prompt, mode="self-speculative", max_new_tokens=commands.max_new_tokens
        )
        assert answer.token_ids == plain.token_ids
        assert plain.text.startswith("[IN:")
        drafted, accepted = drafted + answer.drafted, accepted + answer.accepted
    assert accepted > drafted / 2


def test_packaged_adapter_has_a_card():
    adapter = packaged_adapter(DEFAULT_MODEL)
    assert adapter is not None
    card = metadata_load(adapter.with_suffix(".md"))
    assert card["base_model_relation"] == "adapter"


@pytest.mark.real
def test_packaged_adapter_drafts_for_the_default_model():
    model = LayerSkipModel.from_pretrained(DEFAULT_MODEL)
    prompt = [{"role": "user", "content": "What is photosynthesis?"}]
    options = {"max_new_tokens": 48}
    plain, answer = (model.generate(prompt, mode=mode, **options) for mode in ("plain", "auto"))
    assert answer.token_ids == plain.token_ids
    alone = model.generate(
        prompt, draft_from="exit-adapter", adaptive=False, draft_tokens=2, **options
    )
    assert alone.token_ids == plain.token_ids
    assert alone.accepted > alone.drafted / 4
