"""Weights from safetensors, one tensor at a time, each rank reading only its shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .errors import ConfigError

SAMPLED_BYTES = 1 << 16


class Weights:
    """The tensors of one checkpoint, by name. A context manager: files are closed on exit.

    Slices are read lazily from the file, so the peak is one tensor above what is kept.
    """

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._directory = directory
        self._dtype = dtype
        self._device = device
        self._files = weight_files(directory)
        self._open = [safe_open(str(path), framework="pt", device="cpu") for path in self._files]
        self._where: dict[str, Any] = {name: handle for handle in self._open for name in handle.keys()}  # noqa: SIM118

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._where.clear()
        self._open.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def get(self, name: str, *, axis: int | None = None, part: int = 0, parts: int = 1) -> Tensor:
        """A whole tensor, or the ``part``-th of ``parts`` equal slices along ``axis``; copied, contiguous."""
        if name not in self._where:
            raise ConfigError(f"model {self._directory} has no tensor {name!r}; its config.json promises it")
        if axis is None or parts == 1:
            tensor = self._where[name].get_tensor(name)
        else:
            lazy = self._where[name].get_slice(name)
            size = lazy.get_shape()[axis] // parts
            window = slice(part * size, (part + 1) * size)
            tensor = lazy[window] if axis == 0 else lazy[:, window]
        # A clone, because a tensor that stays a view of the mapped file keeps its pages resident.
        return torch.empty(tensor.shape, dtype=self._dtype, device=self._device).copy_(tensor)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, whether in one piece or sharded."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [directory / name for name in names]
    else:
        files = sorted(directory.glob("*.safetensors"))
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise ConfigError(f"model {directory} lacks {', '.join(missing) or 'a .safetensors file'}")
    return files


def weights_identity(directory: Path) -> str:
    """A digest that tells checkpoints apart, the same on every machine, without reading gigabytes.

    It covers every tensor's name, dtype and shape, and evenly spaced samples of the data.
    """
    digest = hashlib.sha256()
    for path in weight_files(directory):
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size))
            header.pop("__metadata__", None)
            for name, entry in sorted(header.items()):
                digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            for offset in _samples(8 + header_size, path.stat().st_size):
                file.seek(offset)
                digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()


def _samples(begin: int, end: int, count: int = 64) -> Iterator[int]:
    step = max(SAMPLED_BYTES, (end - begin) // count)
    yield from range(begin, end, step)
