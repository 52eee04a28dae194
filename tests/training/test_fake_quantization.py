"""Training on the grid of quantized weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from causal_lms import batch_of, build
from layerskip import merge
from layerskip.export import open_source, to_difference
from layerskip.model.files import difference
from layerskip.model.quantize import quantize
from layerskip.recipe import RecipeConfig, attach, detach
from layerskip.training import TrainConfig, fake_quantization, quantize_aware, train

RECIPE = RecipeConfig(curriculum="all", exit_weighting="equal", p_max=0.3)
WIDTHS = {"intermediate_size": 64}  # a multiple of the grid's groups


def model_of(family="llama", **changes):
    return build(family, **{**WIDTHS, **changes})


def round_in_place(model, bits):
    """The weights that inference loads, put into a plain model."""
    ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                own = 8 if any(parameter is end for end in ends) else bits
                parameter.copy_(quantize(parameter, own).dequantize())


def before_and_after(**changes):
    """Weights that training began with, and a model that it moved a little."""
    model = model_of(**changes)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return before, model


def round_difference_in_place(model, before):
    """The weights that a base and the exported difference make."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change = parameter - before[name]
            stored = difference.to_stored(name, change, 2)
            back = difference.from_stored(tuple(change.shape), list(stored.values()), 2)
            parameter.copy_(before[name] + back)


def evaluated(model):
    handle = attach(model, RECIPE)
    losses = handle.evaluate((1, 2), batch_of())
    detach(model)
    return losses.loss_sums / losses.tokens


def fit(model, weights=None, steps=30, learning_rate=1e-3, before=None):
    on_grid = quantize_aware(model, weights, before) if weights else None
    handle = attach(model, RECIPE)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    for step in range(steps):
        handle.set_step(step, steps)
        model(**batch_of(seed=step % 3)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    detach(model)
    if on_grid is not None:
        on_grid.remove()


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma3_text", {}),
        ("phi3", {}),
        ("gpt_neox", {}),
    ],
)
def test_the_loss_is_that_of_the_rounded_model(family, changes, weights):
    model = model_of(family, **changes)
    plain = evaluated(model)
    on_grid = quantize_aware(model, weights)
    found = evaluated(model)
    on_grid.remove()
    assert torch.equal(evaluated(model), plain)
    round_in_place(model, int(weights[3:]))
    torch.testing.assert_close(found, evaluated(model), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, plain, rtol=1e-4, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_on_the_grid_of_a_difference_is_that_of_base_and_difference(tied):
    before, model = before_and_after(tie_word_embeddings=tied)
    plain = evaluated(model)
    on_grid = quantize_aware(model, "difference", before)
    found = evaluated(model)
    on_grid.remove()
    round_difference_in_place(model, before)
    torch.testing.assert_close(found, evaluated(model), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, plain, rtol=1e-4, atol=0)


def test_trained_on_the_grid_of_a_difference_it_is_better_as_one():
    before, start = before_and_after()
    fit(start, steps=80, learning_rate=5e-3)
    losses = []
    for weights in (None, "difference"):
        model = model_of()
        model.load_state_dict(start.state_dict())
        fit(model, weights, steps=30, learning_rate=3e-3, before=before)
        round_difference_in_place(model, before)
        losses.append(evaluated(model))
    plain, on_grid = losses
    assert (on_grid < 0.95 * plain).all()


def test_a_difference_needs_weights_of_the_same_shape_before():
    before, model = before_and_after()
    for wrong in (None, {**before, "lm_head.weight": torch.zeros(2, 2)}):
        with pytest.raises(ValueError, match="a difference is added to has no"):
            quantize_aware(model, "difference", wrong)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_at_the_rounded_weights(tied):
    model, rounded = (model_of(tie_word_embeddings=tied) for _ in range(2))
    round_in_place(rounded, 4)
    quantize_aware(model, "int4")
    for one in (model, rounded):
        attach(one, RECIPE).set_step(0, 10)
        one(**batch_of()).loss.backward()
    for (name, own), other in zip(model.named_parameters(), rounded.parameters(), strict=True):
        assert own.grad.abs().sum() > 0, name
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weights", ["int8", "difference"])
def test_float16_whose_exit_loss_is_outside_of_autocast(weights):
    before, model = before_and_after()
    quantize_aware(model, weights, before)
    attach(model, RECIPE).set_step(0, 10)
    with torch.autocast("cpu", torch.float16):
        loss = model(**batch_of()).loss
    loss.backward()
    assert loss.isfinite()
    assert model.lm_head.weight.grad.isfinite().all()


def test_the_grid_of_a_difference_follows_the_model_to_its_device():
    """A Trainer moves the model after this is set up."""
    before, model = before_and_after()
    weight, tokens = model.lm_head.weight, torch.tensor([3, 1])
    grid = fake_quantization._grid_around(before, "lm_head.weight", weight)
    rows = grid(weight[tokens], tokens)
    torch.testing.assert_close(rows, grid(weight, None)[tokens])
    assert grid(weight.to("meta"), None).device.type == "meta"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_autocast_and_gradient_checkpointing_give_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = model_of()
        if checkpointing:
            model.gradient_checkpointing_enable()
        quantize_aware(model, "int4")
        attach(model, RECIPE).set_step(3, 10)
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch_of()).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
        assert {grad.dtype for grad in found[-1].values()} == {torch.float32}
    torch.testing.assert_close(*found)


