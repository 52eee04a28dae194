"""The decoding loop gives the tokens and the rounds of `reference.py`, greedy, in float32."""

import pytest
from tiny_decoders import (
    FREE,
    LAYERS,
    NGRAMS,
    PLAIN,
    batch_ids,
    ids,
    random_prompt,
    speculative,
    steps,
    tiny_decoder,
)

from layerskip.decoding import reference
from tiny_models import ONE_OF_EACH

COMPILED = ("llama3.1", "llama3.2", "mistral", "gemma2-uncapped")
DECODERS = [(case, False) for case in ONE_OF_EACH] + [(case, True) for case in COMPILED]
NEW_TOKENS = 16


@pytest.fixture(params=DECODERS, ids=lambda p: f"{p[0]}-{'compiled' if p[1] else 'pytorch'}")
def decoder(request):
    case, compiled = request.param
    if compiled:
        request.getfixturevalue("compiled_kernels")
    return tiny_decoder(case, 1.0 if case.startswith("gemma") else 0.3, compiled=compiled)


def test_greedy_tokens_are_those_of_the_reference(decoder):
    prompt = [*random_prompt(decoder, 5), *random_prompt(decoder, 5)]
    plain = reference.generate_plain(decoder, prompt, NEW_TOKENS)
    drafting = {"exit_layer": 1, "draft_tokens": 3}
    assert reference.generate_self_speculative(decoder, prompt, NEW_TOKENS, **drafting) == plain
    for config, measured in (
        (PLAIN, None),
        (speculative(1, 3), None),
        (speculative(LAYERS - 1, 5, draft_vocabulary=tuple(range(40))), None),
        (NGRAMS, None),
        (speculative(1, 6, adaptive=True, draft_from="both", datastore=tuple(plain)), FREE),
    ):
        assert ids(decoder, prompt, config, NEW_TOKENS, measured=measured) == plain, config


@pytest.mark.parametrize(
    "decoder",
    [("llama3.1", False), ("gemma2", False), ("mixtral", False), *((c, True) for c in COMPILED)],
    indirect=True,
)
def test_rounds_are_those_of_the_reference(decoder, monkeypatch):
    """The same numbers of drafted and accepted tokens, so the drafts are those of the exit."""
    prompt, rounds, exit_layer = random_prompt(decoder, 9), [], 2
    accept = reference.accept

    def record(draft, *args):
        accepted, following = accept(draft, *args)
        rounds.append((len(draft), accepted, following))
        return accepted, following

    monkeypatch.setattr(reference, "accept", record)
    first, *rest = steps(decoder, prompt, speculative(exit_layer, 3), NEW_TOKENS)
    reference.generate_self_speculative(
        decoder, [*prompt, *first.tokens], NEW_TOKENS - 1, exit_layer=exit_layer, draft_tokens=3
    )
    assert [(step.drafted, step.accepted, step.tokens[-1]) for step in rest] == rounds


@pytest.mark.parametrize("compiled", [False, True], ids=["pytorch", "compiled"])
@pytest.mark.parametrize("config", [PLAIN, speculative(1, 3)], ids=["plain", "speculative"])
def test_rows_of_a_batch_are_those_of_the_reference(compiled, config, request):
    if compiled:
        request.getfixturevalue("compiled_kernels")
    decoder = tiny_decoder("llama3.1", compiled=compiled)
    prompts = [random_prompt(decoder, n, seed=n) for n in (1, 9, 4)]
    assert batch_ids(decoder, prompts, config, 12) == [
        reference.generate_plain(decoder, prompt, 12) for prompt in prompts
    ]
