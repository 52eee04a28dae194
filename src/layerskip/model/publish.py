"""Results on the Hugging Face hub: the header of a model card, and uploads.

A run whose result is to be uploaded creates the repository before it trains, so that a missing token or
right ends it at once, and not after hours.
"""

import contextlib
import dataclasses
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerskip.data.readers import local_files
from layerskip.model.hub import BUILTIN_MODELS, RENAMED, PackagedModel, kind_of
from layerskip.model.repository import bars_on_a_terminal, reason_of, split_name

_TIMEOUT_S = 10.0


class UploadError(OSError):
    """A repository of the hub cannot be written to; the result on this machine is untouched."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Origin of a model, as a card names it; None where it is not known.

    Attributes:
        hub_id: its repository on the hub.
        license: identifier of its license, as on the hub.
    """

    hub_id: str | None = None
    license: str | None = None


def origin_of(name: str) -> Origin:
    """Return the origin of a model: of a folder by the card in it, of a hub id by the hub's.

    Args:
        name: folder, GGUF file, built-in name or hub id.
    """
    kind = kind_of(name)
    if kind == "builtin":
        model = BUILTIN_MODELS[RENAMED.get(name, name)]
        if isinstance(model, PackagedModel):
            return origin_of(model.base)
        return Origin(hub_id=model.hub_id, license=model.license)
    if kind == "hub":
        repo_id = name.partition(":")[0]
        return Origin(hub_id=repo_id, license=_text(_card_on_hub(repo_id), "license"))
    metadata = _card_in(Path(name).expanduser())
    return Origin(hub_id=_text(metadata, "base_model"), license=_text(metadata, "license"))


def _card_on_hub(repo_id: str) -> Any:
    """Return the metadata of a repository's card; nothing where the hub cannot be reached."""
    import huggingface_hub

    with contextlib.suppress(Exception):  # the license is then unknown
        return huggingface_hub.HfApi().model_info(repo_id, timeout=_TIMEOUT_S).card_data
    return None


def _card_in(folder: Path) -> Any:
    """Return the metadata of the card in a folder; nothing where there is none that can be read."""
    from huggingface_hub.repocard import metadata_load

    with contextlib.suppress(Exception):  # what stands there is the user's
        return metadata_load(folder / "README.md")
    return None


def _text(metadata: Any, name: str) -> str | None:
    value = metadata.get(name) if metadata is not None else None
    return value if isinstance(value, str) else None


def public_name(source: str) -> str:
    """Return a hub id or built-in name as it is, and of local files the name without their folder."""
    return Path(source).name if local_files(source) else source


def card_header(origin: Origin, **metadata: Any) -> str:
    """Return the YAML block that a model card begins with.

    Args:
        origin: of the base model.
        metadata: see `huggingface_hub.ModelCardData`; what is None or empty is left out.
    """
    from huggingface_hub import ModelCardData

    fields = {"base_model": origin.hub_id, "license": origin.license, **metadata}
    card = ModelCardData(**{name: value for name, value in fields.items() if value})
    return f"---\n{card.to_yaml()}\n---"


def check_upload(push_to_hub: str | None, private: bool) -> None:
    """Check the options of an upload.

    Raises:
        ValueError: the repository is not ORG/NAME, or `private` has no repository.
    """
    if push_to_hub is None:
        if private:
            raise ValueError("private needs push_to_hub")
    elif (parts := split_name(push_to_hub)) is None or parts[1] is not None:
        raise ValueError(f"push_to_hub is {push_to_hub!r}; it must be ORG/NAME")


def create_repository(repo_id: str, *, private: bool) -> None:
    """Create a repository, unless it exists, and check that it can be written to.

    Args:
        repo_id: ORG/NAME.
        private: create a private repository, and refuse one that is public.

    Raises:
        UploadError: there is no token, or it does not give the right to write.
    """
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UploadError(f"an upload to {repo_id} needs the hub; unset HF_HUB_OFFLINE")
    if huggingface_hub.get_token() is None:
        raise UploadError(
            f"an upload to {repo_id} needs a token of the Hugging Face hub: set HF_TOKEN, or run"
            " hf auth login"
        )
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        api.auth_check(repo_id, write=True)
        is_public = private and not api.model_info(repo_id).private
    except Exception as error:
        raise UploadError(f"{repo_id} cannot be uploaded to: {reason_of(error)}") from error
    if is_public:
        raise UploadError(f"{repo_id} exists and is public: name another one, or leave out private")


def upload(folder: Path, names: Sequence[str], repo_id: str) -> str:
    """Upload files of a folder in one commit, and return the address of the repository.

    Args:
        folder: of the result.
        names: of the files and folders in it; all others stay.
        repo_id: see `create_repository`.

    Raises:
        UploadError: it failed.
    """
    import huggingface_hub

    escaped = [glob.escape(name) for name in names]
    api = huggingface_hub.HfApi()
    try:
        with bars_on_a_terminal():
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                allow_patterns=[*escaped, *(f"{name}/*" for name in escaped)],
                commit_message="Upload from layerskip",
            )
    except Exception as error:
        raise UploadError(
            f"the result in {folder} is whole, but it could not be uploaded to {repo_id}"
            f" ({reason_of(error).rstrip('.')}); --resume tries again"
        ) from error
    return f"{api.endpoint}/{repo_id}"
