"""API keys: read from a file, compared in constant time. Knows no limits and no routes."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

from ...spec.errors import UsageError
from .errors import ServingError

ANONYMOUS = ""


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """SHA-256 of every key by the name of its owner. Without any, everybody may come in."""

    digests: tuple[tuple[str, bytes], ...] = ()

    def owner_of(self, authorization: str | None) -> str:
        """Whose key an Authorization header holds. A 401 when it holds none that is known.

        All keys are compared, whole and in constant time, so that the time taken tells nothing.
        """
        if not self.digests:
            return ANONYMOUS
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found: str | None = None
        for owner, expected in self.digests:
            if hmac.compare_digest(digest, expected):
                found = owner
        if found is None or scheme.lower() != "bearer":
            raise ServingError(
                401,
                "auth.invalid_key",
                "The request has no valid API key.",
                "This server answers only to the keys its operator has listed.",
                "Send the header `Authorization: Bearer KEY`.",
            )
        return found


def read_keys(path: Path) -> ApiKeys:
    """The keys in a file: one a line, `name:key` or `key`; empty lines and those that begin with # are left
    out. UsageError when the file cannot be read, has no key, or one twice."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _invalid(path, f"{error}") from error
    digests: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, separator, key = text.partition(":")
        key = key.strip() if separator else text
        if not key:
            raise _invalid(path, f"line {number} has no key")
        digest = hashlib.sha256(key.encode()).digest()
        if digest in digests:
            raise _invalid(path, f"the key in line {number} is there twice")
        digests[digest] = name.strip() if separator else f"line-{number}"
    if not digests:
        raise _invalid(path, "it holds no key, and a server that nobody may use was hardly meant")
    return ApiKeys(tuple((owner, digest) for digest, owner in digests.items()))


def _invalid(path: Path, why: str) -> UsageError:
    return UsageError(
        "server.api_keys",
        f"The key file {path} cannot be used.",
        f"{why[0].upper()}{why[1:].rstrip('.')}.",
        "Write one key a line, as name:key or key alone.",
    )
