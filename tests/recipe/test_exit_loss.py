"""The chunked loss against the same sum written out with whole logits, float32."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from layerskip.recipe.exit_loss import exit_losses, rows_of_chunk

ROWS, TOKENS, HIDDEN, VOCABULARY = 3, 7, 8, 23
WEIGHTS = {2: 0.2, 3: 0.3, 5: 0.5}


def setting(cap=None):
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(HIDDEN)
    head = torch.nn.Linear(HIDDEN, VOCABULARY)
    states = {e: torch.randn(ROWS, TOKENS, HIDDEN, requires_grad=True) for e in WEIGHTS}
    labels = torch.randint(0, VOCABULARY, (ROWS, TOKENS))
    labels[0, :4] = labels[1, 6] = -100
    parameters = [*norm.parameters(), *head.parameters()]

    def shared_exit(hidden):
        logits = head(norm(hidden))
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return states, labels, shared_exit, parameters


def reference(states, labels, shared_exit, items, distillation_weight):
    teacher = shared_exit(states[5]).log_softmax(-1).detach()
    kept = labels != -100
    loss = 0
    for exit_layer, weight in WEIGHTS.items():
        logits = shared_exit(states[exit_layer])
        exit_loss = functional.cross_entropy(logits[kept], labels[kept], reduction="sum")
        if exit_layer != 5:
            divergence = functional.kl_div(
                logits.log_softmax(-1)[kept], teacher[kept], reduction="sum", log_target=True
            )
            exit_loss = exit_loss + distillation_weight * divergence
        loss = loss + weight * exit_loss / items
    return loss


@pytest.mark.parametrize(
    ("distillation_weight", "chunk", "cap"), [(0.0, None, None), (0.7, 1, 0.5), (0.7, 12, None)]
)
def test_loss_and_gradients(distillation_weight, chunk, cap):
    states, labels, shared_exit, parameters = setting(cap)
    leaves = [*states.values(), *parameters]
    expected = reference(states, labels, shared_exit, 11.0, distillation_weight)
    expected_gradients = torch.autograd.grad(2 * expected, leaves)
    options = {"distillation_weight": distillation_weight, "chunk_tokens": chunk}
    losses = run(states, labels, shared_exit, parameters, num_items=11.0, **options)
    gradients = torch.autograd.grad(2 * losses.loss, leaves)
    torch.testing.assert_close(losses.loss, expected)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_large_vocabularies_do_not_make_small_chunks_on_a_gpu():
    assert rows_of_chunk(49_152, "cpu") == 1365
    assert rows_of_chunk(256_000, "cpu") == 262
    assert rows_of_chunk(256_000, "cuda") == 2048
    assert rows_of_chunk(1000, "cuda") == 67_108


def run(states, labels, shared_exit, parameters, **options):
    return exit_losses(
        states, labels, WEIGHTS, shared_exit, parameters, vocab_size=VOCABULARY, **options
    )


def test_each_exits_own_figures():
    states, labels, shared_exit, parameters = setting()
    losses = run(states, labels, shared_exit, parameters)
    kept = labels != -100
    assert losses.exits == (2, 3, 5)
    assert losses.tokens == kept.sum() == 16
    for index, exit_layer in enumerate(losses.exits):
        logits = shared_exit(states[exit_layer])[kept]
        expected = functional.cross_entropy(logits, labels[kept], reduction="sum")
        torch.testing.assert_close(losses.loss_sums[index], expected.detach())
        assert losses.correct[index] == (logits.argmax(-1) == labels[kept]).sum()
    mean = (torch.tensor(list(WEIGHTS.values())) * losses.loss_sums / 16).sum()
    torch.testing.assert_close(losses.loss.detach(), mean)


@pytest.mark.parametrize("items", [None, torch.tensor(0)])
def test_a_batch_without_labels_has_no_loss_and_no_gradient(items):
    states, labels, shared_exit, parameters = setting()
    labels[:] = -100
    losses = run(states, labels, shared_exit, parameters, num_items=items)
    losses.loss.backward()
    assert losses.loss == 0
    assert all(not p.grad.any() for p in (*parameters, *states.values()))


def test_a_second_backward_says_why_not():
    losses = run(*setting())
    losses.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        losses.loss.backward()


def test_logits_exist_for_one_chunk_at_a_time_and_chunks_are_even():
    states, labels, shared_exit, parameters = setting()
    sizes = []

    def watched(hidden):
        sizes.append(len(hidden))
        return shared_exit(hidden)

    run(states, labels, watched, parameters, chunk_tokens=15)
    assert sizes == [12] * 4  # 16 labelled positions of 3 exits; 5 of each would fit


_PEAK = """
import torch
from layerskip.recipe.exit_loss import exit_losses
from layerskip.model.hardware import peak_memory_bytes

