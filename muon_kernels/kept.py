"""Files in which `python -m muon_kernels tune` keeps what it measured for later processes."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar

T = TypeVar("T")


def file_of(name: str) -> Path:
    """Return the file for what was measured under that name: a GPU's, with the versions on which times depend."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())
    if base := os.environ.get("MUON_KERNELS_CACHE_DIR"):
        return Path(base) / f"{slug}.json"
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # without a home a relative path
    return Path(caches) / "muon_kernels" / f"{slug}.json"


def _unwritable(file: Path, error: OSError) -> RuntimeError:
    return RuntimeError(
        f"{file} cannot be written ({error}); set MUON_KERNELS_CACHE_DIR to a directory that can be written"
    )


def writable(file: Path) -> None:
    """Raise RuntimeError, with how to fix it, unless `file` can be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise _unwritable(file, error) from None


def save(file: Path, content: object) -> None:
    """Keep content for later processes, as JSON; RuntimeError, with how to fix it, if that fails."""
    part = file.with_suffix(f".{os.getpid()}")
    try:
        part.write_text(json.dumps(content, indent=1))
        part.replace(file)  # so that nobody reads half of it
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise _unwritable(file, error) from None


def load(file: Path, what: str, read: Callable[[Any], T]) -> T | None:
    """Return what `read` makes of the content; None if there is no file, or with a warning if there is no `what` in it.

    Args:
        file: a path from `file_of`.
        what: a file should hold; the warning names it.
        read: raises ValueError, TypeError or KeyError where the content is something else.
    """
    try:
        return read(json.loads(file.read_text()))
    except OSError as error:
        if not os.path.exists(file):  # nor where nobody may look
            return None
        problem: Exception = error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        problem = error
    warnings.warn(
        f"{file} is no {what} ({type(problem).__name__}: {problem}) and is not used; "
        "run python -m muon_kernels tune again, or delete it",
        stacklevel=2,
    )
    return None
