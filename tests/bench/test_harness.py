"""Our model in lm-evaluation-harness against the harness's own on the same checkpoint, in float32."""

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import tiny_checkpoint
import tiny_tasks
from layerskip import LayerSkipModel
from layerskip.bench.bench import Row, rows_of
from layerskip.bench.harness import (
    HarnessModel,
    SharedScores,
    evaluate_tasks,
    generation_options,
    read_metrics,
)
from layerskip.decoding import DecodingConfig

pytestmark = pytest.mark.filterwarnings("ignore:::lm_eval", "ignore:::datasets", "ignore:::dill")
PAIRS = [
    ("Is water wet?", " yes"),
    ("Is water wet?", " no"),
    ("A question with a space at its end ", "answer"),
    ("", "Nothing before this."),
    ("one", "x"),
    ("word " * 150, "too long for the context"),
]
PLAIN = DecodingConfig(mode="plain")
TEXTS = ["A short text.", "A text that needs several windows. " * 40, ""]


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


@pytest.fixture(scope="module")
def model(folder):
    return LayerSkipModel.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return tiny_tasks.write(tmp_path_factory.mktemp("tasks"))


def ours(model, config, exits=(1, 2, 4)):
    scores = SharedScores(model, exits, batch_size=4)
    return HarnessModel(
        model,
        Row(config, config.mode),
        scores,
        max_length=model.decoder.architecture.max_context,
        seed=0,
        progress=lambda *_: None,
    )


