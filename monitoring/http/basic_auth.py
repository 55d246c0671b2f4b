"""HTTP basic authentication by a password file: one line per user, with the password's hash.

`python -m monitoring.http.basic_auth USER >> FILE` asks for a password and prints such a line.
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

SCRYPT_N, SCRYPT_R, SCRYPT_P = 2**14, 8, 1  # scrypt's cost: 16 MiB and about 50 ms per guess
SALT_BYTES = 16
UNKNOWN_USER = "scrypt$" + "00" * SALT_BYTES + "$" + "00" * 64  # makes rejecting an unknown user equally slow
COMMAND = "python -m monitoring.http.basic_auth USER"


class BasicAuth:
    """Users and their password hashes; an accepted header is remembered, so it is hashed only once."""

    def __init__(self, hashes: Mapping[str, str]) -> None:
        self._hashes = dict(hashes)
        self._key = secrets.token_bytes(32)
        self._accepted: set[bytes] = set()
        self._lock = threading.Lock()  # one guess at a time, however many requests arrive

    @classmethod
    def read(cls, path: Path) -> BasicAuth:
        """Read a password file.

        Raises:
            UserError: the file cannot be read or a line is invalid; the message does not contain the line.
        """
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); create it with {COMMAND} >> {path}") from error
        hashes = {}
        for number, line in enumerate(lines, start=1):
            user, _, stored = line.partition(":")
            if not line.strip() or line.startswith("#"):
                continue
            if not user or not _is_hash(stored):
                raise UserError(f"{path}: line {number} is not USER:scrypt$SALT$HASH; create it with {COMMAND}")
            hashes[user] = stored
        if not hashes:
            raise UserError(f"{path}: no user found; add one with {COMMAND} >> {path}")
        return cls(hashes)

    def authenticate(self, environ: Mapping[str, Any]) -> bool:
        """Whether a WSGI request carries a valid user and password."""
        header = str(environ.get("HTTP_AUTHORIZATION", ""))
        digest = hmac.digest(self._key, header.encode(), "sha256")
        if digest in self._accepted:
            return True
        user, password = _parse_header(header)
        if user is None:
            return False
        with self._lock:
            is_valid = verify_password(password, self._hashes.get(user, UNKNOWN_USER))
        if is_valid:
            self._accepted.add(digest)
        return is_valid


def hash_password(password: str, salt: bytes | None = None) -> str:
    """Salt and scrypt hash of a password, as stored in the file."""
    salt = secrets.token_bytes(SALT_BYTES) if salt is None else salt
    digest = hashlib.scrypt(password.encode(), salt=salt, n=SCRYPT_N, r=SCRYPT_R, p=SCRYPT_P)
    return f"scrypt${salt.hex()}${digest.hex()}"


def verify_password(password: str, stored: str) -> bool:
    """Whether a password has the stored hash; takes constant time."""
    salt = bytes.fromhex(stored.split("$")[1])
    return hmac.compare_digest(hash_password(password, salt), stored)


def _is_hash(text: str) -> bool:
    name, _, rest = text.partition("$")
    try:
        salt, digest = (bytes.fromhex(part) for part in rest.split("$"))
    except ValueError:
        return False
    return name == "scrypt" and len(salt) == SALT_BYTES and len(digest) == 64


def _parse_header(header: str) -> tuple[str | None, str]:
    """User and password of an `Authorization` header; no user if it is not basic authentication."""
    scheme, _, encoded = header.partition(" ")
    try:
        user, colon, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None, ""
    return (user, password) if scheme.lower() == "basic" and colon else (None, "")


def main(arguments: Sequence[str]) -> int:
    """Ask for a user's password and print the user's line."""
    if len(arguments) != 1 or not arguments[0] or ":" in arguments[0]:
        print(f"usage: {COMMAND} >> FILE (a name without a colon)", file=sys.stderr)
        return 2
    user = arguments[0]
    password = getpass.getpass(f"password of {user}: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    if not password:
        print("mcl: the password is empty; nothing was written", file=sys.stderr)
        return 1
    print(f"{user}:{hash_password(password)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
