"""Tokens to text, stop strings anywhere in it, answers piece by piece, and their statistics."""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import END, TOKENIZER, WORDS, encode, scripted_model, words
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from layerskip.decoding import Answer, Step, language_model
from layerskip.decoding.streaming import TextStream, stop_tokens
from layerskip.model import step_timing

SPECULATIVE = {"mode": "self-speculative", "exit_layer": 2, "draft_tokens": 4}

# --- the text -----------------------------------------------------------------------------------


def stream_of(tokens, stop=()):
    """Return the pieces of a stream, and the stream."""
    stream, pieces = TextStream(TOKENIZER, stop), []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    return pieces, stream


def expected_text(tokens, stop):
    """Return the text up to the earliest stop string, from all text so far after each token."""
    text = ""
    for n in range(1, len(tokens) + 1):
        text = TOKENIZER.decode(tokens[:n], skip_special_tokens=True)
        # An incomplete character is no text yet.
        whole = text if n == len(tokens) else text.rstrip("\N{REPLACEMENT CHARACTER}")
        positions = [at for one in stop if (at := whole.find(one)) >= 0]
        if positions:
            return whole[: min(positions)]
    return text


def test_characters_of_several_tokens():
    """They come whole; incomplete ones are released at the end, and do not block what follows."""
    pieces, _ = stream_of([*encode("aé漢🙂b"), END])
    assert [piece for piece in pieces if piece] == list("aé漢🙂b")
    pieces, stream = stream_of(encode("a漢")[:-1])
    assert pieces[:-1] == ["a", "", ""]
    assert stream.text == "a\N{REPLACEMENT CHARACTER}"
    _, stream = stream_of([*encode("é")[:1], *encode("abSTOPc")], ["STOP"])
    assert stream.text == "\N{REPLACEMENT CHARACTER}ab"


def test_stop_strings_that_are_a_token():
    (stop,) = encode("S")
    assert stop_tokens(TOKENIZER, ["S", "STOP", "漢"]) == {stop}
    assert stop_tokens(TOKENIZER, ("<end>", "<end> ")) == {END}
    assert stop_tokens(TOKENIZER, []) == frozenset()


def test_text_ends_before_the_stop_string():
    for tokens, stop, text in (
        (encode("one. two"), ["."], "one"),  # one token
        (encode("oneENDtwo"), ["END"], "one"),  # several tokens
        (words("hello", "Ġworld"), ["lo wo"], "hel"),  # begins and ends inside tokens
        (words("hello", "Ġworld"), ["hello"], ""),  # at the start
        (words("hello", "Ġworld"), ["ell"], "h"),  # inside one token
        (encode("abcdef"), ["ef", "cd"], "ab"),  # the earliest, not the first in the list
        (words("hello"), ["o", "e", "l"], "h"),  # several in one token
        (encode("aaab"), ["aab"], "a"),  # begins again inside a false start
        (encode("x漢y"), ["漢"], "x"),  # a character of several tokens
        (encode("EN"), ["END"], "EN"),  # begun but never finished
    ):
        pieces, stream = stream_of(tokens, stop)
        assert "".join(pieces) == stream.text == text
        assert stream.stopped == (text != TOKENIZER.decode(tokens))


def test_the_beginning_of_a_stop_string_is_held_back():
    stream = TextStream(TOKENIZER, ["END"])
    assert [stream.push(token) for token in encode("xENxEN")] == ["x", "", "", "ENx", "", ""]
    assert stream.finish() == "EN"
    stream = TextStream(TOKENIZER, ["END"])
    assert [stream.push(token) for token in encode("xEND")] == ["x", "", "", ""]
    assert (stream.stopped, stream.finish()) == (True, "")


# Few characters, so that stop strings are met, begun in vain, and overlap; some of several bytes.
tokens_of_texts = st.text(alphabet="abé漢", max_size=14).map(encode) | st.lists(
    st.sampled_from([*encode("abé漢"), *words(*WORDS), END]), max_size=12
)
stop_strings = st.lists(st.text(alphabet="abcé漢", min_size=1, max_size=4), max_size=3)


