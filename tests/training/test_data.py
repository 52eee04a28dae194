import copy

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from layerskip.data.readers import read_rows
from layerskip.training import data
from layerskip.training.data import (
    Collator,
    Encoding,
    LeftOutWarning,
    LengthGroupedSampler,
    encode_rows,
    ending_of_prompts,
    pack_rows,
)

ROWS = [{"prompt": "1 plus 2 is", "completion": "3"}, {"prompt": "2 plus 2 is", "completion": "4"}]


@pytest.fixture
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


def test_fields_that_are_no_text_are_refused(tokenizer):
    for row, message in (
        (
            {"prompt": "1", "completion": None, "text": "1"},
            "NoneType is neither text",
        ),
        ({"prompt": [{"role": "user"}], "completion": "3"}, "row 7 has .* list is neither text"),
        ({"prompt": "1", "completion": "half \ud83d"}, "row 7 cannot be made tokens of"),
    ):
        with pytest.raises(ValueError, match=message):
            Encoding(tokenizer=tokenizer)("row 7", row)


def test_a_width_that_fills_the_memory_is_refused(tokenizer):
    for template in ("{prompt:>200000000}", "{prompt:{width}}", "{number:.100000f}"):
        row = {"prompt": "1", "completion": "2", "width": 10**9, "number": 0.5}
        for part in ("prompt", "completion"):
            encode = Encoding(tokenizer=tokenizer, **{part: template})
            with pytest.raises(ValueError, match=r"^row 7 .*\(the width of .* four digits\)"):
                encode("row 7", row)


def test_fields_of_fields(tokenizer):
    encode = Encoding(tokenizer=tokenizer, completion="{answers[0]}")
    found = encode("x", {"prompt": "1 plus 2 is", "answers": ["3"]})
    assert found == Encoding(tokenizer=tokenizer)("x", ROWS[0])
    for answers in (None, [], 3):
        with pytest.raises(ValueError, match="x has the fields"):
            encode("x", {"prompt": "1", "answers": answers})


