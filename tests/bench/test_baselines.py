"""Baselines: recorded as our answers are, in processes whose failures are rows."""

import dataclasses
import importlib.util
import itertools
import json
import shutil
from pathlib import Path

import pytest
from scripted import END, TOKENIZER, encode
from tiny_tokenizers import SPLITS, byte_level, checkpoint

import tiny_models
from causal_lms import build
from layerskip import LayerSkipModel
from layerskip.bench.baselines import (
    BASELINES,
    Baseline,
    llama_cpp,
    start_baselines,
    transformers,
)
from layerskip.bench.baselines.process import PROMPT_LOOKUP_TOKENS, BaselineSpec, Job, prompt_lookup
from layerskip.bench.baselines.transformers import Recorder
from layerskip.bench.measure import Setting, SystemFailedError, measure
from stand_in_baseline import CRASH, FAIL

PLAIN, LOOKUP = Setting(), prompt_lookup(3)
JOB = Job(model="", dtype="float32", threads=1, context=64, settings=[PLAIN, LOOKUP])


# --- counting


def recorder(**rules):
    seconds = itertools.count()
    return Recorder(lambda: next(seconds), TOKENIZER, **{"max_new_tokens": 9, **rules})


def finished(made):
    return made.run(peak_memory_bytes=None, bytes_per_pass=10)


def test_each_step_is_timed_when_it_comes():
    made = recorder()
    assert not made.add(encode("a"))
    assert not made.add(encode("bcd"))
    assert not made.add(encode("e"))
    run = finished(made)
    assert (run.ttft_s, run.decode_s, run.decoded_tokens) == (1, 2, 4)
    assert [len(step.tokens) for step in run.steps] == [1, 3, 1]
    assert run.text == "abcde"
    assert run.weight_bytes_read == 20  # two passes after the first


def test_tokens_of_one_step_may_come_one_by_one():
    made = recorder()
    for letter, new_step in (("a", True), ("b", True), ("c", False), ("d", True)):
        made.add(encode(letter), new_step=new_step)
    run = finished(made)
    assert [len(step.tokens) for step in run.steps] == [1, 2, 1]
    assert (run.ttft_s, run.decode_s) == (1, 3)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_of_a_mixture_the_experts_that_answer_are_read(family):
    model = build(family)
    of_experts = [p.nbytes for name, p in model.named_parameters() if ".experts." in name]
    config = model.config
    n_experts = getattr(config, "num_local_experts", None) or config.num_experts
    unread = sum(of_experts) * (1 - config.num_experts_per_tok / n_experts)
    whole = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    assert of_experts
    assert transformers._bytes_per_pass(model) == pytest.approx(whole - unread, abs=1)


def test_answers_end_by_our_rules():
    """The same for a draft that goes on beyond the end, and for what comes afterwards."""
    for rules, tokens, text in (
        ({"eos_token_ids": [END]}, [*encode("abc"), END], "abc"),
        ({"stop": ["bc"]}, encode("abc"), "a"),
        ({"max_new_tokens": 2}, encode("ab"), "ab"),
        ({}, [*encode("abc"), END, *encode("d")], "abcd"),
    ):
        made = recorder(**rules)
        made.add(encode("a"))
        ended = made.add([*encode("bc"), END, *encode("d")])
        assert ended == made.finished == bool(rules)
        assert made.add(encode("zz")) == ended
        run = finished(made)
        assert run.token_ids == (tokens if rules else [*tokens, *encode("zz")])
        assert run.text == (text if rules else text + "zz")


# --- processes


@pytest.fixture
def stand_in(monkeypatch):
    """Register a baseline, "stand-in", that runs in a process."""
    spec = BaselineSpec(module="stand_in_baseline", package="json", distribution="stand-in")
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")]
    monkeypatch.setenv("PYTHONPATH", ":".join(paths))

    def start(process_per_setting=False, **changes):
        own = dataclasses.replace(spec, process_per_setting=process_per_setting)
        monkeypatch.setitem(BASELINES, "stand-in", own)
        return Baseline("stand-in", dataclasses.replace(JOB, **changes))

    return start


