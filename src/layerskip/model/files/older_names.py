"""What transformers before version 5, and programs that read its files, call some of their fields.

By the new names alone they would turn by a base of 10,000 and without scaling, and say nothing.
transformers 5 reads both as one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerskip.model.files.json_files import read_json, write_json

TEMPLATES = "additional_chat_templates"  # a folder: those with a name, each in a file
# Rotary base, and the part of a head that is turned.
_NAMES = dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), ("rotary_emb_base", "rotary_pct"))
_USUAL_NAMES = ("rope_theta", "partial_rotary_factor")


def of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `config.json` under their older names."""
    fields = _of_rope(config)
    if dtype := config.get("dtype"):
        fields["torch_dtype"] = dtype
    return fields


def _of_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    family, rope = str(config.get("model_type")), dict(config.get("rope_parameters") or {})
    fields: dict[str, Any] = {}
    if family.startswith("gemma3") and {"sliding_attention", "full_attention"} <= rope.keys():
        fields["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    if "rope_theta" not in rope:  # none, or one for each kind of layer: there was no one word
        return {}
    for old, new in zip(_NAMES.get(family, _USUAL_NAMES), _USUAL_NAMES, strict=True):
        if new in rope:
            fields[old] = rope.pop(new)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return fields
    scaling = {"type": kind, **rope}  # once the name of rope_type
    if family == "phi3" and config.get("original_max_position_embeddings"):
        of_phi3 = {key: scaling.pop(key, None) for key in ("type", "short_factor", "long_factor")}
        # Version 4 wants these three alone; the last one stands beside them as well.
        if not scaling.keys() - {"rope_type", "original_max_position_embeddings"}:
            scaling = {}
        scaling = {**of_phi3, **scaling}
    return {**fields, "rope_scaling": scaling}


def amend_tokenizer_config(folder: Path) -> None:
    """Give the fields of a folder's `tokenizer_config.json` their older names, its templates included.

    Where templates have files of their own, transformers reads those.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    before = read_json(file)
    fields = {key: value for key, value in before.items() if key != "auto_map"}  # no code travels
    # A list there is transformers 5's, and so is the name below.
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template := _chat_template(folder):
        fields["chat_template"] = template
    if fields != before:
        write_json(file, fields)


def _chat_template(folder: Path) -> str | list[dict[str, str]] | None:
    """The templates that have files of their own: one text, or several by name."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    texts = {name: file.read_text("utf-8") for name, file in files.items() if file.is_file()}
    if texts.keys() <= {"default"}:
        return texts.get("default")
    return [{"name": name, "template": text} for name, text in texts.items()]