def test_no_space_is_learnt_at_the_border():
    """SentencePiece puts a space before whatever is encoded first."""
    made = Tokenizer(models.BPE(unk_token="?"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=1,  # characters alone
        special_tokens=["?", "</s>"],
        show_progress=False,
    )
    made.train_from_iterator(["ask:\nanswer ask: answer"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    encode = Encoding(tokenizer=tokenizer)
    for prompt, completion in (("ask:\n", "answer"), ("ask:", " answer")):
        row = encode("x", {"prompt": prompt, "completion": completion})
        learnt = [token for token in row["labels"] if token != -100]
        assert row["input_ids"] == [*tokenizer(prompt + completion)["input_ids"], 1]
        assert tokenizer.convert_ids_to_tokens(learnt)[0][0] == completion[0].replace(" ", "\u2581")


def test_completions_only_have_labels(tokenizer):
    row = Encoding(tokenizer=tokenizer)("x", ROWS[0])
    assert tokenizer.decode(row["input_ids"]) == "1 plus 2 is 3 </s>"
    assert row["labels"][:4] == [-100] * 4
    assert row["labels"][4:] == row["input_ids"][4:]
    whole = Encoding(tokenizer=tokenizer, completion_only=False)("x", ROWS[0])
    # The first token is predicted from nothing.
    assert whole["labels"] == [-100, *whole["input_ids"][1:]]


def test_templates_and_running_text(tokenizer):
    encode = Encoding(tokenizer=tokenizer, prompt="{a} plus {b} is", completion="{c}")
    assert encode("x", {"a": 1, "b": 2, "c": 3}) == Encoding(tokenizer=tokenizer)("x", ROWS[0])
    text = Encoding(tokenizer=tokenizer)("x", {"text": "1 plus 2"})
    assert text["input_ids"] == [*tokenizer("1 plus 2")["input_ids"], 2]
    assert text["labels"] == [-100, *text["input_ids"][1:]]


def test_a_field_of_text_that_is_named_goes_before_all_others(tokenizer):
    encode = Encoding(tokenizer=tokenizer, text_field="body")
    messages = [{"role": "user", "content": "1"}, {"role": "model", "content": "2"}]
    row = {"prompt": "1", "completion": "2", "messages": messages, "body": "1 plus 2"}
    assert encode("x", row) == Encoding(tokenizer=tokenizer)("x", {"text": "1 plus 2"})
    with pytest.raises(ValueError, match=r"row 7 has the fields .*'body' is missing"):
        encode("row 7", ROWS[0])


def test_a_misspelt_field_is_no_row_of_another_kind(tokenizer):
    for templates in ({"completion": "{lable}"}, {"prompt": "{txt}"}):
        encode = Encoding(tokenizer=tokenizer, **templates)
        messages = [{"role": "user", "content": "1"}, {"role": "model", "content": "2"}]
        for row in ({"text": "1 plus 2", "label": "3"}, {"messages": messages, "label": "3"}):
            with pytest.raises(
                ValueError, match=r"row 7 has the fields .*'label'.*\{(lable|txt)\}"
            ):
                encode("row 7", row)


def test_the_answer_of_a_conversation_has_labels(tokenizer):
    messages = [{"role": "user", "content": "1 plus 2"}, {"role": "model", "content": "3"}]
    # A column of a parquet file is there in every row.
    row = Encoding(tokenizer=tokenizer)("x", {"messages": messages, "prompt": None})
    plain = Encoding(tokenizer=tokenizer)("x", ROWS[0])
    assert Encoding(tokenizer=tokenizer)("x", {**ROWS[0], "messages": None}) == plain
    assert tokenizer.decode([x for x in row["labels"] if x != -100]) == "3 </s>"
    with pytest.raises(ValueError, match="x: the chat template"):
        Encoding(tokenizer=tokenizer)("x", {"messages": [1, 2]})
    with pytest.raises(ValueError, match="x: the last message is of the role 'user'"):
        Encoding(tokenizer=tokenizer)("x", {"messages": [*messages, messages[0]]})


def test_prompts_end_in_a_line_break_if_all_do():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})

    def ending(*prompts):
        encode = Encoding(tokenizer=tokenizer)
        rows = [encode("x", {"prompt": prompt, "completion": "\n3"}) for prompt in prompts]
        return ending_of_prompts(rows, tokenizer)

    assert ending("1 plus\n", "2 plus\n\n") == "\n"
    assert ending("1 plus\n", "2 plus") == ""
    assert ending("1 plus <turn>\n") == ""  # from a chat template
    assert ending() == ""


def test_a_conversation_has_its_tools(tokenizer):
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}"
        "{% for message in messages %}{{ message.content }} {% endfor %}"
    )
    messages = [{"role": "user", "content": "1 plus 2"}, {"role": "model", "content": "3"}]
    row = {"messages": messages, "tools": [{"name": "plus"}]}
    encode = Encoding(tokenizer=tokenizer)
    ids = encode("x", row)["input_ids"]
    assert tokenizer.decode(ids) == "plus 1 plus 2 3"
    assert encode("x", {**row, "tools": '[{"name": "plus"}]'})["input_ids"] == ids
    for fields, words in (
        ({"tools": "[{"}, "tools is no JSON"),
        ({"tools": '{"name": "plus"}'}, "tools is to be a list"),
        ({"chat_template_kwargs": "1"}, "chat_template_kwargs is to have names"),
        ({"chat_template_kwargs": {"tokenize": True}}, "names tokenize, no variable"),
    ):
        with pytest.raises(ValueError, match=f"x: .*{words}"):
            encode("x", {**row, **fields})


def test_what_only_other_rows_of_a_table_have_is_not_there(tokenizer, tmp_path):
    """A parquet file has every field in every row."""
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{% for name in tool %}{{ name }} {% endfor %}{% endfor %}"
        "{% for message in messages %}{{ message.content }} "
        "{% if 'calls' in message %}plus {% endif %}{% endfor %}"
    )
    asked = {"role": "user", "content": "1"}
    rows = [
        {"messages": [asked, {"role": "model", "content": "2"}], "tools": [{"is": {"3": "4"}}]},
        {
            "messages": [asked, {"role": "model", "content": "2", "calls": ["5"]}],
            "tools": [{"user": {"6": "7"}}],
        },
    ]
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    encode = Encoding(tokenizer=tokenizer)
    found = [encode(where, row) for where, row in read_rows(str(table))]
    assert found == [encode("x", row) for row in rows]
    texts = [tokenizer.decode(row["input_ids"]) for row in found]
    assert texts == ["is 1 2", "user 1 2 plus"]