@given(tokens=tokens_of_texts, stop=stop_strings)
def test_pieces_are_the_text_up_to_the_first_stop_string(tokens, stop):
    pieces, stream = stream_of(tokens, stop)
    assert stream.text == expected_text(tokens, stop)
    assert not any(one in stream.text for one in stop)
    released = ""
    for piece in pieces:  # nothing that was released had to be taken back
        released += piece
        assert stream.text.startswith(released)


def test_stop_strings_are_checked():
    for stop in (["a", ""], [3]):
        with pytest.raises(ValueError, match="stop string"):
            TextStream(TOKENIZER, stop)


def test_a_first_space_is_kept_where_a_text_continues():
    """SentencePiece decoders leave the first space of a text out."""
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
    # Half of a character is no text to continue.
    assert "".join(text([1, 2], (0, 1, 6))) == "def f"


# --- answers ------------------------------------------------------------------------------------


def test_pieces_name_the_source_of_each_token():
    model = scripted_model(encode("abcdefgh"), misses={3})
    pieces = list(model.answer([0], max_new_tokens=8, **SPECULATIVE))
    assert "".join(piece.text for piece in pieces) == "abcdefgh"
    assert [piece.token_id for piece in pieces] == encode("abcdefgh")
    # a: the prompt's own; d: corrected; h: the model's own
    assert "".join(piece.text for piece in pieces if piece.drafted) == "bcefg"
    assert {(piece.drafted, piece.source) for piece in pieces} == {
        (True, "early-exit"),
        (False, "model"),
    }


def test_an_abandoned_answer_has_the_tokens_taken_so_far_and_can_be_resumed():
    model = scripted_model(encode("abcdefghij"))
    answer = model.answer([0], mode="self-speculative", exit_layer=3, draft_tokens=8)
    pieces = iter(answer)
    assert [next(pieces).text for _ in range(4)] == ["a", "b", "c", "d"]
    pieces.close()
    result = answer.generation
    assert (result.text, result.finish_reason) == ("abcd", "interrupted")
    assert result.token_ids == encode("abcd")
    assert [token for step in result.steps for token in step.tokens] == result.token_ids
    whole, resumed = model.generate([0], mode="plain"), answer.complete()
    assert (resumed.text, resumed.token_ids) == (whole.text, whole.token_ids)
    drafting = {"mode": "self-speculative", "exit_layer": 3, "draft_tokens": 8}
    assert resumed.rounds == model.generate([0], **drafting).rounds


@pytest.mark.parametrize("fails_at", [0, 4, 10])
@pytest.mark.parametrize(("way", "stop"), [("pieces", ()), ("pieces", ("Z",)), ("complete", ())])
def test_ctrl_c_while_text_is_decoded_loses_and_repeats_nothing(fails_at, way, stop, monkeypatch):
    text = "abcdefghijkl"
    model, calls = scripted_model(encode(text), misses={4}), itertools.count()
    answer = model.answer([0], max_new_tokens=len(text), stop=stop, **SPECULATIVE)
    decode = TextStream._decode

    def interrupted(self, tokens):
        if next(calls) == fails_at:
            raise KeyboardInterrupt
        return decode(self, tokens)

    monkeypatch.setattr(TextStream, "_decode", interrupted)
    shown = ""
    for _ in range(2):  # the second time nothing interrupts
        with contextlib.suppress(KeyboardInterrupt):
            if way == "complete":
                answer.complete()
            for piece in answer:
                shown += piece.text
        with contextlib.suppress(KeyboardInterrupt):
            part = answer.generation
            assert part.token_ids == encode(text)[: part.new_tokens]
    result = answer.generation
    assert (result.token_ids, result.text) == (encode(text), text)
    assert [token for step in result.steps for token in step.tokens] == result.token_ids
    if way == "pieces":
        assert shown == text


