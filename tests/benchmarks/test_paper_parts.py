"""Corpora of the paper's experiments, and verification without reuse of the KV cache."""

import argparse
import ast

import paper.kvq
import paper.task
import pytest
from paper.corpus import Corpus, first_words, functions, pieces

from layerskip import LayerSkipModel

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
    return calls


@pytest.mark.parametrize(
    ("way", "passes"),
    [
        (paper.kvq.WITH, [*4 * [(0, 2, 1)], (2, 4, 4)]),
        (paper.kvq.WITHOUT, [*3 * [(0, 2, 1)], (0, 4, 4)]),
    ],
)
def test_layers_of_a_round(model, monkeypatch, way, passes):
    calls = layers_run(monkeypatch, model.decoder)
    paper.kvq.decode(model.decoder, [5, 6, 7], 2, 3, 6, reuse=way == paper.kvq.WITH)
    assert calls[0] == (0, 4, 3)
    assert calls[1 : 1 + len(passes)] == passes


@pytest.mark.parametrize(("exit_layer", "draft_tokens"), [(1, 0), (2, 5), (4, 1)])
def test_both_ways_give_plain_decodings_tokens(model, exit_layer, draft_tokens):
    found = paper.kvq.compared(model, [[5, 6, 7], [9]], exit_layer, draft_tokens, 9, 1)
    assert found["identical_to_plain"] == {"with": 1.0, "without": 1.0}


@pytest.mark.parametrize("variant", paper.task.VARIANTS)
def test_settings_of_topv2_fit_the_model(variant, tmp_path):
    options = argparse.Namespace(
        model="smollm2-135m", steps=500, minutes=None, work=tmp_path, smoke=False
    )
    paper.task._config(variant, options).recipe.check_layers(30)
