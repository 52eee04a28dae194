"""The checkpoint's own tokenizer and chat template, through transformers."""

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from layerskip.model.architecture import UnsupportedModelError
from layerskip.model.files import older_names
from layerskip.model.files.gguf_tokenizer import from_gguf
from layerskip.model.files.json_files import CheckpointError, read_json
from layerskip.model.files.weights import GgufFile
from layerskip.model.files.writing import check_within

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_FILES_BESIDE = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
# Classes without code of their own: nothing in the model's config changes what they do.
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
# transformers would make any class of its own that is named, and call what it reads files with.
_KINDS = re.compile(
    r"(?!Auto|Rag)\w+Tokenizer(Fast)?|TokenizersBackend|PythonBackend|MistralCommonBackend"
)
# Classes that transformers 5 builds anew, without steps of tokenizer.json such as splitting digits.
_REBUILT = ("GPT2Tokenizer", "GPT2TokenizerFast")


def load(path: Path, gguf_file: GgufFile | None = None) -> Any:
    """The tokenizer whose files lie in a checkpoint folder, else the one inside the GGUF file.

    Returns:
        The tokenizer, or None where there is neither.

    Raises:
        CheckpointError: a tokenizer is there but cannot be read.
        UnsupportedModelError: it is of a kind that is not known here.
    """
    try:
        if any((path / name).is_file() for name in _TOKENIZER_FILES):

            def said_by(name: str) -> Mapping[str, Any]:
                return read_json(path / name) if (path / name).is_file() else {}

            return read(str(path), said_by, is_fast=(path / "tokenizer.json").is_file())
        return None if gguf_file is None else from_gguf(gguf_file)
    except (UnsupportedModelError, CheckpointError):
        raise
    except Exception as error:  # the reader in Rust knows no other kind
        raise CheckpointError(f"the tokenizer of {path} cannot be read: {error}") from error


def read(source: str, said_by: Callable[[str], Mapping[str, Any]], *, is_fast: bool) -> Any:
    """The tokenizer of a folder or hub id, by transformers; no code of a checkpoint runs.

    Args:
        source: the folder or hub id.
        said_by: from the name of one of its files to the JSON object in it, empty where there is none.
        is_fast: whether it has a tokenizer.json.

    Raises:
        CheckpointError: it names a class that is no tokenizer.
    """
    settings = said_by("tokenizer_config.json")
    if is_fast and is_as_written(settings):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(source, trust_remote_code=False)
    for kind in (said.get("tokenizer_class") for said in (settings, said_by("config.json"))):
        if kind is not None and not _KINDS.fullmatch(str(kind)):
            raise CheckpointError(f"the tokenizer_class of {source} is {kind!r}, which is none")
    from transformers import AutoTokenizer  # which imports all of modelling

    with _no_questions():
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


@contextlib.contextmanager
def _no_questions() -> Iterator[None]:
    """Some classes forget that code is not to be trusted, and ask on the terminal: no is the answer."""
    from transformers import dynamic_module_utils as asking

    before, asking.TIME_OUT_REMOTE_CODE = asking.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    finally:
        asking.TIME_OUT_REMOTE_CODE = before


def is_as_written(settings: Mapping[str, Any]) -> bool:
    """Whether a tokenizer is what its tokenizer.json says, by its tokenizer_config.json."""
    kind = settings.get("tokenizer_class")
    is_complete = settings.get("eos_token") is not None  # the class would know one without that
    return "auto_map" not in settings and (kind in _GENERIC or (kind in _REBUILT and is_complete))


def write(path: Path, folder: Path, gguf_file: GgufFile | None = None) -> None:
    """Copy a checkpoint's tokenizer files into a folder, or save the tokenizer of its GGUF file there.

    Raises:
        CheckpointError, UnsupportedModelError: as of `load`; or a file lies outside the folder.
    """
    templates = sorted(path.glob(f"{older_names.TEMPLATES}/*.jinja"))
    names = (*_TOKENIZER_FILES, *_FILES_BESIDE, *(str(t.relative_to(path)) for t in templates))
    found = [name for name in names if (path / name).is_file()]
    if not set(found) & set(_TOKENIZER_FILES) and (tokenizer := load(path, gguf_file)) is not None:
        tokenizer.save_pretrained(str(folder))
    for name in found:
        # Another file of this machine is not to be passed on.
        check_within(path / name, path, is_read=True)
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path / name, folder / name)
    older_names.amend_tokenizer_config(folder)
