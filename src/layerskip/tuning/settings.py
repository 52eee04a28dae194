"""The chosen settings in the checkpoint's `generation_config.json`, where everybody looks for them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerskip.model import StepCosts
from layerskip.model.files.json_files import read_json
from layerskip.model.files.settings import (
    EXIT,
    FILE,
    KEY,
    entries_of,
    readable_costs,
    special_tokens,
    text_of_ids,
)
from layerskip.model.files.writing import check_within, replace_json
from layerskip.tuning.choose import Choice


def write_settings(
    folder: Path,
    choice: Choice,
    *,
    end_tokens: Sequence[int],
    record: Mapping[str, Any],
    costs: StepCosts | None = None,
    draft_vocabulary: Sequence[int] | None = None,
    draft_text: Sequence[int] | None = None,
) -> Path:
    """Write `assistant_early_exit` and `num_assistant_tokens`, and how they were found.

    Where transformers cannot draft with the model, the exit is under `layerskip` instead. Where none was
    chosen both fields are removed, so that mode auto drafts from n-grams alone; but not where there are
    costs of other weights or another machine, which the exit may pay with: auto goes by the costs. All
    other fields stay. The file appears whole or not at all.

    Args:
        folder: a checkpoint.
        choice: what to write.
        end_tokens: of the model, for a folder that has no such file yet: transformers would take the
            new file's word that there are none.
        record: kept under `layerskip`, key `tuning`.
        costs: kept there too, in the place of those for the same kind of weights and machine; None
            leaves what is there.
        draft_vocabulary: the same, token ids.
        draft_text: the same.

    Returns:
        The file written.

    Raises:
        ValueError: the file there is no JSON object or a link out of the folder, or the folder cannot be
            written to.
    """
    file = folder / FILE
    check_within(file)
    fields = read_json(file) if file.is_file() else special_tokens(_config(folder), end_tokens)
    # By this mark transformers says that the file only repeats config.json, and skips what is new in it.
    fields.pop("_from_model_config", None)
    own = fields.get(KEY)
    own = {**(own if isinstance(own, dict) else {}), "tuning": dict(record)}
    others = []
    if costs is not None:
        same = [(costs.kind, threads) for threads in (costs.threads, 0)]
        for entry in entries_of(own):
            known = readable_costs(entry)
            if not isinstance(known, StepCosts):  # another version may read them
                others.append(entry)
            elif (known.kind, known.threads) not in same:
                others.append(known.to_dict())
        own["costs"] = [*others, costs.to_dict()]
    if choice.exit_layer is not None or not others:
        for key in ("assistant_early_exit", "num_assistant_tokens"):
            fields.pop(key, None)
        own.pop(EXIT, None)
        if choice.exit_layer is not None and _runs_all_layers(folder):
            own[EXIT] = choice.exit_layer
        elif choice.exit_layer is not None:
            fields["assistant_early_exit"] = choice.exit_layer
        if choice.draft_tokens is not None:
            fields["num_assistant_tokens"] = choice.draft_tokens
    if draft_vocabulary:
        own["draft_vocabulary"] = text_of_ids(draft_vocabulary)
    if draft_text:
        own["draft_text"] = text_of_ids(draft_text)
    fields[KEY] = own
    try:
        replace_json(file, fields)
    except OSError as error:
        raise ValueError(f"{file} cannot be written: {error}") from error
    return file


def check_writable(folder: Path) -> None:
    """Refuse a folder that could not be written to, before any long work starts.

    Raises:
        ValueError: it cannot be written to, or what is there already is no JSON object, or a link out of
            it.
    """
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written to; --dry-run tunes without writing")
    check_within(folder / FILE)
    if (folder / FILE).is_file():
        read_json(folder / FILE)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}


def _runs_all_layers(folder: Path) -> bool:
    """Whether transformers does, though it is told of fewer to draft: its `generate` would fail then."""
    return _config(folder).get("model_type") == "gpt_neox"
