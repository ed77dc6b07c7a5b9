"""The agent's settings: one typed source for flags, environment variables, the config file and the docs.

A flag beats an environment variable (``BLOCKYARD_`` + name), which beats the file, which beats the default.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from ..engine.config import EngineConfig
from .errors import SettingsError


class AgentSettings(BaseSettings):
    """Everything that can be set on an agent."""

    model_config = SettingsConfigDict(env_prefix="BLOCKYARD_", extra="forbid", allow_inf_nan=False)

    model: str = Field(
        description="folder, .gguf file, known name such as SmolLM2-135M-Instruct, or hub name"
    )
    served_model_name: str | None = Field(
        None, description="the name clients use; the last part of model if unset"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one and prints it")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="weights and KV; auto is float32 on a CPU and the model's own on a GPU"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where to run; auto takes a GPU if there is one"
    )
    block_tokens: int = Field(16, ge=1, le=256, description="tokens in a KV block")
    kv_blocks: int | None = Field(
        None, ge=1, description="KV blocks of the pool; measured if neither this nor kv_bytes"
    )
    kv_bytes: int | None = Field(None, ge=1, description="bytes of the KV pool")
    memory_fraction: float = Field(
        0.9, gt=0, le=1, description="share of the device's memory to use when measured"
    )
    host_blocks: int = Field(0, ge=0, description="KV blocks in host memory, for preemption by swap")
    max_model_len: int | None = Field(None, ge=1, description="longest prompt and output together, in tokens")
    max_num_seqs: int | None = Field(
        None, ge=1, le=4096, description="sequences decoded at once (64 on CPU, 256 on GPU)"
    )
    max_batch_tokens: int | None = Field(
        None, ge=1, description="tokens of one step (256 on CPU, 2048 on GPU)"
    )
    prefix_cache: bool = Field(True, description="keep finished blocks and reuse equal beginnings")
    preemption: Literal["recompute", "swap"] = Field(
        "recompute", description="what happens to KV when the pool is full"
    )
    watermark: float = Field(
        0.01, ge=0, lt=1, description="share of the pool kept free when requests are admitted"
    )
    tensor_parallel: int = Field(1, ge=1, le=64, description="ranks that share the model")
    cuda_graphs: bool = Field(True, description="replay decode steps as CUDA graphs")
    threads: int | None = Field(None, ge=1, description="CPU threads for the model; all cores if unset")
    max_queue: int = Field(
        256, ge=0, description="requests that may wait beyond max_num_seqs; more get a 429"
    )
    token: str | None = Field(
        None,
        min_length=1,
        description="bearer token to ask for everywhere but on /healthz, /readyz and /metrics",
    )
    token_dir: Path | None = Field(
        None, description="or a folder with it in a file token, which is read again when it changes"
    )
    max_body_bytes: int = Field(8 << 20, ge=1024, description="largest request body; more get a 413")
    client_timeout: float = Field(
        60.0, gt=0, description="seconds a client may take to send its body or to take what is sent to it"
    )
    grace_period: float = Field(30.0, ge=0, description="seconds that running requests get after SIGTERM")
    hang_timeout: float = Field(
        600.0,
        ge=0,
        description="seconds after which an engine that has work and says nothing is ended; 0: never. Longer "
        "than any one step takes",
    )

    @property
    def public_name(self) -> str:
        return self.served_model_name or Path(self.model).name

    def engine_config(self, model: Path) -> EngineConfig:
        """The engine's part, with the model's folder resolved."""
        names = set(EngineConfig.__slots__) - {"model"}
        return EngineConfig(model=str(model), **{name: getattr(self, name) for name in names})

    @classmethod
    def load(cls, flags: dict[str, Any], file: Path | None = None) -> AgentSettings:
        """Merge flags, environment and file; SettingsError names each bad setting."""
        from_file = _read(file) if file is not None else {}

        class WithFile(cls):  # type: ignore[misc, valid-type]
            @classmethod
            def settings_customise_sources(
                cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource, **_: Any,
            ) -> tuple[PydanticBaseSettingsSource, ...]:  # fmt: skip
                return init_settings, env_settings, InitSettingsSource(settings_cls, from_file)

        try:
            merged = WithFile(**flags)
        except ValidationError as error:
            raise SettingsError("; ".join(map(_problem, error.errors(include_url=False)))) from None
        return cls.model_construct(**{name: getattr(merged, name) for name in cls.model_fields})


def _problem(error: ErrorDetails) -> str:
    """One bad setting under all the names it can be set by."""
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{name} is not a setting; blockyard agent --help lists them all"
    flag, variable = f"--{name.replace('_', '-')}", f"BLOCKYARD_{name.upper()}"
    if error["type"] == "missing":
        return f"{name} is not set; give {flag}, {variable}, or {name} in the --config file"
    return f"{name} ({flag}, {variable}): {error['msg']} (got {error['input']!r})"


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text()
        return dict(tomllib.loads(text) if file.suffix == ".toml" else json.loads(text))
    except (OSError, ValueError, TypeError) as error:
        raise SettingsError(
            f"config file {file} cannot be read as {file.suffix or 'JSON'}: {error}"
        ) from None
