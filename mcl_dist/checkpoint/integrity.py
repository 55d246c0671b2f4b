"""A checkpoint's files, of which no byte is used before its size and digest are what `COMMITTED` says.

Whoever can write the folder can write `COMMITTED` too: so nothing here runs what it reads, follows a name that it
reads, or makes room for what a number that it reads says.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as from_bytes

from mcl_dist.checkpoint.format import (
    COMMITTED,
    FORMAT,
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    MAX_JSON_BYTES,
    MAX_RANKS,
    STATE,
    STEP_FOLDER,
    FileDigest,
    file_names,
)
from mcl_dist.checkpoint.state import Progress, Tensors
from mcl_dist.config import build_config
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.storage.folder import Folder
from mcl_dist.storage.store_requests import without_credentials

SHA256 = re.compile(r"[0-9a-f]{64}")
NOT_A_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class DamagedError(UserError):
    """The checkpoint at `url` cannot be used, since `reason`; nothing of it was."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{without_credentials(url)}: {reason}; name another checkpoint")
        self.url, self.reason = url, reason


class TornError(DamagedError):
    """A checkpoint that was never completed."""


class CheckedFolder:
    """The folder of one checkpoint.

    Attributes:
        state: of `state.json`; its fields have the types and ranges that they are written with.

    Raises:
        DamagedError: by all that it does, when what lies there is not a checkpoint that we wrote.
        UserError: when the store fails, which says nothing of the checkpoint.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        if not folder.exists(COMMITTED):
            raise TornError(folder.url, "it was never completed")
        self._seals = self._parsed_seals(self._json(COMMITTED, self._bytes(COMMITTED, MAX_JSON_BYTES)))
        self.state = self._checked_state()
        expected = file_names(self.state["ranks"])
        if self._seals.keys() != expected:
            name = sorted(self._seals.keys() ^ expected)[0]
            raise self.damaged(f"{COMMITTED} {'lacks' if name in expected else 'names'} {name[:80]!r}")

    def damaged(self, reason: str) -> DamagedError:
        """The error that says so of this checkpoint."""
        return DamagedError(self._folder.url, reason)

    def tensors(self, name: str) -> Tensors:
        """The tensors of a safetensors file."""
        data = self._read(name)
        header = int.from_bytes(data[:8], "little")
        if header > min(MAX_HEADER_BYTES, len(data) - 8):
            raise self.damaged(f"{name} announces a header of {header} bytes")
        try:
            return dict(from_bytes(data))
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise self.damaged(f"{name} is not readable as safetensors ({error})") from error

    def _read(self, name: str) -> bytes:
        """A file that is what was written."""
        seal = self._seals.get(name)
        if seal is None:
            raise self.damaged(f"{COMMITTED} lacks {name!r}")
        data = self._bytes(name, seal.bytes)
        if len(data) != seal.bytes or hashlib.sha256(data).hexdigest() != seal.sha256:
            raise self.damaged(f"{name} is not what was written")
        return data

    def _bytes(self, name: str, most: int) -> bytes:
        """A file of so many bytes at most."""
        try:
            size = self._folder.size(name)  # 0 where the store does not tell
            data = self._folder.head(name, most + 1) if size <= most else b""
        except UserError as error:
            if not isinstance(error.__cause__, NOT_A_FILE):
                raise
            raise self.damaged(f"{name} is missing") from error
        if max(size, len(data)) > most:
            raise self.damaged(f"{name} is larger than {most} bytes")
        return data

    def _json(self, name: str, data: bytes) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self.damaged(f"{name} is not JSON ({str(error)[:80]})") from error
        if not isinstance(value, dict):
            raise self.damaged(f"{name} holds no JSON object")
        return value

    def _parsed_seals(self, committed: dict[str, Any]) -> dict[str, FileDigest]:
        files = committed.get("files")
        if not isinstance(files, dict):
            raise self.damaged(f"{COMMITTED} names no files")
        return {name: self._parsed_seal(name, seal) for name, seal in files.items()}

    def _parsed_seal(self, name: str, seal: Any) -> FileDigest:
        match seal:
            case {"bytes": int(size), "sha256": str(digest)} if 0 <= size <= MAX_FILE_BYTES and SHA256.fullmatch(
                digest
            ):
                return FileDigest(size, digest)
        raise self.damaged(f"{COMMITTED} has no usable size and digest of {name[:80]!r}")

    def _checked_state(self) -> dict[str, Any]:
        seal = self._seals.get(STATE)
        if seal is None or seal.bytes > MAX_JSON_BYTES:
            raise self.damaged(f"{COMMITTED} has no usable {STATE}")
        state = self._json(STATE, self._read(STATE))
        if state.get("format") != FORMAT:
            raise self.damaged(f"{STATE} has format {state.get('format')!r}, this version reads {FORMAT}")
        for key, least, most in (("step", 0, 10**9 - 1), ("ranks", 1, MAX_RANKS), ("queue_position", 0, 2**48)):
            if type(state.get(key)) is not int or not least <= state[key] <= most:
                raise self.damaged(f"{STATE} has {key} {str(state.get(key))[:20]}, must be {least} to {most}")
        named = STEP_FOLDER.fullmatch(self._folder.url.rpartition("/")[2])
        if named and int(named[1]) != state["step"]:
            raise self.damaged(f"{STATE} has step {state['step']}")
        if not all(isinstance(state.get(key), dict) for key in ("progress", "schedule", "config")):
            raise self.damaged(f"{STATE} lacks progress, schedule or configuration")
        try:
            state["progress"] = build_config(Progress, state["progress"])
        except ConfigError as error:
            raise self.damaged(f"{STATE}: progress.{error}") from error
        return state
