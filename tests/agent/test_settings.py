"""Every setting can be given in every way, the nearest one wins, and a bad one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blockyard import cli
from blockyard.agent import server
from blockyard.agent.errors import SettingsError
from blockyard.agent.settings import AgentSettings
from blockyard.engine.config import EngineConfig

# A value of each setting that is not its default.
VALUES: dict[str, Any] = {
    "model": "some/model",
    "served_model_name": "mine",
    "host": "0.0.0.0",
    "port": 1234,
    "dtype": "bfloat16",
    "device": "cpu",
    "block_tokens": 32,
    "kv_blocks": 99,
    "kv_bytes": 123456,
    "memory_fraction": 0.5,
    "host_blocks": 7,
    "max_model_len": 4096,
    "max_num_seqs": 12,
    "max_batch_tokens": 345,
    "prefix_cache": False,
    "preemption": "swap",
    "watermark": 0.25,
    "tensor_parallel": 2,
    "cuda_graphs": False,
    "threads": 3,
    "max_queue": 17,
    "token": "sesame",
    "token_dir": Path("of-tokens"),
    "max_body_bytes": 2048,
    "client_timeout": 8.5,
    "grace_period": 12.5,
    "hang_timeout": 99.5,
}


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VALUES:
        monkeypatch.delenv(f"BLOCKYARD_{name.upper()}", raising=False)


def from_command_line(monkeypatch: pytest.MonkeyPatch, *flags: str) -> AgentSettings:
    """What ``blockyard agent`` with these flags would serve with."""
    got: list[AgentSettings] = []

    async def serve(settings: AgentSettings) -> int:
        got.append(settings)
        return 0

    monkeypatch.setattr(server, "serve", serve)
    assert cli.main(["agent", *flags]) == 0
    return got[0]


def text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_the_table_above_has_every_setting_and_no_default() -> None:
    fields = AgentSettings.model_fields
    assert set(VALUES) == set(fields)
    assert all(VALUES[name] != field.default for name, field in fields.items())
    assert all(field.description for field in fields.values())


@pytest.mark.parametrize("name", VALUES)
def test_every_setting_can_be_given_in_every_way(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    value = VALUES[name]
    rest = () if name == "model" else ("--model", "m")
    by_flag = from_command_line(monkeypatch, *rest, f"--{name.replace('_', '-')}", text(value))
    assert getattr(by_flag, name) == value
    for suffix, content in (
        ("toml", f"{name} = {json.dumps(value, default=str)}\n"),
        ("json", json.dumps({name: value}, default=str)),
    ):
        file = tmp_path / f"agent.{suffix}"
        file.write_text(content)
        assert getattr(from_command_line(monkeypatch, *rest, "--config", str(file)), name) == value
    monkeypatch.setenv(f"BLOCKYARD_{name.upper()}", text(value))
    assert getattr(from_command_line(monkeypatch, *rest), name) == value


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "agent.toml"
    file.write_text('model = "file"\nport = 1\nmax_queue = 1\nkv_blocks = 1\n')
    monkeypatch.setenv("BLOCKYARD_PORT", "2")
    monkeypatch.setenv("BLOCKYARD_MAX_QUEUE", "2")
    got = from_command_line(monkeypatch, "--config", str(file), "--port", "3")
    assert (got.port, got.max_queue, got.kv_blocks, got.model) == (3, 2, 1, "file")
    assert got.block_tokens == 16


def test_the_engine_gets_its_settings() -> None:
    config = AgentSettings.load(VALUES).engine_config(Path("/models/m"))
    names = set(EngineConfig.__slots__) - {"model"}
    assert names <= set(VALUES)
    assert {name: getattr(config, name) for name in names} == {name: VALUES[name] for name in names}
    assert config.model == "/models/m"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "model is not set; give --model, BLOCKYARD_MODEL, or model in the --config file"),
        ({"port": "70000"}, "port (--port, BLOCKYARD_PORT): Input should be less than or equal to 65535"),
        ({"max_num_seqs": "many"}, "max_num_seqs (--max-num-seqs, BLOCKYARD_MAX_NUM_SEQS)"),
        ({"dtype": "int4"}, "'float32', 'float16' or 'bfloat16' (got 'int4')"),
        ({"prefix_cache": "maybe"}, "prefix_cache (--prefix-cache, BLOCKYARD_PREFIX_CACHE)"),
        ({"memory_fraction": "nan"}, "memory_fraction"),
        ({"grace_period": "-1"}, "greater than or equal to 0 (got '-1')"),
        ({"block_tokens": "0"}, "block_tokens"),
    ],
)
def test_a_bad_setting_is_named_with_what_it_can_be(
    given: dict[str, str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    settings = given if not given else {"model": "m", **given}
    file = tmp_path / "agent.json"
    file.write_text(json.dumps(settings))
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    for command in (["agent", *flags], ["agent", "--config", str(file)]):
        assert cli.main(command) == 2
        assert says in capsys.readouterr().err
    for name, value in settings.items():
        monkeypatch.setenv(f"BLOCKYARD_{name.upper()}", value)
    assert cli.main(["agent"]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.toml", 'model = "m"\nports = 1\n', "ports is not a setting"),
        ("a.toml", "model = ", "a.toml cannot be read as .toml"),
        ("a.json", "{", "a.json cannot be read as .json"),
        ("a.json", "[1]", "a.json cannot be read as .json"),
        ("a.json", "\udcff", "a.json cannot be read as .json"),
        ("none.toml", None, "none.toml cannot be read as .toml"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(SettingsError) as caught:
        AgentSettings.load({}, tmp_path / name)
    assert says in str(caught.value)
