"""Reports with known contents."""

import torch
from scripted import scripted_model

from layerskip.lens import Lens, report_on

NASTY = {
    3: "</script><script>document.hacked = 1</script>",
    4: "<img src=x onerror='document.hacked = 1'>",
    5: "--><!-- $x$ {{ 7 * 7 }} \N{RIGHT-TO-LEFT OVERRIDE}abc",
    6: "ключ 鍵 مفتاح",
}


class Nasty:
    """Stands in for a tokenizer: what a vocabulary may hold at worst."""

    eos_token_id = None

    def decode(self, ids, **_):
        return "".join(NASTY.get(i, chr(96 + i)) for i in ids)


def hand_made_lens(columns, *, exits=(2, 4, 6, 8), prompt_tokens=1, start=1):
    """A lens whose columns list the top token of every exit, the lowest first."""
    top = torch.tensor(columns).T[..., None]
    return Lens(
        token_ids=tuple(range(start + len(columns))),
        prompt_tokens=prompt_tokens,
        exits=exits,
        positions=range(start, start + len(columns)),
        top_ids=top,
        top_probabilities=torch.full(top.shape, 0.5),
        answer_probabilities=torch.full(top.shape[:2], 0.5),
    )


def scripted_report(answer, *, misses=(), draft_tokens=3, prompt=(1, 2), tokenizer=None):
    """A self-speculative answer with exit layer 2 of 4; exits below 4 err at `misses`."""
    model = scripted_model(
        answer, misses=misses, prompt_tokens=len(prompt), tokenizer=tokenizer, end_tokens=()
    )
    made = model.generate(
        list(prompt),
        mode="self-speculative",
        exit_layer=2,
        draft_tokens=draft_tokens,
        max_new_tokens=len(answer),
    )
    return report_on(model, "scripted", list(prompt), made)


def nasty_report():
    """Seven tokens, some of which would like to be markup; drafts miss the fourth."""
    return scripted_report([3, 4, 5, 6, 7, 3, 4], misses={3}, tokenizer=Nasty())