def test_the_head_is_rounded_once_a_pass_and_anew_in_the_next(monkeypatch):
    from layerskip.training import fake_quantization as module

    seen, plain = [], module.on_grid
    monkeypatch.setattr(module, "on_grid", lambda w, bits: seen.append(w.shape) or plain(w, bits))
    model = model_of()
    quantize_aware(model, "int4")
    handle = attach(model, RecipeConfig(curriculum="all", chunk_tokens=4, p_max=0.0))
    head, optimizer = model.lm_head.weight, torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for step in range(2):
        seen.clear()
        handle.set_step(step, 2)
        loss = model(**batch_of()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert seen.count(head.shape) == 1
    assert losses[0] != losses[1]


def test_trained_on_the_grid_it_is_better_there():
    """Trained without the grid first: what is learnt is then finer than its steps."""
    start = model_of()
    fit(start, steps=80, learning_rate=5e-3)
    losses = []
    for weights in (None, "int4"):
        model = model_of()
        model.load_state_dict(start.state_dict())
        fit(model, weights, steps=30, learning_rate=3e-3)
        round_in_place(model, 4)
        losses.append(evaluated(model))
    plain, on_grid = losses
    assert (on_grid < 0.95 * plain).all()  # the whole model and both early exits


def test_names_stay():
    model = model_of()
    names = {*model.state_dict()}
    on_grid = quantize_aware(model, "int4")
    assert {*model.state_dict()} == names
    on_grid.remove()
    assert not [m for m in model.modules() if "forward" in vars(m)]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"intermediate_size": 48}, "rows of 48 weights"),
        ("mixtral", {}, r"MixtralTopKRouter in layer 0 is no linear layer"),
        ("gpt2", {}, "Conv1D in layer 0 is no linear layer"),
    ],
)
def test_models_without_a_grid_are_refused(family, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        quantize_aware(model_of(family, **changes), "int4")
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_are_refused():
    import peft

    adapted = peft.get_peft_model(model_of(), peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="adapter cannot be trained on a grid"):
        quantize_aware(adapted, "int4")
    needed = {"model": "m", "data": "d", "output": "o", "quantize_aware": "int4"}
    with pytest.raises(ValueError, match="quantize_aware and lora_rank contradict"):
        TrainConfig.from_mapping({**needed, "lora_rank": 4})
    with pytest.raises(ValueError, match="quantize_aware and compile contradict"):
        TrainConfig.from_mapping({**needed, "compile": True})
    with pytest.raises(ValueError, match="difference_base needs"):
        TrainConfig.from_mapping({**needed, "difference_base": "m"})
    with pytest.raises(ValueError, match="from_scratch has no weights"):
        TrainConfig.from_mapping({**needed, "quantize_aware": "difference", "from_scratch": True})


@pytest.fixture
def settings(wide_model_folder, data_file, tmp_path):
    return {
        "model": wide_model_folder,
        "data": data_file,
        "output": str(tmp_path / "out"),
        "regime": "task",
        "quantize_aware": "int4",
        "accumulation": 2,
        "batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "save_steps": 3,
        "eval_rows": 10,
        "device": "cpu",
    }


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_run_resumes_bit_for_bit_and_says_what_it_was_trained_for(settings, tmp_path):
    from transformers import AutoModelForCausalLM

    whole = train(TrainConfig.from_mapping(settings))
    first = tmp_path / "out" / "checkpoint-3"
    again = tmp_path / "again"
    again.mkdir()
    first.rename(again / "checkpoint-3")
    changes = {"output": str(again), "resume": True}
    train(TrainConfig.from_mapping({**settings, **changes}))
    one, other = (load_file(f / "model.safetensors") for f in (whole.output, again))
    assert one.keys() == load_file(Path(settings["model"]) / "model.safetensors").keys()
    assert all(torch.equal(one[name], other[name]) for name in one)

    fields = json.loads((whole.output / "generation_config.json").read_text())
    found = fields["layerskip"]["weights"]["int4"]
    assert found["method"] == "quantization-aware training"
    # What 4 bits cost: of the weights on the grid, and as they are.
    rounded, as_is = whole.metrics["eval_loss"], whole.metrics["unrounded_loss"]
    assert rounded != as_is
    assert found["nll_change"] == pytest.approx(rounded / as_is - 1)
    # The latent weights are written; rounded, they give the loss that evaluation saw.
    model = AutoModelForCausalLM.from_pretrained(whole.output)
    on_grid = quantize_aware(model, "int4")
    assert any((quantize(w, 4).dequantize() != w).any() for n, w in one.items() if "proj" in n)
    on_grid.remove()

    # Trained on without the grid, the record goes.
    changes = {"model": str(whole.output), "output": str(tmp_path / "more")}
    more = train(
        TrainConfig.from_mapping({**settings, **changes, "quantize_aware": None, "max_steps": 1})
    )
    fields = json.loads((more.output / "generation_config.json").read_text())
    assert "weights" not in fields.get("layerskip", {})


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_run_for_a_difference_is_exported_as_it_was_trained(settings, tmp_path):
    changes = {"quantize_aware": "difference", "difference_base": settings["model"], "max_steps": 3}
    first = train(TrainConfig.from_mapping({**settings, "quantize_aware": None, "max_steps": 3}))
    changes |= {"model": str(first.output), "output": str(tmp_path / "on-grid")}
    result = train(TrainConfig.from_mapping({**settings, **changes}))
    fields = json.loads((result.output / "generation_config.json").read_text())
    assert "weights" not in fields.get("layerskip", {})  # it says nothing about 8 and 4 bits

    file = tmp_path / "change.safetensors"
    to_difference(open_source(str(result.output)), file, base=settings["model"])
    merge(file, tmp_path / "merged", base=settings["model"])
    base, trained, merged = (
        load_file(Path(folder) / "model.safetensors")
        for folder in (settings["model"], result.output, tmp_path / "merged")
    )
    name = "model.layers.1.mlp.up_proj.weight"
    expected = base[name].float() + difference.rounded(trained[name] - base[name], 2)
    assert torch.equal(merged[name], expected.to(merged[name].dtype))
    assert not torch.equal(merged[name], base[name].to(merged[name].dtype))
