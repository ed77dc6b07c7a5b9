"""The identity of weights: every byte counts, how they are stored does not, and it is computed once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockyard.engine.errors import ConfigError
from blockyard.engine.model import identity as module
from blockyard.engine.model.identity import WeightsIdentity
from blockyard.engine.model.weights import read_entries
from blockyard.user_cache import cache_folder


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKYARD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    return save(
        tmp_path / "model",
        {
            "embedding": torch.randn(4096, 256, generator=generator),
            "layer.weight": torch.randn(64, 48, generator=generator).bfloat16(),
            "norm": torch.randn(48, generator=generator),
            "empty": torch.empty(0, 3),
        },
    )


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def identify(folder: Path) -> str:
    with WeightsIdentity(folder) as identity:
        return identity.result()


def kept() -> list[Path]:
    return list((cache_folder() / "identities").glob("*"))


def settle() -> None:
    """Until the files are old enough for their identity to be kept."""
    time.sleep(2 * module._SETTLED)


def test_a_few_rows_of_an_embedding_make_another_model(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["embedding"][2000:2150] += 1
    other = save(tmp_path / "other", tensors)
    assert identify(other) != identify(checkpoint)


def test_every_byte_counts(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written in place, as the worst case: only the times of the file tell that it has changed."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 4096)
    rng = random.Random(5)
    seen = {identify(checkpoint)}
    entries = [entry for entry in read_entries(checkpoint).values() if entry.end > entry.begin]
    for _ in range(24):
        entry = rng.choice(entries)
        place = rng.choice([entry.begin, entry.end - 1, rng.randrange(entry.begin, entry.end)])
        with entry.file.open("r+b") as file:
            file.seek(place)
            (byte,) = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))
        seen.add(identify(checkpoint))
    assert len(seen) == 25


@pytest.mark.parametrize("change", ["name", "shape", "dtype"])
def test_what_the_bytes_mean_counts(checkpoint: Path, tmp_path: Path, change: str) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    norm = tensors.pop("norm")
    name = "other_norm" if change == "name" else "norm"
    tensors[name] = {"shape": norm.view(6, 8), "dtype": norm.view(torch.float16)}.get(change, norm)
    assert identify(save(tmp_path / "other", tensors)) != identify(checkpoint)


def test_values_that_change_places_make_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 64)
    rows = torch.arange(64.0).view(4, 16)  # four chunks
    here = save(tmp_path / "here", {"a": rows, "b": rows + 64})
    chunks = save(tmp_path / "chunks", {"a": rows.flip(0), "b": rows + 64})
    tensors = save(tmp_path / "tensors", {"a": rows + 64, "b": rows})
    assert len({identify(here), identify(chunks), identify(tensors)}) == 3


def test_bytes_of_two_tensors_count_for_both(tmp_path: Path) -> None:
    """No writer of safetensors makes this, but a reader takes it."""
    seen = set()
    for last in range(2):
        header = json.dumps(
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            }
        ).encode()
        folder = tmp_path / str(last)
        folder.mkdir()
        content = len(header).to_bytes(8, "little") + header + bytes(7) + bytes([last])
        (folder / "model.safetensors").write_bytes(content)
        seen.add(identify(folder))
    assert len(seen) == 2


@pytest.mark.parametrize("pieces", [2, 3])
def test_how_tensors_are_cut_into_files_does_not_count(checkpoint: Path, tmp_path: Path, pieces: int) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    names = sorted(tensors, reverse=True)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    index = {}
    for i in range(pieces):
        save_file({name: tensors[name] for name in names[i::pieces]}, sharded / f"{i}.safetensors")
        index.update(dict.fromkeys(names[i::pieces], f"{i}.safetensors"))
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert identify(sharded) == identify(checkpoint)


def test_it_is_kept_until_a_file_changes(checkpoint: Path) -> None:
    settle()
    first = identify(checkpoint)
    (place,) = kept()
    assert place.read_text() == first
    place.write_text("0" * 64)
    assert identify(checkpoint) == "0" * 64  # so it is not computed a second time
    os.utime(checkpoint / "model.safetensors")
    assert identify(checkpoint) == first


def test_a_change_that_keeps_size_and_time_is_noticed(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    settle()
    first, stat = identify(checkpoint), path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert identify(checkpoint) != first


def test_a_file_that_may_still_change_within_its_time_is_not_kept(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SETTLED", 3600.0)
    identify(checkpoint)
    assert kept() == []


@pytest.mark.parametrize("damage", [b"", b"0" * 63, b"\xff\xfe" * 32, b"\0" * 64, b"0" * 64 + b"\n"])
def test_a_damaged_cache_is_no_cache(checkpoint: Path, damage: bytes) -> None:
    settle()
    first = identify(checkpoint)
    (place,) = kept()
    place.write_bytes(damage)
    assert identify(checkpoint) == first
    assert place.read_text() == first


def test_without_a_cache_it_is_computed_each_time(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle()
    first = identify(checkpoint)
    (tmp_path / "file").touch()
    monkeypatch.setenv("BLOCKYARD_CACHE", str(tmp_path / "file"))  # not even root can write there
    assert identify(checkpoint) == first
    monkeypatch.delenv("BLOCKYARD_CACHE")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert identify(checkpoint) == first


def test_processes_that_start_together_agree(checkpoint: Path) -> None:
    settle()
    code = (
        "import sys; from pathlib import Path; from blockyard.engine.model.identity import WeightsIdentity\n"
        "with WeightsIdentity(Path(sys.argv[1])) as identity: print(identity.result())"
    )
    command = [sys.executable, "-c", code, str(checkpoint)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate()[0].strip() for process in processes}
    (place,) = kept()
    assert said == {place.read_text()} == {identify(checkpoint)}


def test_a_change_while_loading_is_refused(checkpoint: Path) -> None:
    with WeightsIdentity(checkpoint) as identity:
        tensors = load_file(checkpoint / "model.safetensors")
        save(checkpoint, {**tensors, "norm": tensors["norm"] + 1})
        with pytest.raises(ConfigError, match="changed while they were read; start again"):
            identity.result()
    assert kept() == []


def test_a_file_that_goes_while_loading_is_refused(checkpoint: Path) -> None:
    with WeightsIdentity(checkpoint) as identity:
        (checkpoint / "model.safetensors").unlink()
        with pytest.raises(ConfigError, match="cannot be read"):
            identity.result()


def test_a_file_that_is_cut_while_it_is_read_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    with WeightsIdentity(checkpoint) as identity:
        os.truncate(path, path.stat().st_size - 8)
        with pytest.raises(ConfigError, match=r"ends too soon|changed while"):
            identity.result()


def test_a_failed_load_does_not_wait_for_the_hashing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 256)
    monkeypatch.setattr(module, "_MAX_THREADS", 1)
    with pytest.raises(ZeroDivisionError), WeightsIdentity(checkpoint) as identity:
        raise ZeroDivisionError
    assert any(digest.cancelled() for digest in identity._digests.values())
