"""Writes a tiny transformers model as a GGUF file, as the converter of llama.cpp does.

The names come from the `gguf` package's own table, so that ours is checked against it.
"""

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from quantized_blocks import random_blocks

from layerskip.model import decoder as rotary
from layerskip.model.quantize import Quantized

KINDS = [
    getattr(GGMLQuantizationType, name) for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
]
TEXT_PIECES = ["Ġ", "ĠĠ", "Ġa", "<|end|>"]  # what the tiny tokenizer has beyond single bytes


def permute(rows, n_heads):
    """Q or K rows of transformers, halves (i, i + head_dim / 2), to neighbours (2i, 2i + 1)."""
    return rows.reshape(n_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def unpermute(rows, n_heads):
    """The inverse of `permute`."""
    return rows.reshape(n_heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(
    path,
    model,
    *,
    kind=GGMLQuantizationType.F32,
    kinds=None,
    architecture="llama",
    leave_out=(),
    extra_tensors=None,
    extra_fields=None,
    tokenizer=None,
    parts=1,
):
    """Write a model.

    Args:
        path: the file.
        model: a transformers model.
        kind: how matrices are stored; vectors are always F32.
        kinds: how single tensors are stored, by their names in the file.
        architecture: the name in the file.
        leave_out: tensors and fields to leave out, by their names in the file.
        extra_tensors: further ones, by name.
        extra_fields: further ones, by name: texts, whole numbers, floats, or lists.
        tokenizer: a pre-tokenizer's name, to put a tiny byte-level tokenizer into the file.
        parts: number of files, named as llama.cpp names them.

    Returns:
        A state dict of the weights that the file stands for, under transformers' names and layout.
    """
    config = model.config
    per_part = -(-len(model.state_dict()) // parts) if parts > 1 else 0
    writer = GGUFWriter(path, architecture, split_max_tensors=per_part)
    scaling = config.rope_parameters
    fields = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": scaling["rope_theta"],
    }
    if scaling["rope_type"] == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling["factor"]}
    fields = {f"{architecture}.{name}": value for name, value in fields.items()}
    for name, value in (fields | (extra_fields or {})).items():
        if name not in leave_out:
            ADD[type(value)](writer, name, value)
    if tokenizer is not None:
        write_tokenizer(writer, tokenizer, config.vocab_size)

    stands_for = {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        n_heads = heads.get(name.split(".")[-2]) if architecture == "llama" else None
        values = tensor.numpy() if n_heads is None else permute(tensor.numpy(), n_heads)
        own_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        own_kind = kind if values.ndim > 1 else GGMLQuantizationType.F32
        own_kind = (kinds or {}).get(own_name, own_kind)
        data = _quantize(np.ascontiguousarray(values), own_kind)
        if own_name not in leave_out:
            writer.add_tensor(own_name, data, raw_dtype=own_kind)
        values = gguf.quants.dequantize(data, own_kind)
        values = values if n_heads is None else unpermute(values, n_heads)
        stands_for[name] = torch.from_numpy(values.copy())
    if tied:
        stands_for["lm_head.weight"] = stands_for["model.embed_tokens.weight"]
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stands_for


ADD = {
    bool: GGUFWriter.add_bool,
    str: GGUFWriter.add_string,
    int: GGUFWriter.add_uint32,
    float: GGUFWriter.add_float32,
    list: GGUFWriter.add_array,
}


def layer_products(decoder, state):
    """Every product of a decoder's layers with its weight in what `write` returned, heads of 32."""
    for i, layer in enumerate(decoder.layers):
        q, k, v, out = (state[f"model.layers.{i}.self_attn.{x}_proj.weight"] for x in "qkvo")
        gate, up, down = (
            state[f"model.layers.{i}.mlp.{x}_proj.weight"] for x in ("gate", "up", "down")
        )
        qkv = torch.cat([rotary.interleave(q, 32, 32), rotary.interleave(k, 32, 32), v])
        yield layer.qkv, qkv
        yield layer.attention_out, out
        yield layer.mlp.gate_up, torch.cat([gate, up])
        yield layer.mlp.down, down


def weight_of(product):
    """The weights of a linear layer of PyTorch, [out, in] float32."""
    if hasattr(product, "parts"):
        return torch.cat([weight_of(part) for part in product.parts])
    weight = product.weight
    return weight.dequantize() if isinstance(weight, Quantized) else weight


def _quantize(values, kind):
    """Blocks near the values; in formats that gguf cannot quantize to, random ones of their size."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        size = 0.01 * values.std() / random_blocks(kind, *values.shape).dequantize().std()
        return random_blocks(kind, *values.shape, float(size)).data.numpy()


def write_tokenizer(writer, pre_tokenizer, vocab_size):
    """A byte-level BPE: all bytes, `TEXT_PIECES`, and unused tokens up to the vocabulary's size."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*bytes_to_unicode().values()]
    tokens += [piece for piece in TEXT_PIECES if piece not in tokens]
    tokens += [f"<unused{i}>" for i in range(vocab_size - len(tokens))]
    end = tokens.index("<|end|>")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.NORMAL if i < end else gguf.TokenType.CONTROL for i in range(len(tokens))]
    )
    writer.add_token_merges(["Ġ Ġ", "Ġ a"])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_chat_template(
        "{% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}"
    )
