"""What a long draft text brings."""

import pytest
from draft_texts import measured

from layerskip import LayerSkipModel
from layerskip.bench.tasks import load_task
from layerskip.decoding.draft_text import Datastore


def test_every_way_answers_as_plain_decoding_does(folder, tmp_path):
    model = LayerSkipModel.from_pretrained(folder, dtype="float32", compile=False)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\n\nto be\n\nxyz")
    task = load_task(str(prompts))
    answers = [model.generate(s.prompt, mode="plain", max_new_tokens=24) for s in task.samples]
    table, vocab_size = tmp_path / "a.table", model.decoder.architecture.vocab_size
    tokens = [token for answer in answers for token in answer.token_ids]
    Datastore.from_tokens(tokens * 3).save(table, vocab_size)
    ngrams = {"draft_from": "n-gram"}
    ways = {"plain": {"mode": "plain"}, "n-grams": ngrams, "table": {**ngrams, "draft_text": table}}
    found = measured(model, task, 24, ways)
    assert found["samples"] == 3
    assert {way["identical_to_plain"] for way in found["ways"].values()} == {1.0}
    assert found["ways"]["plain"]["speedup"] == pytest.approx(1.0)
    of_table = found["ways"]["table"]
    low, high = of_table["speedup_interval"]
    assert low <= of_table["speedup"] <= high
    assert of_table["tokens_a_round"] > found["ways"]["n-grams"]["tokens_a_round"]
