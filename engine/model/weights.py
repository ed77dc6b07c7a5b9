"""Reads safetensors files: the list of tensors, and one tensor or one rank's slice of it.

The files are read with plain reads, so loading takes no more memory than the weights and one tensor. Mapping
the files, as the safetensors library does, would count every page as resident a second time until the last
tensor is loaded.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import ConfigError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER = 100 << 20  # safetensors' own limit


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor's values lie: the bytes ``begin`` to ``end`` of ``file``."""

    file: Path
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    begin: int
    end: int


class Weights:
    """The tensors of one checkpoint, by name. A context manager: files are closed on exit."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._directory = directory
        self._dtype = dtype
        self._device = device
        self._entries = read_entries(directory)
        self._files: dict[Path, BinaryIO] = {}
        self._unread = set(self._entries)

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    @property
    def unread(self) -> list[str]:
        """Names of tensors that were never asked for, sorted."""
        return sorted(self._unread)

    def get(
        self, name: str, shape: tuple[int, ...], *, axis: int = 0, begin: int = 0, end: int | None = None
    ) -> Tensor:
        """A tensor that is ``shape`` in the file, or the slice ``begin:end`` of one axis (0 or 1) of it.

        On the model's device in the model's dtype, contiguous, with memory of its own. ConfigError if the
        tensor is missing, has another shape, or a dtype that is not a plain floating-point one.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise ConfigError(
                f"model {self._directory} has no tensor {name!r}, which its config.json promises"
            )
        if entry.shape != shape:
            raise ConfigError(
                f"tensor {name!r} of model {self._directory} is {list(entry.shape)}; "
                f"config.json promises {list(shape)}"
            )
        if entry.dtype not in DTYPES:
            raise ConfigError(
                f"tensor {name!r} of model {self._directory} is of dtype {entry.dtype}; "
                f"supported are {', '.join(DTYPES)}"
            )
        self._unread.discard(name)
        end = shape[axis] if end is None else min(end, shape[axis])
        count = max(0, end - begin)
        rows = slice(begin, begin + count) if axis == 0 else slice(0, shape[0])
        tensor = self._read(entry, rows)
        if axis == 1:
            tensor = tensor[:, begin : begin + count]
        return tensor.to(self._device, self._dtype).contiguous()

    def _read(self, entry: Entry, rows: slice) -> Tensor:
        """Rows of a tensor as they are in the file."""
        row_bytes = (entry.end - entry.begin) // max(1, entry.shape[0])
        buffer = torch.empty((rows.stop - rows.start) * row_bytes, dtype=torch.uint8)
        if entry.file not in self._files:
            self._files[entry.file] = entry.file.open("rb", buffering=0)
        file, view = self._files[entry.file], buffer.numpy().data
        file.seek(entry.begin + rows.start * row_bytes)
        done = 0
        while done < len(view):  # one read brings 2 GiB at most
            count = file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise ConfigError(f"{entry.file} ends too soon; fetch the model again")
            done += count
        return buffer.view(DTYPES[entry.dtype]).view(-1, *entry.shape[1:])


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, whether in one piece or sharded."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if single.is_file():
        files = [single]
    elif index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{index} is not an index of weights ({error!r}); fetch the model again"
            ) from None
        files = [directory / name for name in names]
    else:
        files = sorted(directory.glob("*.safetensors"))
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise ConfigError(f"model {directory} lacks {', '.join(missing) or 'a .safetensors file'}")
    return files


def read_entries(directory: Path) -> dict[str, Entry]:
    """All tensors of a checkpoint by name, from the headers of its files."""
    entries: dict[str, Entry] = {}
    for path in weight_files(directory):
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                if size > MAX_HEADER:
                    raise ValueError(f"a header of {size} bytes")
                header = json.loads(file.read(size))
            length = path.stat().st_size
            for name, facts in header.items():
                if name == "__metadata__":
                    continue
                begin, end = (8 + size + int(offset) for offset in facts["data_offsets"])
                if not 8 + size <= begin <= end <= length:
                    raise ValueError(f"tensor {name!r} lies outside of its {length} bytes")
                dtype, shape = str(facts["dtype"]), tuple(int(size) for size in facts["shape"])
                if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
                    raise ValueError(f"tensor {name!r} of {list(shape)} {dtype} in {end - begin} bytes")
                entries[name] = Entry(path, dtype, shape, begin, end)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} is damaged or no safetensors file ({error}); fetch the model again"
            ) from None
    return entries