def test_one_answer_a_request(stand_in, tmp_path, monkeypatch):
    # No module of the working folder takes a package's place.
    (tmp_path / "numpy.py").write_text("raise SystemExit('not numpy')")
    monkeypatch.chdir(tmp_path)
    with stand_in() as baseline:
        run = baseline.answer(LOOKUP, [5, 6], 4)
        assert (run.token_ids, run.text) == ([5, 4, 2], "prompt-lookup")
        assert (run.ttft_s, run.decode_s, run.peak_memory_bytes) == (0.5, 0.25, 1)
        with pytest.raises(SystemFailedError, match="KeyError: 'no such thing'"):
            baseline.answer(PLAIN, [FAIL], 4)
        assert baseline.answer(PLAIN, [1], 4).text == "plain"  # it goes on
        with pytest.raises(SystemFailedError, match="ended with status 3: fatal: out of luck"):
            baseline.answer(PLAIN, [CRASH], 4)
        with pytest.raises(SystemFailedError, match="ended with status 3: fatal: out of luck"):
            baseline.answer(PLAIN, [1], 4)


def test_settings_with_processes_of_their_own_fail_alone(stand_in):
    with stand_in(process_per_setting=True) as baseline:
        assert baseline.answer(LOOKUP, [1], 4).text == "prompt-lookup"
        with pytest.raises(SystemFailedError, match="ended with status 3"):
            baseline.answer(PLAIN, [CRASH], 4)
        with pytest.raises(SystemFailedError, match="ended with status 3"):
            baseline.answer(PLAIN, [1], 4)
        assert baseline.answer(LOOKUP, [1], 4).text == "prompt-lookup"


@pytest.mark.parametrize("process_per_setting", [False, True])
@pytest.mark.parametrize(
    ("context", "reason"),
    [
        (FAIL, "RuntimeError: cannot load this"),
        (CRASH, "its process ended with status 9: chatter from below"),
    ],
)
def test_a_baseline_that_cannot_start_is_rows_with_the_reason(
    stand_in, context, reason, process_per_setting
):
    with stand_in(process_per_setting, context=context) as baseline:
        entries = measure([baseline], [[1]], max_new_tokens=2)
    assert [entry.error for entry in entries] == [reason] * 2


# --- libraries


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_models.reference("smollm2").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return LayerSkipModel.from_pretrained(folder, dtype="float32")


def job(folder, **changes):
    settings = transformers.settings([(2, 2), (3, 4)])
    return dataclasses.replace(JOB, model=str(folder), settings=settings, **changes)


def rows_of(settings):
    return [(s.mode, s.config.exit_layer, s.config.draft_tokens) for s in settings]


def test_rows_of_baselines():
    rows = rows_of(transformers.settings([(2, 4), (3, 4)]))
    lookup = ("prompt-lookup", None, PROMPT_LOOKUP_TOKENS)
    plain = ("plain", None, None)
    drafting = [("self-speculative", 2, 4), ("self-speculative", 3, 4)]
    defaults = [("self-speculative", 2, 20), ("self-speculative", 3, 20)]
    assert rows == [plain, *drafting, *defaults, lookup]
    rows = rows_of(llama_cpp.settings([(2, 4), (3, 4)]))
    modes = [("ngram-mod", None, 16), ("ngram-map-k", None, 16)]
    assert rows == [plain, ("prompt-lookup", None, 2), lookup, *modes]


def test_transformers_gives_our_tokens_in_every_row(folder, model):
    prompt = tiny_models.token_ids("smollm2", 9).tolist()
    ours = model.generate(prompt, mode="plain", max_new_tokens=12, ignore_eos=True).token_ids
    engine = transformers.Engine(job(folder))
    for setting in job(folder).settings:
        run = engine.answer(setting, prompt, 12)
        assert run.token_ids == ours, setting
        rounds = [len(step.tokens) for step in run.steps[1:]]
        assert max(rounds) <= (setting.config.draft_tokens or 0) + 1
        if setting.mode == "plain":
            assert len(rounds) == 11
            assert run.weight_bytes_read == 11 * model.decoder.weight_bytes + norm_bytes(model)
    # An end inside the answer ends it for all.
    engine = transformers.Engine(job(folder, eos_token_ids=[ours[4]]))
    for setting in job(folder).settings:
        assert engine.answer(setting, prompt, 12).token_ids == ours[: ours.index(ours[4]) + 1]


