"""Hidden states kept between the layers are those that early exit decodes from, in float32."""

import pytest
import torch
from tiny_decoders import GREEDY, LAYERS, random_prompt, tiny_decoder

from exit_states import exit_states
from layerskip.decoding import Plan, generate
from layerskip.decoding.generate import PREFILL_CHUNK


@pytest.mark.parametrize("exit_layer", range(1, LAYERS + 1))
def test_early_exit_says_what_the_states_say(exit_layer):
    decoder = tiny_decoder("llama3.1")
    prompt = random_prompt(decoder, 9)
    plan = Plan(mode="early-exit", exit_layer=exit_layer)
    steps = generate(decoder, prompt, plan=plan, sampling=GREEDY, max_new_tokens=12)
    answer = [token for step in steps for token in step.tokens]
    states = exit_states(decoder, [*prompt, *answer[:-1]], [exit_layer])
    says = decoder.logits(states[exit_layer])[0].argmax(-1).tolist()
    assert says[len(prompt) - 1 :] == answer


def test_all_exits_in_one_pass_are_those_of_one_pass_each():
    decoder = tiny_decoder("llama3.1")
    tokens = random_prompt(decoder, PREFILL_CHUNK + 3)
    together = exit_states(decoder, tokens, [LAYERS, 0, 1, 2, 1])
    assert list(together) == [0, 1, 2, LAYERS]
    for e, states in together.items():
        alone = exit_states(decoder, tokens, [e])[e]
        assert states.shape == (1, len(tokens), decoder.architecture.hidden_size)
        torch.testing.assert_close(states, alone, rtol=0, atol=0)


def test_tokens_outside_the_vocabulary():
    decoder = tiny_decoder("llama2")
    with pytest.raises(ValueError, match="outside the vocabulary"):
        exit_states(decoder, [1, decoder.architecture.vocab_size], [1])
