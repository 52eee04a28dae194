"""Tokens to text: characters split over tokens, and stop strings wherever they fall."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerskip.decoding.stream import TextStream, stop_tokens
from scripted import END, TOKENIZER, WORDS, encode, words
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast


def streamed(tokens, stop=()):
    """The pieces of a stream, and the stream."""
    stream = TextStream(TOKENIZER, stop)
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    return pieces, stream


def expected_text(tokens, stop):
    """By definition: after each token look at all the text so far, cut at the earliest stop string."""
    text = ""
    for n in range(1, len(tokens) + 1):
        text = TOKENIZER.decode(tokens[:n], skip_special_tokens=True)
        # What may still become a character is no text yet.
        whole = text if n == len(tokens) else text.rstrip("\N{REPLACEMENT CHARACTER}")
        found = [at for one in stop if (at := whole.find(one)) >= 0]
        if found:
            return whole[: min(found)]
    return text


def test_characters_split_over_tokens_come_whole():
    text = "aé漢🙂b"
    tokens = encode(text)
    assert len(tokens) == 1 + 2 + 3 + 4 + 1
    pieces, _ = streamed(tokens)
    assert [piece for piece in pieces if piece] == list(text)


def test_an_incomplete_character_at_the_end_is_released_as_it_is():
    pieces, stream = streamed(encode("a漢")[:-1])
    assert pieces[:-1] == ["a", "", ""]
    assert stream.text == "a\N{REPLACEMENT CHARACTER}"


def test_bytes_that_are_no_text_do_not_block_what_follows():
    broken = encode("é")[:1]
    _, stream = streamed([*broken, *encode("abSTOPc")], ["STOP"])
    assert stream.text == "\N{REPLACEMENT CHARACTER}ab"


def test_stop_strings_that_are_a_token_by_themselves():
    (stop,) = encode("S")
    assert stop_tokens(TOKENIZER, ["S", "STOP", "漢"]) == {stop}
    assert stop_tokens(TOKENIZER, []) == frozenset()


def test_special_tokens_have_no_text():
    pieces, _ = streamed([*encode("ab"), END, END, *encode("c"), END])
    assert "".join(pieces) == "abc"


@pytest.mark.parametrize(
    ("tokens", "stop", "text"),
    [
        (encode("one. two"), ["."], "one"),  # one token
        (encode("oneENDtwo"), ["END"], "one"),  # several tokens
        (words("hello", "Ġworld"), ["lo wo"], "hel"),  # begins and ends inside tokens
        (words("hello", "Ġworld"), ["hello"], ""),  # at the start
        (words("hello", "Ġworld"), ["world"], "hello "),  # at the end
        (words("hello", "Ġworld"), ["ell"], "h"),  # inside one token
        (encode("abcdef"), ["ef", "cd"], "ab"),  # the earliest, not the first in the list
        (words("ab", "bc"), ["bb", "ab"], ""),
        (words("hello"), ["o", "e", "l"], "h"),  # several in one token
        (encode("aaab"), ["aab"], "a"),  # begins again inside a false start
        (encode("ababac"), ["abac"], "ab"),
        (encode("x漢y"), ["漢"], "x"),  # a character of several tokens
        (encode("a\nb\n\nc"), ["\n\n"], "a\nb"),
        (encode("EN"), ["END"], "EN"),  # begun but never finished
        (encode("ab"), ["AB"], "ab"),
    ],
)
def test_text_ends_before_the_stop_string(tokens, stop, text):
    pieces, stream = streamed(tokens, stop)
    assert "".join(pieces) == stream.text == text
    assert stream.stopped == (text != TOKENIZER.decode(tokens))


def test_what_may_begin_a_stop_string_waits():
    stream = TextStream(TOKENIZER, ["END"])
    assert [stream.push(token) for token in encode("xENxEN")] == ["x", "", "", "ENx", "", ""]
    assert stream.finish() == "EN"
    stream = TextStream(TOKENIZER, ["END"])
    assert [stream.push(token) for token in encode("xEND")] == ["x", "", "", ""]
    assert (stream.stopped, stream.finish()) == (True, "")


# Few characters, so that stop strings are met, begun in vain, and overlap; some of several bytes.
texts = st.text(alphabet="abé漢", max_size=14)
tokens_of_texts = texts.map(encode) | st.lists(
    st.sampled_from([*encode("abé漢"), *words(*WORDS), END]), max_size=12
)
stop_strings = st.lists(st.text(alphabet="abcé漢", min_size=1, max_size=4), max_size=3)


@given(tokens=tokens_of_texts, stop=stop_strings)
def test_pieces_are_the_text_up_to_the_first_stop_string(tokens, stop):
    pieces, stream = streamed(tokens, stop)
    assert stream.text == expected_text(tokens, stop)
    # Nothing that was released had to be taken back, so no part of a stop string was ever shown.
    released = ""
    for piece in pieces:
        released += piece
        assert stream.text.startswith(released)


@given(text=texts, stop=stop_strings)
def test_no_stop_string_is_in_the_text(text, stop):
    _, stream = streamed(encode(text), stop)
    assert not any(one in stream.text for one in stop)


@pytest.mark.parametrize("stop", [[""], ["a", ""], [3], [b"a"]])
def test_stop_strings_are_checked(stop):
    with pytest.raises(ValueError, match="stop string"):
        TextStream(TOKENIZER, stop)


def test_a_space_that_stands_first_is_kept_where_a_text_goes_on():
    """As SentencePiece has it: decoding alone leaves the first space out."""
    pieces = ["<s>", "def", "\u2581f", "\n", "\u2581\u2581\u2581", "\u2581return", "<0xE6>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")

    def text(tokens, before):
        stream = TextStream(wrapped, ("    re",), before)
        return [stream.push(token) for token in tokens] + [stream.finish()]

    assert "".join(text([4, 5], ())) == "   return"
    assert text([4, 5], (0, 1, 2, 3)) == ["", "", ""]  # the stop string is there from the start
    assert "".join(text([4, 2], (0, 1, 2, 3))) == "    f"
    # Half of a character is no text to go on from.
    assert "".join(text([1, 2], (0, 1, 6))) == "def f"


def test_special_tokens_by_name():
    assert stop_tokens(TOKENIZER, ("<end>", "<end> ")) == {END}
    assert stop_tokens(TOKENIZER, ()) == frozenset()


@pytest.mark.parametrize("fails_at", range(20))
def test_a_push_that_is_broken_off_can_be_made_again(fails_at):
    """Whichever of its decodings Ctrl-C comes into."""
    text = "aé漢🙂b" * 2
    stream, calls = TextStream(TOKENIZER), itertools.count()
    decode = stream._decode

    def interrupted(tokens):
        if next(calls) == fails_at:
            raise KeyboardInterrupt
        return decode(tokens)

    stream._decode = interrupted
    pieces = []
    for token in encode(text):
        try:
            pieces.append(stream.push(token))
        except KeyboardInterrupt:
            pieces.append(stream.push(token))
    assert next(calls) > fails_at
    assert "".join([*pieces, stream.finish()]) == stream.text == text