def test_what_is_missing_is_said(tokenizer):
    encode = Encoding(tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"row 7 has the fields \['b'\]; needed are"):
        encode("row 7", {"b": 1})
    with pytest.raises(ValueError, match=r"row 7 has the fields \['completion'\], not those of"):
        encode("row 7", {"completion": "3"})
    with pytest.raises(ValueError, match="x has no rows"):
        encode_rows([], encode, "x")
    with pytest.raises(ValueError, match="no row of x has a label"):
        encode_rows([("1", ROWS[0])], Encoding(tokenizer=tokenizer, max_length=4), "x")


def test_what_is_cut_is_said_and_running_text_is_divided(tokenizer):
    encode = Encoding(tokenizer=tokenizer, max_length=4)
    rows = [("1", {"text": "1 plus 2 is 3 plus"}), ("2", {"text": "1"})]
    with pytest.warns(
        LeftOutWarning, match="1 of 2 rows of x are longer than max_length = 4 tokens"
    ):
        cut = encode_rows(rows, encode, "x")
    assert [len(row["input_ids"]) for row in cut] == [4, 2]
    whole = encode_rows(rows, encode, "x", to_pack=True)
    assert [len(row["input_ids"]) for row in whole] == [7, 2]
    packed = pack_rows(whole, 4)
    assert [row["position_ids"] for row in packed] == [[0, 1, 2, 3], [0, 1, 2], [0, 1]]
    assert [token for row in packed for token in row["input_ids"]] == [
        token for row in whole for token in row["input_ids"]
    ]
    assert packed[1]["labels"] == [-100, *packed[1]["input_ids"][1:]]
    long = {"prompt": "1 plus 2 is 1 plus 2 is ", "completion": "3"}
    answered = [("1", {"prompt": "1 plus", "completion": "2 is 3 plus"}), ("2", long)]
    with pytest.warns(LeftOutWarning) as warnings:
        [row] = encode_rows(answered, encode, "x", to_pack=True)
    assert len(row["input_ids"]) == 4
    messages = " ".join(str(warning.message) for warning in warnings)
    assert "1 of 2 rows of x are left out: their labels lie beyond max_length = 4" in messages
    assert "1 of 2 rows of x are longer than max_length = 4" in messages


@pytest.mark.filterwarnings("ignore::layerskip.training.data.LeftOutWarning")
@pytest.mark.parametrize("kind", ["text", "completion", "messages"])
def test_long_texts_are_cut_before_they_are_tokenized(tokenizer, kind):
    """Tokenizers take some 260 bytes of memory for each byte of text."""
    text = "1 plus 2 is 3 user " * 2000
    rows = {
        "text": {"text": text},
        "completion": {"prompt": "1 is", "completion": text},
        "messages": {
            "messages": [{"role": "user", "content": "1"}, {"role": "model", "content": text}]
        },
    }
    encode = Encoding(tokenizer=tokenizer, max_length=16)
    expected = {name: ids[:16] for name, ids in encode("x", rows[kind]).items()}
    sizes = []

    class Watched:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text, **options):
            sizes.append(len(text))
            return tokenizer(text, **options)

    watched = Encoding(tokenizer=Watched(), max_length=16)
    assert encode_rows([("x", rows[kind])], watched, "x") == [expected]
    assert max(sizes) < 500
    [packed] = encode_rows([("x", rows[kind])], watched, "x", to_pack=True)
    assert (packed == expected) == (kind != "text")  # running text is left to `pack_rows`
    # Of characters that give no token, the part that is tokenized grows until it is enough.
    spaces = {"text": " " * 5000 + text}
    assert encode_rows([("x", spaces)], watched, "x") == encode_rows(
        [("x", {"text": text})], encode, "x"
    )


def _byte_level():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return inner


