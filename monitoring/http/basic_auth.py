"""Users and passwords for basic authentication: a file with a line a user, which holds hashes alone.

`python -m monitoring.http.basic_auth USER >> FILE` asks for a password and writes such a line.
"""

from __future__ import annotations

import base64
import binascii
import getpass
import hashlib
import hmac
import secrets
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mcl_dist.errors import UserError

COST, BLOCK, LANES = 2**14, 8, 1  # of scrypt: 16 MiB and some 50 ms a guess
SALT_BYTES = 16
NOBODY = "scrypt$" + "00" * SALT_BYTES + "$" + "00" * 64  # as long to refuse as a user who exists


class BasicAuth:
    """Who may look; a header that was right once is recognised without the cost of hashing it again."""

    def __init__(self, hashes: Mapping[str, str]) -> None:
        self._hashes = dict(hashes)
        self._key = secrets.token_bytes(32)
        self._right: set[bytes] = set()
        self._guessing = threading.Lock()  # one guess at a time, whoever tries how often

    @classmethod
    def read(cls, path: Path) -> BasicAuth:
        """The users of a file.

        Raises:
            UserError: it cannot be read, or a line is none; the line itself is not told.
        """
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); make it by python -m monitoring.http.basic_auth"
            ) from error
        hashes = {}
        for place, line in enumerate(lines, start=1):
            user, _, found = line.partition(":")
            if not line.strip() or line.startswith("#"):
                continue
            if not user or not _is_hash(found):
                raise UserError(
                    f"{path}: line {place} is not USER:scrypt$SALT$HASH; make it by "
                    "python -m monitoring.http.basic_auth USER"
                )
            hashes[user] = found
        if not hashes:
            raise UserError(f"{path}: names no user; add one by python -m monitoring.http.basic_auth USER >> {path}")
        return cls(hashes)

    def admit(self, environ: Mapping[str, Any]) -> bool:
        """Whether a request brings a user's password."""
        header = str(environ.get("HTTP_AUTHORIZATION", ""))
        mark = hmac.digest(self._key, header.encode(), "sha256")
        if mark in self._right:
            return True
        user, password = _named(header)
        if user is None:
            return False
        with self._guessing:
            is_right = matches(password, self._hashes.get(user, NOBODY))
        if is_right:
            self._right.add(mark)
        return is_right


def hashed(password: str, salt: bytes | None = None) -> str:
    """What a file holds of a password: salt and scrypt hash."""
    salt = secrets.token_bytes(SALT_BYTES) if salt is None else salt
    found = hashlib.scrypt(password.encode(), salt=salt, n=COST, r=BLOCK, p=LANES)
    return f"scrypt${salt.hex()}${found.hex()}"


def matches(password: str, stored: str) -> bool:
    """Whether a password has that hash; takes as long whether or not."""
    salt = bytes.fromhex(stored.split("$")[1])
    return hmac.compare_digest(hashed(password, salt), stored)


def _is_hash(text: str) -> bool:
    name, _, rest = text.partition("$")
    try:
        salt, found = (bytes.fromhex(part) for part in rest.split("$"))
    except ValueError:
        return False
    return name == "scrypt" and len(salt) == SALT_BYTES and len(found) == 64


def _named(header: str) -> tuple[str | None, str]:
    """User and password of an `Authorization` header; None for anything else."""
    scheme, _, word = header.partition(" ")
    try:
        user, colon, password = base64.b64decode(word, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None, ""
    return (user, password) if scheme.lower() == "basic" and colon else (None, "")


def main(words: Sequence[str]) -> int:
    """Ask for a user's password and print their line."""
    if len(words) != 1 or not words[0] or ":" in words[0]:
        print("usage: python -m monitoring.http.basic_auth USER >> FILE (a name without a colon)", file=sys.stderr)
        return 2
    password = getpass.getpass(f"password of {words[0]}: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    if not password:
        print("mcl: the password is empty; nothing was written", file=sys.stderr)
        return 1
    print(f"{words[0]}:{hashed(password)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