tokens, hidden, vocabulary = 256, 32, 16384
head = torch.nn.Linear(hidden, vocabulary, bias=False)
labels = torch.randint(0, vocabulary, (1, tokens))
for exits in (1, 24):
    states = {e: torch.randn(1, tokens, hidden, requires_grad=True) for e in range(exits)}
    losses = exit_losses(
        states, labels, dict.fromkeys(states, 1 / exits), head, [head.weight],
        chunk_tokens=128, vocab_size=vocabulary,
    )
    losses.loss.backward()
    print(peak_memory_bytes(torch.device("cpu")) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the parent's peak may count")
def test_peak_memory_does_not_grow_with_the_exits():
    """All logits of 24 exits are 400 MB; those of a chunk, which one exit has too, are 8."""
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    one, many = map(int, done.stdout.split())
    assert many - one < 40 * 1024


def test_an_exit_adds_no_more_than_the_gradient_of_its_labelled_states(monkeypatch):
    """Nothing of the size of all exits' states is made before the backward pass."""
    tokens, hidden, vocabulary = 64, 256, 300
    states = {e: torch.randn(1, tokens, hidden, requires_grad=True) for e in range(8)}
    labels = torch.randint(vocabulary, (1, tokens))
    head = torch.nn.Linear(hidden, vocabulary, bias=False)
    stack, sizes = torch.stack, []

    def watched(tensors, *args):
        sizes.append(stack(tensors, *args).numel())
        return stack(tensors, *args)

    monkeypatch.setattr(torch, "stack", watched)
    weights = dict.fromkeys(states, 1.0)
    run_with = {"chunk_tokens": 32, "vocab_size": vocabulary}
    exit_losses(states, labels, weights, head, [head.weight], **run_with)
    assert sizes == [8 * 4 * hidden] * 16


def test_the_heads_gradient_is_not_summed_in_16_bits():
    """Many chunks, each of which adds less than the last place of the sum."""
    torch.manual_seed(0)
    head = torch.nn.Parameter(torch.randn(VOCABULARY, HIDDEN).bfloat16())
    states = {1: torch.ones(1, 2000, HIDDEN).bfloat16()}
    labels = torch.zeros(1, 2000, dtype=torch.long)
    gradients = []
    for chunk in (1, 2000):
        head.grad = None
        options = {"chunk_tokens": chunk, "vocab_size": VOCABULARY}
        losses = exit_losses(states, labels, {1: 1.0}, lambda h: h @ head.T, [head], **options)
        losses.loss.backward()
        gradients.append(head.grad.float())
    torch.testing.assert_close(*gradients, rtol=0.02, atol=1e-3)


def test_small_gradients_survive_float16():
    """Most of a slope is a probability times a weight, far below what float16 can hold."""
    states, labels, shared_exit, parameters = setting()
    tiny = {2: 1e-7, 3: 1e-7, 5: 1 - 2e-7}
    wanted = [states[2], *parameters]
    expected = torch.autograd.grad(
        exit_losses(states, labels, tiny, shared_exit, parameters, vocab_size=VOCABULARY).loss,
        wanted,
    )
    with torch.autocast("cpu", dtype=torch.float16):
        loss = exit_losses(
            states, labels, tiny, shared_exit, parameters, vocab_size=VOCABULARY
        ).loss
    torch.testing.assert_close(torch.autograd.grad(loss, wanted), expected, rtol=1e-5, atol=0)
