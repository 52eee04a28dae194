"""Helper: hidden states of a whole text at some exits."""

import torch

from layerskip.decoding import iter_exit_hidden_states


def exit_states(decoder, token_ids, exits):
    """Return exit -> [1, T, D], before the final norm, in ascending order of exits."""
    parts = {e: [] for e in sorted(set(exits))}
    tokens = torch.tensor([list(token_ids)], device=decoder.device)
    for _, e, hidden in iter_exit_hidden_states(decoder, tokens, exits):
        parts[e].append(hidden)
    return {e: torch.cat(states, dim=1) for e, states in parts.items()}
