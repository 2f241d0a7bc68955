"""The environment variables this package reads, all of them."""

import os
from pathlib import Path


def user_cache_dir() -> Path:
    """Where downloaded models are kept: kvarn/ under XDG_CACHE_HOME, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvarn"
