"""A checkpoint's files, each verified against its size and digest in `COMMITTED` before any byte is used.

Whoever can write the folder can write `COMMITTED` too. So this module never executes what it reads, never follows a
file name that it reads, and never allocates memory by a number that it reads.
"""

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


class CorruptCheckpointError(UserError):
    """The checkpoint at `url` is rejected as a whole for `reason`."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{without_credentials(url)}: {reason}; name another checkpoint")
        self.url, self.reason = url, reason


class IncompleteCheckpointError(CorruptCheckpointError):
    """A checkpoint whose writing never finished."""


class VerifiedFolder:
    """The folder of one checkpoint.

    Attributes:
        state: contents of `state.json`; the fields have the types and ranges with which they are written.

    Raises:
        CorruptCheckpointError: by every method, if the folder does not hold a checkpoint in this format.
        UserError: the store fails; this does not depend on the checkpoint.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        if not folder.exists(COMMITTED):
            raise IncompleteCheckpointError(folder.url, "it was never completed")
        self._digests = self._parse_digests(self._json(COMMITTED, self._bytes(COMMITTED, MAX_JSON_BYTES)))
        self.state = self._verified_state()
        expected = file_names(self.state["ranks"])
        if self._digests.keys() != expected:
            name = sorted(self._digests.keys() ^ expected)[0]
            raise self.corrupt(f"{COMMITTED} {'lacks' if name in expected else 'names'} {name[:80]!r}")

    def corrupt(self, reason: str) -> CorruptCheckpointError:
        """The error that rejects this checkpoint for `reason`."""
        return CorruptCheckpointError(self._folder.url, reason)

    def tensors(self, name: str) -> Tensors:
        """The tensors of a safetensors file."""
        data = self._read(name)
        header = int.from_bytes(data[:8], "little")
        if header > min(MAX_HEADER_BYTES, len(data) - 8):
            raise self.corrupt(f"{name} announces a header of {header} bytes")
        try:
            return dict(from_bytes(data))
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise self.corrupt(f"{name} is not readable as safetensors ({error})") from error

    def _read(self, name: str) -> bytes:
        """The verified bytes of a file."""
        digest = self._digests.get(name)
        if digest is None:
            raise self.corrupt(f"{COMMITTED} lacks {name!r}")
        data = self._bytes(name, digest.bytes)
        if len(data) != digest.bytes or hashlib.sha256(data).hexdigest() != digest.sha256:
            raise self.corrupt(f"{name} does not match its size and digest in {COMMITTED}")
        return data

    def _bytes(self, name: str, limit: int) -> bytes:
        """The bytes of a file that has at most `limit` bytes."""
        try:
            size = self._folder.size(name)  # 0 if the store does not report sizes
            data = self._folder.head(name, limit + 1) if size <= limit else b""
        except UserError as error:
            if not isinstance(error.__cause__, NOT_A_FILE):
                raise
            raise self.corrupt(f"{name} is missing") from error
        if max(size, len(data)) > limit:
            raise self.corrupt(f"{name} is larger than {limit} bytes")
        return data

    def _json(self, name: str, data: bytes) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self.corrupt(f"{name} is not JSON ({str(error)[:80]})") from error
        if not isinstance(value, dict):
            raise self.corrupt(f"{name} is not a JSON object")
        return value

    def _parse_digests(self, committed: dict[str, Any]) -> dict[str, FileDigest]:
        files = committed.get("files")
        if not isinstance(files, dict):
            raise self.corrupt(f"{COMMITTED} names no files")
        return {name: self._parse_digest(name, entry) for name, entry in files.items()}

    def _parse_digest(self, name: str, entry: Any) -> FileDigest:
        match entry:
            case {"bytes": int(size), "sha256": str(sha)} if 0 <= size <= MAX_FILE_BYTES and SHA256.fullmatch(sha):
                return FileDigest(size, sha)
        raise self.corrupt(f"{COMMITTED} has no valid size and digest of {name[:80]!r}")

    def _verified_state(self) -> dict[str, Any]:
        digest = self._digests.get(STATE)
        if digest is None or digest.bytes > MAX_JSON_BYTES:
            raise self.corrupt(f"{COMMITTED} has no valid {STATE}")
        state = self._json(STATE, self._read(STATE))
        if state.get("format") != FORMAT:
            raise self.corrupt(f"{STATE} has format {state.get('format')!r}, this version reads {FORMAT}")
        for key, least, most in (("step", 0, 10**9 - 1), ("ranks", 1, MAX_RANKS), ("queue_position", 0, 2**48)):
            if type(state.get(key)) is not int or not least <= state[key] <= most:
                raise self.corrupt(f"{STATE} has {key} {str(state.get(key))[:20]}, must be {least} to {most}")
        folder_step = STEP_FOLDER.fullmatch(self._folder.url.rpartition("/")[2])
        if folder_step and int(folder_step[1]) != state["step"]:
            raise self.corrupt(f"{STATE} has step {state['step']}")
        if not all(isinstance(state.get(key), dict) for key in ("progress", "schedule", "config")):
            raise self.corrupt(f"{STATE} lacks progress, schedule or configuration")
        try:
            state["progress"] = build_config(Progress, state["progress"])
        except ConfigError as error:
            raise self.corrupt(f"{STATE}: progress.{error}") from error
        return state
