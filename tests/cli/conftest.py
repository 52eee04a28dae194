"""A tiny checkpoint with a byte-level tokenizer and a chat template."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny_models
from layerskip import cli

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    specials = ["<unk>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(path)
    tiny_models.build("llama2", vocab_size=len(vocab)).save_pretrained(path)
    return path


@pytest.fixture
def run(folder, capsys):
    """Run a command in this process on the tiny checkpoint: (exit status, stdout, stderr)."""

    def call(command, *arguments, model=True):
        flags = ["--model", str(folder), "--dtype", "float32"] if model else []
        status = cli.run([command, *map(str, arguments), *flags])
        out = capsys.readouterr()
        return status, out.out, out.err

    return call
