"""The model card of a run, and the upload of its result."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from layerskip.model.publish import UploadError
from layerskip.training import TrainConfig, run, train
from layerskip.training.card import model_card

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
OF_A_CARD = {"exit_layer": 4, "num_layers": 30, "steps": 9, "metrics": {}, "can_exit": False}


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the hub; returns the calls."""
    calls = []

    def upload(folder, names, repo_id):
        calls.append(("upload", repo_id, names, sorted(path.name for path in folder.iterdir())))
        return f"https://hub.example/{repo_id}"

    monkeypatch.setattr(run, "create_repository", lambda *a, **k: calls.append(("create", a, k)))
    monkeypatch.setattr(run, "upload", upload)
    return calls


@pytest.mark.parametrize(("rank", "beside"), [(None, "training_args.bin"), (2, "adapter")])
def test_a_result_is_uploaded_with_its_card_and_nothing_else(settings, hub, rank, beside):
    changes = {"eval_rows": 20, "lora_rank": rank, "fixed_exits": [2], "push_to_hub": "me/sums"}
    result = train(TrainConfig.from_mapping(settings | changes))
    assert result.url == "https://hub.example/me/sums"
    (name, *arguments), (_, repo_id, uploaded, present) = hub
    assert (name, arguments) == ("create", [("me/sums",), {"private": False}])
    assert repo_id == "me/sums"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(uploaded)
    kept = {"train.json", "train_log.jsonl", "checkpoint-6", beside}
    assert kept <= set(present)
    assert not kept & set(uploaded)

    card = ModelCard.load(result.output / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert "layerskip" in data["tags"]
    assert "datasets" not in data
    by_name = {r.metric_name: r.metric_value for r in card.data.eval_results}
    accuracy = result.metrics["eval_accuracy_exit_2"]
    assert by_name["token accuracy, 2 layers"] == pytest.approx(accuracy, abs=1e-4)
    assert "token accuracy, 4 layers" in by_name
    assert "# sums\n" in card.text
    assert "20 held-out rows of sums.jsonl" in card.text
    assert ("| `lora_rank` | `2` |" in card.text) == (rank == 2)
    for path in (settings["model"], settings["data"], settings["output"]):
        assert str(Path(path).parent) not in card.content


def test_a_run_that_cannot_be_uploaded_does_not_begin(settings, monkeypatch):
    def refuse(repo_id, **_):
        raise UploadError("no token")

    monkeypatch.setattr(run, "create_repository", refuse)
    monkeypatch.setattr(run, "load_model", lambda config: pytest.fail("training began"))
    with pytest.raises(UploadError, match="no token"):
        train(TrainConfig.from_mapping(settings | {"push_to_hub": "me/sums"}))
    assert not Path(settings["output"]).exists()


def test_a_card_names_what_the_hub_knows():
    config = TrainConfig(model="smollm2-135m", data="openai/gsm8k", output="runs/gsm8k")
    card = ModelCard(model_card(config, **OF_A_CARD))
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == ["openai/gsm8k"]
    assert "# gsm8k\n" in card.text
    assert "its first 4 layers draft what all 30 layers verify" in card.text
    assert "from_pretrained" not in card.text  # transformers cannot draft with it
    scratch = TrainConfig(model="smollm2-135m", data="d", output="o", from_scratch=True)
    assert ModelCard(model_card(scratch, **OF_A_CARD)).data.base_model is None
