"""Where what is kept between runs lies: token ids, teachers' scores, compiled layers. All of it may be deleted."""

from __future__ import annotations

import os
from pathlib import Path


def folder(name: str) -> Path:
    """`name` in $LORICA_CACHE, else in $XDG_CACHE_HOME/lorica, else in ~/.cache/lorica; it need not exist."""
    own = os.environ.get("LORICA_CACHE")
    return (Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lorica").expanduser() / name


def keep_compiled() -> None:
    """Have torch's compiler keep its results there, where it would keep them until the machine starts anew, unless told otherwise."""
    place = folder("compiled")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(place, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(place))
