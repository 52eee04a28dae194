"""The retrieval datastore: what most often followed in a text, in memory or in a file."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_decoders import model_of, tiny_decoder

from layerskip.decoding.datastore import MAX_MATCH, MIN_MATCH, Datastore
from layerskip.model.checkpoint import DRAFT_TEXT_FILE

VOCABULARY = 64


def test_a_datastore_proposes_what_most_often_came_next():
    text = Datastore.from_tokens((1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3, 5, 9))
    tokens, shares = text.propose([7, 1, 2], 9)
    assert tokens[:2] == [3, 5]  # 3 of 3 times, then 2 of 3
    assert shares[:2] == [pytest.approx(3 / 4), pytest.approx(2 / 4)]
    assert text.propose([1, 2], 1)[0] == [3]
    assert text.propose([8, 8], 9) == ([], [])
    assert text.propose([2], 9) == ([], [])  # one token is no match


def test_a_proposal_is_as_long_as_it_is_likely():
    once = Datastore.from_tokens(range(50))  # each token came next once: half as likely as not
    assert once.propose([2, 3, 4], 9)[0] == [5, 6, 7]  # an eighth; a sixteenth is under a tenth
    assert once.propose([3, 4], 9)[0] == [5, 6, 7]
    often = Datastore.from_tokens([*range(50)] * 9)
    assert often.propose([3, 4], 9)[0] == [*range(5, 14)]


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=7))
def test_the_next_token_is_a_most_common_one_behind_the_longest_match(tokens, tail):
    expected = None
    for n in range(MIN_MATCH, min(MAX_MATCH, len(tail)) + 1):
        places = range(n, len(tokens))
        after = Counter(tokens[i] for i in places if tokens[i - n : i] == tail[-n:])
        share = max(after.values(), default=0) / (after.total() + 1)
        if share >= 0.1:
            expected = after, share
    proposed, shares = Datastore.from_tokens(tokens).propose(tail, 1)
    if expected is None:
        assert (proposed, shares) == ([], [])
    else:
        after, share = expected
        assert after[proposed[0]] == max(after.values())
        assert shares == [pytest.approx(share)]


def test_a_short_text_proposes_nothing():
    for tokens in ((), (5,), (5, 6)):
        assert Datastore.from_tokens(tokens).propose([5, 6], 3) == ([], [])


def test_a_text_is_indexed_once():
    assert Datastore.of(None, 9) is None
    assert Datastore.of((1, 2, 3), 9) is Datastore.of((1, 2, 3), 9)


def test_a_saved_table_proposes_the_same(tmp_path):
    tokens = [*range(9), *range(3, 12), *range(9)] * 3
    text, file = Datastore.from_tokens(tokens), tmp_path / "a.table"
    text.save(file, VOCABULARY)
    again = Datastore.of(file, VOCABULARY)
    assert again is Datastore.of(file, VOCABULARY)  # read once
    for begin in range(9):
        tail = tokens[begin : begin + 5]
        assert again.propose(tail, 9) == text.propose(tail, 9) != ([], [])
    Datastore.from_tokens([1, 2, 3, 4] * 9).save(file, VOCABULARY)
    assert Datastore.of(file, VOCABULARY).propose([3, 4], 2)[0] == [
        1,
        2,
    ]  # read again where it changed


def test_a_table_of_another_vocabulary_is_refused(tmp_path):
    file = tmp_path / "a.table"
    Datastore.from_tokens([1, 2, 3, 4] * 9).save(file, VOCABULARY)
    with pytest.raises(ValueError, match="of a vocabulary of 64 tokens, but this model has 65"):
        Datastore.of(file, VOCABULARY + 1)


def test_a_damaged_table_is_named(tmp_path):
    for damage in (
        {"runs": lambda column: column[::-1].copy()},
        {"after": lambda column: column + VOCABULARY},
        {"after": lambda column: column.astype(np.int64)},
        {"shares": lambda column: column * np.nan},
        {"shares": lambda column: column[1:]},
        {"runs": lambda column: column[None]},
    ):
        file = tmp_path / "a.table"
        Datastore.from_tokens([1, 2, 3, 4] * 9).save(file, VOCABULARY)
        columns = load_file(file)
        for name, change in damage.items():
            columns[name] = change(columns[name])
        save_file(columns, file, {"kind": "layerskip draft text", "vocab_size": str(VOCABULARY)})
        with pytest.raises(ValueError, match=r"a\.table is damaged: make it again"):
            Datastore.of(file, VOCABULARY)


def test_files_that_are_no_table_are_named(tmp_path):
    other, text = tmp_path / "other.table", tmp_path / "text.table"
    save_file({"runs": np.zeros(3)}, other)
    text.write_text("abc")
    with pytest.raises(ValueError, match=r"other\.table is no datastore: make one with `layerskip"):
        Datastore.of(other, VOCABULARY)
    for file in (text, tmp_path / "nothing.table"):
        with pytest.raises(ValueError, match=rf"the datastore .*{file.name} cannot be read"):
            Datastore.of(file, VOCABULARY)


def test_a_table_drafts_and_the_answer_is_unchanged(tmp_path):
    decoder = tiny_decoder("llama2")
    file, vocab_size = tmp_path / DRAFT_TEXT_FILE, decoder.architecture.vocab_size
    model = model_of(decoder, draft_text=(1, 2, 3), draft_text_file=file)  # the file comes first
    plain = model.generate([3, 4, 5], mode="plain", max_new_tokens=24)
    Datastore.from_tokens([*plain.token_ids, 0] * 9).save(file, vocab_size)
    for options in ({}, {"datastore": file, "draft_from": "n-gram"}):
        answer = model.generate([3, 4, 5], max_new_tokens=24, **options)
        assert answer.token_ids == plain.token_ids
        assert answer.accepted > 10
    without = model.generate([3, 4, 5], max_new_tokens=24, datastore=())
    assert without.accepted < answer.accepted
    with pytest.raises(ValueError, match=r"the datastore .* cannot be read"):
        model.generate([3, 4, 5], datastore=tmp_path / "nothing.table")
