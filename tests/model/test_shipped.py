"""The checkpoint that travels with the package: the file itself, and what it does once it is merged."""

import json

import pytest
from safetensors import safe_open

from layerskip import LayerSkipModel, pull
from layerskip.cli.demo import TASKS
from layerskip.fileio import sha256_of
from layerskip.model.hub import BUILTIN_MODELS, DEFAULT_MODEL, DIFFERENCES, DerivedModel

DERIVED = {name: m for name, m in BUILTIN_MODELS.items() if isinstance(m, DerivedModel)}
MOST_BYTES = 40_000_000


def test_weight_deltas_are_the_files_that_the_package_knows():
    files = {model.difference: model.sha256 for model in DERIVED.values()}
    assert {path.name for path in DIFFERENCES.glob("*.safetensors")} == set(files)
    assert {name: sha256_of([DIFFERENCES / name]) for name in files} == files
    assert sum((DIFFERENCES / name).stat().st_size for name in files) <= MOST_BYTES


@pytest.mark.parametrize("name", DERIVED)
def test_weight_delta_names_its_base_and_has_a_card(name):
    path = DIFFERENCES / DERIVED[name].difference
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["base"] == DERIVED[name].base
    config, settings = (json.loads(metadata[key]) for key in ("config", "generation_config"))
    assert settings["assistant_early_exit"] < config["num_hidden_layers"]
    assert path.with_suffix(".md").read_text(encoding="utf-8").startswith(f"# {name}\n")


@pytest.mark.real
def test_default_model_drafts_well_and_answers_like_plain_decoding():
    assert DEFAULT_MODEL in DERIVED
    model = LayerSkipModel.from_pretrained(pull(DEFAULT_MODEL), dtype="bfloat16")
    assert model.settings.draft_vocabulary
    parse = TASKS[0]
    drafted = accepted = 0
    for text in parse.texts[:2]:
        prompt = parse.prompt(text, model)
        plain = model.generate(prompt, mode="plain", max_new_tokens=parse.max_new_tokens)
        answer = model.generate(
            prompt, mode="self-speculative", max_new_tokens=parse.max_new_tokens
        )
        assert answer.token_ids == plain.token_ids
        assert plain.text.startswith("[IN:")
        drafted, accepted = drafted + answer.drafted, accepted + answer.accepted
    assert accepted > drafted / 2