def test_an_answer_interrupted_inside_a_character_has_the_text_before_it():
    model = scripted_model([*encode("ab"), *encode("\N{EURO SIGN}")[:2]])
    answer = model.answer([0], mode="plain", max_new_tokens=5)
    for step in itertools.islice(answer._loop, 4):
        answer.take(step)
    assert len(answer.generation.token_ids) == 4
    assert answer.generation.text == "ab"


def test_an_answer_left_at_its_last_token_has_all_its_text():
    """The beginning of a stop string is text where nothing more comes."""
    for n_tokens, reason in ((2, "length"), (3, "stop")):
        answer = scripted_model([*encode("aS"), END]).answer(
            [0], stop=["STOP"], max_new_tokens=n_tokens
        )
        pieces = iter(answer)
        shown = "".join(next(pieces).text for _ in range(n_tokens))
        assert (answer.generation.text, answer.generation.finish_reason) == ("aS", reason)
        assert shown + "".join(piece.text for piece in pieces) == "aS"


def test_a_stream_that_is_closed_closes_its_answer(monkeypatch):
    model, closed = scripted_model(encode("abcdef")), []
    close = Answer.close
    monkeypatch.setattr(Answer, "close", lambda self: closed.append(close(self)))
    stream = model.stream([0], mode="plain", max_new_tokens=6)
    assert next(stream) == "a"
    assert closed == []
    stream.close()
    assert closed == [None]
    assert list(model.stream([0], mode="plain", max_new_tokens=6)) == list("abcdef")


# --- statistics ---------------------------------------------------------------------------------

ANSWER = encode("abcdefghijkl")


def test_a_known_pattern_of_misses():
    """Twelve tokens, drafts of four, the draft wrong about tokens 3 and 4 (counted from 0).

    prompt   token 0
    round 1  drafts 1-4, 3 is wrong: 2 accepted, own 3
    round 2  drafts 4-7, 4 is wrong: 0 accepted, own 4
    round 3  drafts 5-8:             4 accepted, own 9
    round 4  drafts 10, no room for more: 1 accepted, own 11
    """
    result = scripted_model(ANSWER, misses={3, 4}).generate([0], max_new_tokens=12, **SPECULATIVE)
    assert result.token_ids == ANSWER
    counts = [(len(step.tokens), step.drafted, step.accepted, step.source) for step in result.steps]
    assert counts == [
        (1, 0, 0, "model"),
        (3, 4, 2, "early-exit"),
        (1, 4, 0, "early-exit"),
        (5, 4, 4, "early-exit"),
        (2, 1, 1, "early-exit"),
    ]
    assert (result.rounds, result.drafted, result.accepted) == (4, 13, 7)
    assert (result.acceptance_rate, result.mean_accepted_length) == (7 / 13, 11 / 4)
    assert result.accepted_by_position == [3 / 4, 2 / 3, 1 / 3, 1 / 3]


def test_an_end_inside_a_draft():
    for answer, misses, options, step in (
        # Tokens 1-4 are drafted and right, but 2 is the end: two of two count.
        ([*encode("ab"), END, *encode("cdefgh")], (), {}, (2, 2, 4, ())),
        (encode("abSTOPcd"), (), {"stop": "STOP", "draft_tokens": 7}, (5, 5, 7, ())),
        # Token 2 is wrong in the draft: the model's own token there is the end, the round is whole.
        (
            [*encode("ab"), END, *encode("cdefgh")],
            {2},
            {},
            (4, 1, 4, (END + 1, *encode("cd"))),
        ),
    ):
        model = scripted_model(answer, misses=misses)
        result = model.generate([0], **{**SPECULATIVE, **options})
        drafted, accepted, proposed, rejected = step
        sources = ("early-exit",) * proposed
        expected = Step(tuple(result.token_ids[1:]), drafted, accepted, sources, rejected)
        assert result.steps[-1] == expected
        assert result.acceptance_rate == accepted / drafted
        assert (result.rounds, result.mean_accepted_length) == (1, len(expected.tokens))


