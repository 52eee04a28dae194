"""Folders that layerskip keeps files in."""

import os
from pathlib import Path

import platformdirs

CACHE_VARIABLE = "LAYERSKIP_CACHE"


def cache_folder() -> Path:
    """Return the folder of fetched models and compiled kernels.

    `LAYERSKIP_CACHE`, else the platform's cache folder.

    Raises:
        OSError: there is neither, since nobody knows a home of this user.
    """
    set_by_user = os.environ.get(CACHE_VARIABLE)
    try:
        return Path(set_by_user or platformdirs.user_cache_dir("layerskip")).expanduser()
    except RuntimeError:
        raise OSError(f"this user has no home: set {CACHE_VARIABLE} to a folder") from None
