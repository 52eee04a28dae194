"""A controller that mixes sources of drafts at random, to test everything that drafts consist of."""

import importlib
import random

from layerskip.decoding import controller


class MixedController:
    """Drafts some tokens of a look-up, then one of the early exit, and so on.

    Its choices depend on the positions alone, never on sampled tokens, so that sampling stays exact.
    """

    def __init__(self, drafters, costs, **_):
        self._lookups = [drafter for drafter in drafters if not drafter.num_layers]
        self._exit = next(drafter for drafter in drafters if drafter.num_layers)
        self._random = random.Random(0)

    def fill(self, draft, max_tokens):
        while len(draft) < max_tokens and self._random.random() < 0.9:
            lookup = self._random.choice(self._lookups)
            n = self._random.randrange(3)
            candidate = lookup.propose(draft, min(n, max_tokens - len(draft)))
            draft.extend(candidate, len(candidate), "n-gram")
            draft.token_ids += candidate.token_ids
            if len(draft) < max_tokens and self._random.random() < 0.7:
                candidate = self._exit.propose(draft, 1)
                draft.extend(candidate, 1, "early-exit")
                draft.token_ids += candidate.token_ids

    def update(self, draft, tokens, accepted):
        pass


def mix_drafts(monkeypatch):
    """Replace the adaptive controller, and compute no costs."""
    loop = importlib.import_module("layerskip.decoding.generate")  # a function has that name too
    monkeypatch.setattr(loop, "DraftController", MixedController)
    monkeypatch.setattr(controller.DraftCosts, "of", classmethod(lambda *_: None))