def _with_metaspace():
    """As SentencePiece: a space before the first word, and line breaks in no other token."""
    inner = Tokenizer(models.BPE())
    lines = pre_tokenizers.Split("\n", "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [lines, pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    return inner


@pytest.mark.parametrize("make", [_byte_level, _with_metaspace])
def test_running_text_that_is_not_cut_is_tokenized_in_pieces(make, monkeypatch):
    """The memory of a tokenizer is that of a piece; the tokens are those of the whole text."""
    text = "".join(
        f"line {i} of a  text,{' and more' * (i % 9)}.\n" + "\n" * (i % 3) for i in range(99)
    )
    inner = make()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([text], trainer)
    inner.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    whole = tokenizer(text)["input_ids"]
    monkeypatch.setattr(data, "_PIECE_CHARS", 200)
    parts = data.pieces(text)
    assert "".join(parts) == text
    assert len(parts) > 20
    assert max(map(len, parts)) <= 200
    row = Encoding(tokenizer=tokenizer)("x", {"text": text})
    assert row["input_ids"] == [*whole, 1]
    long_word = "x" * 1000
    assert "".join(data.pieces(long_word)) == long_word


def test_packing_and_padding():
    rows = [{"input_ids": [5] * n, "labels": [5] * n} for n in (3, 2, 4)]
    packed = pack_rows(rows, 6)
    assert [len(row["input_ids"]) for row in packed] == [5, 4]
    assert packed[0]["labels"] == [-100, 5, 5, -100, 5]
    assert packed[0]["position_ids"] == [0, 1, 2, 0, 1]
    batch = Collator(0)(packed)
    assert "attention_mask" not in batch
    assert batch["position_ids"][1].tolist() == [0, 1, 2, 3, 0]
    assert batch["labels"][1, 4] == -100
    assert Collator(0)([*packed, *pack_rows(rows[:1], 6)])["position_ids"][2, 3:].tolist() == [0, 0]
    assert [len(row["input_ids"]) for row in pack_rows([rows[0]] * 3, 6)] == [6, 3]
    padded = Collator(0)(rows)
    assert padded["attention_mask"].sum(1).tolist() == [3, 2, 4]
    assert padded["input_ids"].shape == (3, 4)


def test_a_model_of_few_positions_takes_the_padding_of_a_long_row():
    """Learned positions end where the model's end, which a short last row must not go beyond."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2, use_cache=False,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    rows = [{"input_ids": [5, 6, 7] * 2, "labels": [5, 6, 7] * 2}] * 4
    packed = pack_rows(rows, 18)
    assert [len(row["input_ids"]) for row in packed] == [18, 6]
    batch = Collator(0)(packed)
    alone = model(torch.tensor([rows[0]["input_ids"]])).logits[0]
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    for row, start in ((0, 0), (0, 12), (1, 0)):
        torch.testing.assert_close(logits[row, start : start + 6], alone, rtol=1e-5, atol=1e-6)


def test_length_groups_are_the_same_each_time_and_differ_by_epoch():
    lengths = torch.randint(1, 100, (403,)).tolist()
    sampler = LengthGroupedSampler(lengths, 8, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(403))
    assert first == list(sampler)
    spread = [max(b) - min(b) for b in (
        [lengths[row] for row in first[i : i + 8]] for i in range(0, 400, 8)
    )]  # fmt: skip
    assert sum(spread) / len(spread) < 10
    assert first == list(LengthGroupedSampler(lengths, 8, seed=3))
    assert first != list(LengthGroupedSampler(lengths, 8, seed=4))
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_a_beginning_stands_once(tokenizer):
    """Before prompts and texts the tokenizer's own, before conversations the template's alone."""
    plain = copy.deepcopy(tokenizer)
    begin = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[begin, "$A"], special_tokens=[(begin, tokenizer.eos_token_id)]
    )
    chat = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    template += "{% if add_generation_prompt %}assistant {% endif %}"
    plain.chat_template = tokenizer.chat_template = template
    for row, added in ((ROWS[0], 1), ({"text": "1 plus"}, 1), (chat, 0)):
        ids, without = (
            next(iter(encode_rows([("here", row)], Encoding(tokenizer=one), "rows")))["input_ids"]
            for one in (tokenizer, plain)
        )
        assert ids == [tokenizer.eos_token_id] * added + without