@pytest.fixture(scope="module")
def theirs(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["plain", "self-speculative"])
def test_likelihoods_of_the_whole_model_are_those_of_the_harness(model, theirs, mode):
    options = {} if mode == "plain" else {"exit_layer": 1, "draft_tokens": 2}
    lm = ours(model, model.resolve(mode=mode, **options))
    requests = instances("loglikelihood", PAIRS)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for found, known in zip(lm.loglikelihood(requests), expected, strict=True):
        assert found[0] == pytest.approx(known[0], abs=1e-4, rel=1e-5)
        assert found[1] == known[1]
    rolling = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    expected = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert lm.loglikelihood_rolling(rolling) == pytest.approx(expected, abs=1e-4, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("until", [["zz", "the"], []])
def test_greedy_answers_are_those_of_the_harness(model, theirs, until):
    wishes = {"until": until, "max_gen_toks": 24, "do_sample": False}
    requests = instances("generate_until", [(q, wishes) for q, _ in PAIRS if q])
    expected = theirs.generate_until(requests, disable_tqdm=True)
    drafting = model.resolve(mode="self-speculative", exit_layer=2, draft_tokens=3)
    for config in (PLAIN, drafting):
        lm = ours(model, config)
        assert lm.generate_until(requests) == expected
        assert (lm.row.drafted > 0) == (config.mode == "self-speculative")


@pytest.mark.filterwarnings("ignore")
def test_texts_begin_as_with_the_harness(tmp_path):
    """With a tokenizer that begins texts with a token, which some have already."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint.save(tmp_path))
    begins = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begins
    tokenizer.save_pretrained(tmp_path)
    theirs = HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", batch_size=1)
    lm = ours(LayerSkipModel.from_pretrained(tmp_path, dtype="float32"), PLAIN)
    pairs = [*PAIRS[:4], ("<s>Is water wet?", " yes")]
    requests = instances("loglikelihood", pairs)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for found, known in zip(lm.loglikelihood(requests), expected, strict=True):
        assert found[0] == pytest.approx(known[0], abs=1e-4, rel=1e-5)
    begun = lm.tok_encode("Is")
    assert begun[0] == tokenizer.bos_token_id
    assert lm.tok_encode("<s>Is") == begun
    wishes = {"until": [], "max_gen_toks": 8, "do_sample": False}
    requests = instances("generate_until", [(q, wishes) for q, _ in pairs if q])
    assert lm.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


def test_a_tokenizer_without_begin_and_end_tokens(model):
    lm = ours(model, PLAIN)
    lm.tokenizer = PreTrainedTokenizerFast(tokenizer_object=model.tokenizer.backend_tokenizer)
    assert lm.tok_encode("Is") == model.tokenizer.encode("Is")
    with pytest.raises(ValueError, match="needs a begin or end token"):
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("Is",)]))


def test_an_exit_says_what_it_likes_itself(model):
    """Greedy answers of early exit are greedy to the likelihoods at that exit, and no other."""
    wishes = {"until": [], "max_gen_toks": 8}
    question = "Is water wet?"
    for e in (1, 2, 4):
        early = DecodingConfig(mode="early-exit", exit_layer=e)
        (answer,) = ours(model, early).generate_until(
            instances("generate_until", [(question, wishes)])
        )
        tokens = model.generate(question, mode="early-exit", exit_layer=e, max_new_tokens=8)
        assert answer == tokens.text
        request = [((question, answer), model.tokenize(question), tokens.token_ids)]
        for other in (1, 2, 4):
            lm = ours(model, DecodingConfig(mode="early-exit", exit_layer=other))
            ((_, greedy),) = lm._loglikelihood_tokens(request)
            assert greedy == (other == e)


def test_all_rows_of_local_tasks(model, tasks):
    rows = rows_of(model, ["plain", "early-exit", "self-speculative"], [1, 4], 2)
    names = ["tiny_*"]
    facts = {}
    evaluate_tasks(model, rows, names, facts, include_path=tasks, limit=3)
    assert facts["tiny_choice"] == {"documents": 3, "num_fewshot": 0}
    assert [(row.config.mode, row.config.exit_layer) for row in rows] == [
        ("plain", None),
        ("early-exit", 1),
        ("early-exit", 4),
        ("self-speculative", 1),
        ("self-speculative", 4),
    ]
    plain, first, last, drafted, _ = rows
    assert set(plain.results) == {"tiny_choice", "tiny_rating", "tiny_writing"}
    assert plain.results == last.results == drafted.results
    assert first.results["tiny_rating"] != plain.results["tiny_rating"]
    assert 0.0 <= plain.results["tiny_choice"]["acc"].value <= 1.0
    assert plain.results["tiny_choice"]["acc"].stderr is not None
    assert drafted.to_dict()["acceptance_rate"] is not None
    assert plain.to_dict()["acceptance_rate"] is None


def test_all_rows_are_asked_with_the_same_examples(model, tasks):
    """Early exit at the last layer is plain decoding: only other examples could tell them apart."""
    rows = rows_of(model, ["plain", "early-exit"], [4])
    for seed in range(3):
        options = {"include_path": tasks, "num_fewshot": 2, "seed": seed}
        evaluate_tasks(model, rows, ["told_answer"], {}, **options)
        plain, last = (row.results["told_answer"]["perplexity"].value for row in rows)
        assert last == plain


def test_a_template_without_a_place_for_the_system_is_asked_without_it(model, monkeypatch):
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<{{ m['content'] }}>{% endfor %}"
    )
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert ours(model, PLAIN).apply_chat_template(messages) == "<b>"
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ 'a' * 20000000 }}")
    with pytest.raises(ValueError, match="it makes a text of more than"):
        ours(model, PLAIN).apply_chat_template(messages)


def test_options_of_generation():
    assert generation_options({"until": "\n", "max_new_tokens": 9, "do_sample": False}) == {
        "max_new_tokens": 9,
        "stop": ["\n"],
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "top_k": None,
        "top_p": None,
        "min_p": None,
    }
    sampled = generation_options(
        {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "until": [""]}
    )
    assert (sampled["temperature"], sampled["top_p"], sampled["stop"]) == (0.5, 0.9, [])
    assert generation_options({"do_sample": True})["temperature"] == 1.0
    with pytest.raises(ValueError, match="num_beams=4"):
        generation_options({"num_beams": 4})


def test_figures_of_the_harness_are_read_by_name():
    figures = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": "N/A", "em,strict": 0.25}
    figures["em_stderr,strict"] = 0.1
    metrics = read_metrics(figures, {"acc": True})
    assert (metrics["acc"].value, metrics["acc"].stderr) == (0.5, None)
    assert metrics["acc"].higher_is_better is True
    assert (metrics["em,strict"].value, metrics["em,strict"].stderr) == (0.25, 0.1)
    assert set(metrics) == {"acc", "em,strict"}


def test_prompts_leave_room_for_answers(model):
    lm = ours(model, PLAIN)
    with pytest.raises(ValueError, match="600 new tokens, which leaves no room"):
        lm.generate_until(instances("generate_until", [("x", {"max_gen_toks": 600})]))
    long = "word " * 200
    (answer,) = lm.generate_until(instances("generate_until", [(long, {"max_gen_toks": 12})]))
    kept = model.tokenize(long)[-(512 - 12) :]
    assert answer == model.generate(kept, mode="plain", max_new_tokens=12).text