def test_transformers_reads_nothing_but_the_weights(folder, tmp_path):
    """No kernels that the config names, no other weights, and no adapter."""
    own = Path(shutil.copytree(folder, tmp_path / "model"))
    fields = json.loads((own / "config.json").read_text())
    fields["_attn_implementation"] = "kernels-community/none"
    (own / "config.json").write_text(json.dumps(fields))
    assert transformers.Engine(job(own))._model.config._attn_implementation == "sdpa"
    (own / "adapter_config.json").write_text('{"base_model_name_or_path": "another"}')
    with pytest.raises(ValueError, match="has an adapter beside its weights: merge it"):
        transformers.Engine(job(own))
    (own / "adapter_config.json").unlink()
    fields["transformers_weights"] = "other.safetensors"
    (own / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="names its weights"):
        transformers.Engine(job(own))


def norm_bytes(model):
    """Our count leaves the norms out: of 2 L + 1 vectors, a float32 each, in 11 passes."""
    a = model.decoder.architecture
    return 11 * 4 * a.hidden_size * (2 * a.n_layers + 1)


def start(model, folder, names, context=32, ignore_eos=True):
    return start_baselines(
        model,
        names,
        source=str(folder),
        drafts=[(2, 2)],
        context=context,
        stop=(),
        ignore_eos=ignore_eos,
        gguf_weights="f32",
    )


def test_a_baseline_that_is_not_installed_says_how_to_install_it(folder, model, monkeypatch):
    missing = dataclasses.replace(BASELINES["llama.cpp"], package="no_such_package")
    monkeypatch.setitem(BASELINES, "llama.cpp", missing)
    with start(model, folder, ["llama.cpp"]) as baselines:
        entries = measure(baselines, [[5]], max_new_tokens=2)
    reason = f"{missing.distribution} is not installed; run: pip install 'layerskip[baselines]'"
    assert [entry.error for entry in entries] == [reason] * 5


with_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec(BASELINES["llama.cpp"].package) is None, reason="no llama.cpp"
)


@with_llama_cpp
@pytest.mark.parametrize("ignore_eos", [True, False])
def test_llama_cpp_counts_its_rounds_and_ends_by_our_rules(ignore_eos, tmp_path):
    """It ends at every end token by itself, and sends no event for half a character."""
    prompt = [0] * 4  # its answer repeats itself, in single bytes
    tokenizer = byte_level(SPLITS["gpt-2"])
    checkpoint(tmp_path, tokenizer, eos_token=tokenizer.id_to_token(23))
    fields = json.loads((tmp_path / "config.json").read_text()) | {"eos_token_id": 23}
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model = LayerSkipModel.from_pretrained(tmp_path, dtype="float32")
    ours = model.generate(prompt, mode="plain", max_new_tokens=60, ignore_eos=ignore_eos).token_ids
    assert (ours.count(23) > 1) == ignore_eos
    with start(model, tmp_path, ["llama.cpp"], context=64, ignore_eos=ignore_eos) as (baseline,):
        assert "AVX" in baseline.build or "NEON" in baseline.build
        for setting in baseline.settings:
            run = baseline.answer(setting, prompt, 60)
            assert run.token_ids == ours, setting
            assert run.text == model.tokenizer.decode(ours, skip_special_tokens=True)
            rounds = [len(step.tokens) for step in run.steps]
            assert rounds[0] == 1
            assert max(rounds) <= (setting.config.draft_tokens or 0) + 1
            assert (max(rounds) > 1) == (ignore_eos and setting.mode == "prompt-lookup")
            assert run.ttft_s > 0
            assert run.decode_s > 0


@pytest.mark.real
@pytest.mark.long
@with_llama_cpp
def test_llama_cpp_gives_our_tokens(smollm2, smollm2_folder):
    """In float32, on the file that is exported of the same weights; the first tokens at least."""
    prompt = smollm2.tokenize("Once upon a time")
    ours = smollm2.generate(prompt, mode="plain", max_new_tokens=12, ignore_eos=True).token_ids
    with start(smollm2, smollm2_folder, ["llama.cpp"]) as (baseline,):
        for setting in baseline.settings:
            run = baseline.answer(setting, prompt, 12)
            assert run.token_ids == ours, setting
            assert len(run.steps[0].tokens) == 1


def test_a_baseline_is_timed_by_the_clock_that_waits_for_the_device(folder, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(transformers, "device_clock", lambda device: lambda: next(ticks))
    run = transformers.Engine(job(folder)).answer(PLAIN, [5, 6, 7], 4)
    assert (run.ttft_s, run.decode_s) == (1, 3)
