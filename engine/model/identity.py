"""The identity of a checkpoint: a digest of every byte of its tensors. Equal ones have exchangeable KV.

It is computed once, in threads beside loading, which reads the same pages of the same files, and then kept in
the user's cache folder under a name made of the files' paths, sizes and times. A changed file has another
name there, so nothing is ever looked up, compared or thrown away.

Each tensor is hashed in chunks and the identity is the hash of the chunks' hashes, so that all threads are
busy whatever the sizes of the tensors. SHA-256 is what hashlib computes fastest on today's CPUs, which have
instructions for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from ...user_cache import cache_folder
from ..errors import ConfigError
from .weights import Entry, read_entries, weight_files

CHUNK_BYTES = 16 << 20  # part of the definition: with other chunks, every identity is another
_READ_BYTES = 1 << 20
_MAX_THREADS = 8  # about 10 GB/s, more than disks give
_SETTLED = 0.1  # seconds; a file that is younger could change once more and keep its time


class WeightsIdentity:
    """Starts to hash a checkpoint, unless its identity is known. A context manager: hashing ends on exit.

    ConfigError as ``read_entries``.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = weight_files(directory)
        self._facts = self._read_facts()
        self._known = self._look_up()
        self._entries = sorted(read_entries(directory).items())
        self._descriptors: dict[Path, int] = {}
        self._digests: dict[tuple[Path, int, int], Future[bytes]] = {}  # of each chunk
        self._threads = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), "identity")
        if self._known is None:
            self._descriptors = {path: os.open(path, os.O_RDONLY) for path in self._files}
            chunks = (chunk for _, entry in self._entries for chunk in _chunks(entry))
            for chunk in sorted(chunks):  # as a disk reads them best
                self._digests[chunk] = self._threads.submit(self._hash, *chunk)

    def __enter__(self) -> WeightsIdentity:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def result(self) -> str:
        """The identity, 64 hex digits, equal on every machine and however the tensors are cut into files.

        Waits for the hashing. ConfigError if a file has changed since the start: what was loaded meanwhile
        may be half of one checkpoint and half of another.
        """
        identity = self._known or self._combine()
        if self._read_facts() != self._facts:
            raise ConfigError(
                f"the weights of model {self._directory} changed while they were read; start again when all "
                "files are complete"
            )
        if self._known is None:
            self._known = identity
            self._keep(identity)
        return identity

    def _hash(self, path: Path, begin: int, end: int) -> bytes:
        digest = hashlib.sha256()
        while begin < end:
            data = os.pread(self._descriptors[path], min(_READ_BYTES, end - begin), begin)
            if not data:
                raise ConfigError(f"{path} ends too soon; fetch the model again")
            digest.update(data)
            begin += len(data)
        return digest.digest()

    def _combine(self) -> str:
        digest = hashlib.sha256()
        for name, entry in self._entries:
            digest.update(json.dumps([name, entry.dtype, entry.shape, entry.end - entry.begin]).encode())
            for chunk in _chunks(entry):
                digest.update(self._digests[chunk].result())
        return digest.hexdigest()

    # ── The cache ─────────────────────────────────────────────────────────────────────────────────

    def _read_facts(self) -> list[tuple[str | int, ...]]:
        """What differs once a file has changed. A copy can keep its size and time of modification, but not
        its inode and the time of its last change of any kind.
        """
        try:
            found = [(path.resolve(), path.stat()) for path in self._files]
        except OSError as error:
            raise ConfigError(f"the weights of model {self._directory} cannot be read: {error}") from None
        return [(str(path), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path, s in found]

    @property
    def _place(self) -> Path:
        name = hashlib.sha256(json.dumps([CHUNK_BYTES, self._facts]).encode()).hexdigest()
        return cache_folder() / "identities" / name

    def _look_up(self) -> str | None:
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # no folder, no home, no text
            kept = self._place.read_text()
            if re.fullmatch("[0-9a-f]{64}", kept):  # a crash of the machine may leave it empty
                return kept
        return None

    def _keep(self, identity: str) -> None:
        """If it cannot be kept, it is computed again at the next start."""
        if any(time.time() - path.stat().st_ctime < _SETTLED for path in self._files):
            return
        with contextlib.suppress(OSError, RuntimeError):
            place = self._place
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False) as file:
                file.write(identity)
            Path(file.name).replace(place)


def _chunks(entry: Entry) -> list[tuple[Path, int, int]]:
    """File, begin and end of each part of a tensor that is hashed as one."""
    begins = range(entry.begin, entry.end, CHUNK_BYTES)
    return [(entry.file, begin, min(begin + CHUNK_BYTES, entry.end)) for begin in begins]
