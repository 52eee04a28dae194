"""The parts of adapter training: loss, ridge regression, states of the teacher, store, network."""

import dataclasses

import pytest
import torch
from test_exit_adapter import commit, drafter_of
from tiny_adapters import adapter_parameters, with_adapter
from tiny_decoders import PLAIN, ids, random_prompt, tiny_decoder

import tiny_models
from layerskip.adapt.loss import SoftCrossEntropy, logits_of, soft_targets
from layerskip.adapt.muon import Muon
from layerskip.adapt.network import AdapterNetwork, shifted
from layerskip.adapt.ridge import fit_projection
from layerskip.adapt.store import Store
from layerskip.adapt.teacher import read_text, write_answers
from layerskip.decoding import Draft
from layerskip.model.exit_adapter import joined, normalized


@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_loss_and_its_gradient_are_those_of_the_formula(cap):
    torch.manual_seed(0)
    hidden = torch.randn(300, 8, requires_grad=True)
    head, teacher = torch.randn(20, 8), torch.randn(300, 8)
    weights = torch.rand(300)
    targets, entropies = soft_targets(teacher, head, cap, 0.3)
    loss = SoftCrossEntropy.apply(hidden, head, cap, targets, weights)
    (gradient,) = torch.autograd.grad(loss, hidden)

    p = logits_of(teacher, head, cap).softmax(-1)
    torch.testing.assert_close(entropies, -(p * p.log()).sum(-1))
    log_q = logits_of(hidden, head, cap).log_softmax(-1)
    ce = torch.nn.functional.nll_loss(log_q, p.argmax(-1), reduction="none")
    expected = (weights * (-(p * log_q).sum(-1) + 0.3 * ce)).sum() / weights.sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, hidden)[0])


def test_ridge_regression_finds_a_linear_map():
    torch.manual_seed(0)
    true = torch.randn(4, 8)
    sequences = []
    for _ in range(3):
        exit_states, last_states = torch.randn(200, 4), torch.zeros(200, 4)
        for t in range(200):
            before = last_states[t - 1] if t else torch.zeros(4)
            last_states[t] = normalized(true @ joined(exit_states[t], before))
        sequences.append((exit_states, last_states))
    projection = fit_projection(sequences)
    inputs = joined(exit_states, shifted(last_states[None])[0])
    agreement = torch.cosine_similarity(inputs @ projection.T, last_states)
    assert agreement.mean() > 0.95


def states_over(decoder, tokens, exit_layer):
    cache = decoder.new_cache(64)
    exit_states = decoder.run(decoder.embed(torch.tensor([tokens])), 0, exit_layer, cache)
    return exit_states[0], decoder.run(exit_states, exit_layer, len(decoder.layers), cache)[0]


def test_answers_are_the_model_s_own_and_come_with_its_states():
    decoder = tiny_decoder("llama3.1")
    prompts = [random_prompt(decoder, n, seed=n) for n in (3, 9, 5)]
    plain = [ids(decoder, prompt, PLAIN, 12) for prompt in prompts]
    end = plain[1][4]  # which the others may meet too
    answers = write_answers(
        decoder, prompts, 2, dataclasses.replace(PLAIN, max_new_tokens=12), eos_token_ids={end}
    )
    for prompt, tokens, answer in zip(prompts, plain, answers, strict=True):
        n = tokens.index(end) + 1 if end in tokens else 12
        assert answer.tokens == [*prompt, *tokens[:n]]
        assert len(answer) == len(answer.tokens) - 1
        exit_states, last_states = states_over(decoder, answer.tokens[:-1], 2)
        torch.testing.assert_close(answer.exit_states.float(), exit_states, rtol=0.02, atol=0.02)
        torch.testing.assert_close(answer.last_states.float(), last_states, rtol=0.02, atol=0.02)


