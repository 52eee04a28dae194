"""The tokens that a trained checkpoint's early exit drafts."""

import tiny_models
from layerskip.recipe.exit_loss import IGNORED_LABEL
from layerskip.training.run import draft_vocabulary


def test_labels_are_counted_and_prompts_are_not():
    model = tiny_models.build("llama2")
    rows = [{"labels": [IGNORED_LABEL, 7, 9, 9]}, {"labels": [IGNORED_LABEL, 9, 5]}]
    assert draft_vocabulary(rows, model, None) == (9, 5, 7)
    assert draft_vocabulary(rows, model, 2) == (2, 9, 5, 7)


def test_a_rare_token_does_not_pay_for_its_row():
    model = tiny_models.build("llama2")
    weights = sum(weight.numel() for weight in model.parameters())
    weights -= model.get_input_embeddings().weight.numel()
    often = weights // model.config.hidden_size + 10
    rows = [{"labels": [7] * often + [5]}]
    assert draft_vocabulary(rows, model, None) == (7,)
