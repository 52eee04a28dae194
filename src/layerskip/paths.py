"""The folder of fetched models and compiled kernels."""

import os
from pathlib import Path

import platformdirs

CACHE_VARIABLE = "LAYERSKIP_CACHE"


def cache_folder() -> Path:
    """Return `LAYERSKIP_CACHE`, else the platform's cache folder for layerskip.

    Raises:
        OSError: neither is defined, because this user has no home folder.
    """
    configured = os.environ.get(CACHE_VARIABLE)
    try:
        return Path(configured or platformdirs.user_cache_dir("layerskip")).expanduser()
    except RuntimeError:
        raise OSError(f"this user has no home: set {CACHE_VARIABLE} to a folder") from None