def test_an_answer_that_repeats_itself_ends():
    decoder = tiny_decoder("llama3.1", upper=0.0, tie_word_embeddings=True)
    prompt = random_prompt(decoder, 4)
    full = ids(decoder, prompt, PLAIN, 120)
    period = next(
        n for n in range(1, 25) if full[-n:] == full[-2 * n : -n] == full[-3 * n : -2 * n]
    )
    (answer,) = write_answers(
        decoder, [prompt], 1, dataclasses.replace(PLAIN, max_new_tokens=120), eos_token_ids=()
    )
    tokens = answer.tokens[4:]
    assert tokens == full[: len(tokens)]
    assert tokens[-period:] == tokens[-2 * period : -period]
    assert len(tokens) < 120


def test_the_store_keeps_the_newest_rounds(tmp_path):
    decoder = tiny_decoder("llama3.1")
    store = Store(tmp_path, max_tokens=50)
    texts = [random_prompt(decoder, 20, seed) for seed in range(4)]
    for number, text in enumerate(texts):
        store.add(number, [read_text(decoder, text, 1)])
    assert [s.tokens for s in store.sequences()] == texts[2:]
    assert [s.tokens for s in Store(tmp_path, 50).sequences()] == texts[2:]
    assert 1 not in store
    assert 3 in store


@pytest.mark.parametrize("case", ["llama3.1", "gemma3", "olmo2", "gpt-neox", "mixtral"])
def test_training_unrolls_what_decoding_drafts(case):
    """The states of each depth, at each position, are those of the drafter's passes there."""
    decoder, adapter = with_adapter(case, 2)
    text = random_prompt(decoder, 10)
    exit_states, last_states = states_over(decoder, text, 2)
    network = AdapterNetwork(decoder, adapter_parameters(case), 0.0)
    outputs = network.outputs(exit_states[None], last_states[None], 3)
    for start in (3, 7):  # the newest committed token
        drafter, cache = drafter_of(decoder, adapter, text), decoder.new_cache(64)
        commit(decoder, drafter, cache, text[:start])
        draft = Draft(torch.tensor([[text[start]]]), cache)
        for depth in range(3):
            candidate = drafter.propose(draft, 1)
            logits = decoder.logits  # of the base, whose head the adapter has
            assert logits is not None
            q = candidate.probs[0][0]
            hidden = outputs[depth][0, start + depth]
            head = decoder.head
            expected = head(hidden[None])
            cap = decoder.architecture.logit_cap
            expected = expected if cap is None else torch.tanh(expected / cap) * cap
            kept = sorted({*adapter.draft_vocabulary, *text})
            expected = expected[0, kept].softmax(-1)
            torch.testing.assert_close(q[kept], expected, rtol=1e-3, atol=1e-5)
            # The next drafted token is the text's, as in training.
            forced = torch.tensor([[text[start + depth + 1]]]) if start + depth < 9 else None
            if forced is None:
                break
            candidate.tokens.copy_(forced)
            draft.extend(candidate, 1, drafter.name)


@pytest.mark.parametrize("case", tiny_models.ONE_OF_EACH)
def test_gradients_reach_every_parameter(case):
    decoder = tiny_decoder(case)
    parameters = {n: t + 0.01 for n, t in adapter_parameters(case).items()}
    network = AdapterNetwork(decoder, parameters, 0.0)
    exit_states, last_states = states_over(decoder, random_prompt(decoder, 8), 1)
    outputs = network.outputs(exit_states[None], last_states[None], 2)
    (outputs[-1] * network.logit_scale).pow(3).sum().backward()
    without = [n for n, p in network.parameters.items() if p.grad is None or not p.grad.abs().sum()]
    assert not without


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_muon_moves_a_matrix_along_its_singular_vectors_by_equal_amounts(shape):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    parameter = torch.zeros(shape, requires_grad=True)
    parameter.grad = left @ torch.diag(torch.linspace(0.2, 5.0, min(shape))) @ right
    Muon([parameter], lr=0.5, weight_decay=0.0).step()
    moved = -parameter.detach() / 0.5
    assert moved.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)  # as by AdamW
    amounts = left.T @ moved @ right.T / (0.2 * max(shape) ** 0.5)
    assert 0.6 < amounts.diag().min() <= amounts.diag().max() < 1.3
    torch.testing.assert_close(amounts, amounts.diag().diag(), atol=1e-5, rtol=0.0)
