"""Where the compile cache lies and how large it may become."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...spec.errors import UsageError

DEFAULT_BYTES = 10 << 30
FOLDER_VARIABLE = "LLMC_CACHE_DIR"
LIMIT_VARIABLE = "LLMC_CACHE_BYTES"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """`folder` is made on first use; beyond `max_bytes` what was used longest ago goes."""

    folder: Path
    max_bytes: int = DEFAULT_BYTES

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] | None = None) -> CacheConfig:
        """The user's cache folder (XDG_CACHE_HOME), or what LLMC_CACHE_DIR and LLMC_CACHE_BYTES say.

        Raises UsageError for a limit that is no whole number of bytes.
        """
        known = os.environ if variables is None else variables
        base = known.get("XDG_CACHE_HOME") or "~/.cache"
        folder = Path(known.get(FOLDER_VARIABLE) or Path(base) / "llmc").expanduser()
        limit = known.get(LIMIT_VARIABLE)
        if limit is None:
            return cls(folder=folder)
        if not limit.isdigit():
            raise UsageError(
                "usage.cache_bytes",
                f"{LIMIT_VARIABLE} is {limit!r}.",
                "The size limit of the compile cache is a whole number of bytes.",
                f"Set it to one, such as {DEFAULT_BYTES}, or unset it.",
            )
        return cls(folder=folder, max_bytes=int(limit))
