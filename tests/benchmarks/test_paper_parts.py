"""Text for the paper's experiments, and verification without reuse of the cache."""

import ast
import functools

import paper.kvq
import pytest
import torch
from paper.corpus import Corpus, first_words, functions, pieces

from layerskip import LayerSkipModel
from layerskip.decoding.drafters import EarlyExitDrafter
from layerskip.model import Decoder

SOURCE = '''
import os

class A:
    def told(self, x):
        """Say it."""
        return f"{x}\\n"

    def untold(self):
        return 1

def only_told():
    """Nothing else."""

@decorated
def both(a,
         b=2):
    """
    Add.
    """
    c = a + b

    return c
'''


class Letters:
    """A tokenizer for which every letter is a token."""

    def __call__(self, lines, add_special_tokens):
        return {"input_ids": [list(line) for line in lines]}


def test_functions_are_cut_after_their_docstring():
    found = list(functions([SOURCE, "not python at all :"]))
    assert {row["prompt"].split("(")[0] for row in found} == {"def told", "def both"}
    for row in found:
        whole = row["prompt"] + row["completion"]
        (node,) = ast.parse(whole).body
        assert ast.get_docstring(node)
        assert "return" not in row["prompt"]
        assert "return" in row["completion"]
        assert row["prompt"].endswith('"""')


def test_pieces_fit_and_lose_nothing_but_lines_that_are_too_long():
    lines = [f"line {i}\n" for i in range(30)]
    long = 60 * "x" + "\n"
    found = [row["text"] for row in pieces(["".join([*lines, long, "end\n"])], Letters(), 42)]
    assert "".join(found) == "".join([*lines, "end\n"])
    assert all(20 < len(text) <= 40 for text in found[:-1])


def test_held_out_files_are_not_learnt():
    corpus = Corpus.of(["stdlib"], 300_000)
    assert corpus == Corpus.of(["stdlib"], 300_000)
    assert corpus.held_out
    assert not set(corpus.train) & set(corpus.held_out)


def test_unknown_sources_are_named():
    with pytest.raises(ValueError, match="no_such_package"):
        Corpus.of(["no_such_package"])


def test_the_first_words_are_of_several_texts():
    text = first_words(["a " * 2000, "b " * 2000, "c " * 2000], 1500)
    assert {"a", "b"} == set(text.split())
    assert len(text.split()) == 2000


@pytest.fixture(scope="module")
def model(folder):
    return LayerSkipModel.from_pretrained(folder, dtype="float32")


def layers_run(monkeypatch, decoder):
    """(start, stop, positions) of each call from now on."""
    calls = []
    run = decoder.run

    def counted(hidden, start, stop, cache):
        calls.append((start, stop, hidden.shape[1]))
        return run(hidden, start, stop, cache)

    monkeypatch.setattr(decoder, "run", counted)
    # The kernels' step is a pass too, which they do not ask `run` for.
    monkeypatch.setattr(decoder, "draft", functools.partial(Decoder.draft, decoder))
    return calls


@pytest.mark.parametrize(
    ("way", "passes"),
    [
        (paper.kvq.WITH, [*4 * [(0, 2, 1)], (2, 4, 4)]),
        (paper.kvq.WITHOUT, [*3 * [(0, 2, 1)], (0, 4, 4)]),
    ],
)
def test_layers_of_a_round(model, monkeypatch, way, passes):
    drafter = paper.kvq.DRAFTERS[way](model.decoder, 2, paper.kvq.GREEDY)
    calls = layers_run(monkeypatch, model.decoder)
    paper.kvq.answer(model.decoder, drafter, [5, 6, 7], 3, 6)
    assert calls[0] == (0, 4, 3)
    assert calls[1 : 1 + len(passes)] == passes


def test_both_ways_draft_the_same(model):
    drafts = []
    for kind in (EarlyExitDrafter, paper.kvq.RecomputingDrafter):
        cache = model.decoder.new_cache(8)
        drafter = kind(model.decoder, 2, paper.kvq.GREEDY)
        with torch.inference_mode():
            drafts.append(drafter.draft(torch.tensor([[7]]), 4, cache, None, None))
    assert torch.equal(drafts[0].tokens, drafts[1].tokens)
    assert [draft.start for draft in drafts] == [2, 0]
    assert drafts[1].states.shape == drafts[0].states.shape


@pytest.mark.parametrize("exit_layer", [1, 2, 4])
@pytest.mark.parametrize("draft_tokens", [0, 1, 5])
def test_both_ways_give_plain_decodings_tokens(model, exit_layer, draft_tokens):
    found = paper.kvq.compared(model, [[5, 6, 7], [9]], exit_layer, draft_tokens, 9, 1)
    assert found["identical_to_plain"] == {"with": 1.0, "without": 1.0}
