"""Liger's fused loss in the exit loss: a stand-in that computes the same by torch, on the CPU."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional

from causal_lms import batch_of, build
from layerskip.recipe import RecipeConfig, attach, detach, exit_loss

NAME = "liger_kernel.transformers.functional"
DROPPING = RecipeConfig(curriculum="all", exit_weighting="linear", p_max=0.5)


def install(monkeypatch, function):
    for part in ("liger_kernel", "liger_kernel.transformers", NAME):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    sys.modules[NAME].liger_fused_linear_cross_entropy = function
    monkeypatch.setattr(exit_loss, "FUSED_DEVICES", ("cpu",))


@pytest.fixture
def calls(monkeypatch):
    """The soft caps with which the stand-in was called."""
    seen = []

    def stand_in(
        input, weight, target, bias=None, reduction="mean", softcap=None,
        return_predicted_tokens=False,
    ):  # fmt: skip
        assert return_predicted_tokens
        seen.append(softcap)
        logits = functional.linear(input, weight, bias).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        loss = functional.cross_entropy(logits, target, reduction=reduction)
        return SimpleNamespace(loss=loss, predicted_tokens=logits.argmax(-1))

    install(monkeypatch, stand_in)
    return seen


def step_of(model, recipe=DROPPING):
    handle = attach(model, recipe)
    handle.set_step(0, 100)
    model.zero_grad()
    loss = model(**batch_of()).loss
    loss.backward()
    evaluated = handle.evaluate((2,), batch_of())
    detach(model)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return [loss.detach(), gradients, *figures(handle.last), *figures(evaluated)]


def figures(losses):
    return [losses.loss_sums, losses.correct, losses.tokens]


@pytest.mark.parametrize(
    ("family", "changes", "cap"),
    [
        ("llama", {"tie_word_embeddings": True}, None),
        ("gemma2", {"final_logit_softcapping": 3.0}, 3.0),
        ("gpt_neox", {}, None),
    ],
)
def test_it_gives_what_the_chunks_give(calls, family, changes, cap):
    model = build(family, **changes)
    expected = step_of(model, RecipeConfig(**{**vars(DROPPING), "fused_loss": False}))
    assert calls == []
    torch.testing.assert_close(step_of(model), expected, rtol=1e-4, atol=1e-5)
    assert calls == [cap] * 6  # four exits in training, two in evaluation


def test_a_recipe_that_distils_goes_without_in_training(calls):
    step_of(build("llama"), RecipeConfig(curriculum="all", distillation_weight=0.5))
    assert calls == [None] * 2  # two exits in evaluation


def test_models_that_go_without(calls, monkeypatch):
    step_of(build("granite"))  # its logits are scaled
    model = build("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    step_of(model)
    monkeypatch.setattr(exit_loss, "FUSED_DEVICES", ("cuda",))
    step_of(build("llama"))
    assert calls == []


def test_sums_are_in_float32_and_products_in_autocasts_type(monkeypatch):
    """Autocast does not reach every product of the kernels in all their versions."""
    seen = []

    def stand_in(
        input, weight, target, bias=None, reduction="mean", softcap=None,
        return_predicted_tokens=False, accum_dtype=None,
    ):  # fmt: skip
        seen.append((input.dtype, accum_dtype))
        logits = functional.linear(input, weight.to(input.dtype)).float()
        loss = functional.cross_entropy(logits, target, reduction=reduction)
        return SimpleNamespace(loss=loss, predicted_tokens=logits.argmax(-1))

    install(monkeypatch, stand_in)
    step_of(build("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        step_of(build("llama"))
    assert set(seen) == {(dtype, torch.float32) for dtype in (torch.float32, torch.bfloat16)}


def test_a_batch_without_labels(calls):
    model = build("llama")
    attach(model, DROPPING).set_step(0, 100)
    batch = batch_of()
    batch["labels"][:] = -100
    assert model(**batch).loss == 0
    assert calls == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernels_themselves():
    pytest.importorskip("liger_kernel")
    model = build("llama").cuda()
    handle = attach(model, DROPPING)
    batch = {name: value.cuda() for name, value in batch_of().items()}
    results = []
    for used in (False, True):
        handle.recipe = RecipeConfig(**{**vars(DROPPING), "fused_loss": used})
        handle.set_step(0, 100)
        model.zero_grad()
        model(**batch).loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append([gradients, *figures(handle.last)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