def test_without_drafts():
    for mode in ({"mode": "plain"}, {"mode": "early-exit", "exit_layer": 2}):
        result = scripted_model(ANSWER, misses={3}).generate([0], max_new_tokens=5, **mode)
        assert (result.rounds, result.drafted, result.accepted) == (0, 0, 0)
        assert (result.acceptance_rate, result.mean_accepted_length) == (None, None)
        assert result.accepted_by_position == []
        assert result.draft_tokens is None
        # Drafts of no tokens are rounds all the same.
        options = {"exit_layer": 2, "draft_tokens": 0, "max_new_tokens": 5}
        result = scripted_model(ANSWER).generate([0], **options)
        assert (result.rounds, result.drafted, result.mean_accepted_length) == (4, 0, 1.0)
        assert result.acceptance_rate is None


def test_times(monkeypatch):
    """The clock is read at the start and once a step; speed counts the tokens after the first."""
    seconds = itertools.count()
    monkeypatch.setattr(language_model, "device_clock", lambda device: lambda: next(seconds))
    model = scripted_model(ANSWER)
    result = model.generate([0], mode="plain", max_new_tokens=6)
    assert (result.ttft_s, result.decode_s, result.tokens_per_s) == (1, 5, 5 / 5)
    result = model.generate([0], max_new_tokens=12, **SPECULATIVE)
    assert [len(step.tokens) for step in result.steps] == [1, 5, 5, 1]
    assert (result.ttft_s, result.decode_s, result.tokens_per_s) == (1, 3, 11 / 3)
    result = model.generate([0], max_new_tokens=1)
    assert (result.ttft_s, result.decode_s, result.tokens_per_s) == (1, 0, None)
    # Prompts that are answered one after the other do not count each other's time; those of a
    # batch have that of its pass.
    options = {"max_new_tokens": 2, "mode": "plain"}
    one_by_one = model.generate([[5], [6], [7]], repetition_penalty=1.1, **options)
    assert [answer.ttft_s for answer in one_by_one] == [1, 1, 1]
    assert [answer.ttft_s for answer in model.generate([[5], [6], [7]], **options)] == [3, 3, 3]


def test_time_in_a_pause_is_not_counted(monkeypatch):
    now = 0.0
    monkeypatch.setattr(language_model, "device_clock", lambda device: lambda: now)
    answer = scripted_model(ANSWER).answer([0], mode="plain", max_new_tokens=6)
    for _ in answer:
        with answer.paused():
            now += 100
        now += 1
    assert (answer.generation.ttft_s, answer.generation.decode_s) == (0, 5)


def test_the_clock_waits_for_the_device(monkeypatch):
    events = []
    stream = SimpleNamespace(synchronize=lambda: events.append("this thread's stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(step_timing.time, "perf_counter", lambda: events.append("read") or 7.0)
    for device, waits in (("cuda", ["this thread's stream"]), ("cpu", [])):
        events.clear()
        assert step_timing.device_clock(torch.device(device))() == 7.0
        assert events == [*waits, "read"]  # not for the whole device, which may capture a graph


def test_to_dict_has_the_documented_fields_in_order():
    result = scripted_model(ANSWER, prompt_tokens=2).generate(
        encode("xy"), exit_layer=2, draft_tokens=3, max_new_tokens=5
    )
    fields = result.to_dict()
    assert list(fields) == [
        "text",
        "token_ids",
        "finish_reason",
        "prompt_tokens",
        "new_tokens",
        "mode",
        "exit_layer",
        "draft_tokens",
        "rounds",
        "drafted",
        "accepted",
        "acceptance_rate",
        "mean_accepted_length",
        "accepted_by_position",
        "ttft_s",
        "decode_s",
        "tokens_per_s",
    ]
    assert fields["text"] == "abcde"
    assert (fields["prompt_tokens"], fields["new_tokens"]) == (2, 5)
    assert (fields["mode"], fields["exit_layer"], fields["draft_tokens"]) == (
        "self-speculative",
        2,
        3,
    )
