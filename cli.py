"""The ``blockyard`` command: subcommands are thin, what they do is elsewhere.

Each imports what it runs when it is run, so that a gateway is not made to load an agent.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic_settings import BaseSettings

from . import __version__
from .agent.errors import SettingsError
from .agent.gateway.settings import GatewaySettings
from .agent.settings import AgentSettings
from .engine.errors import ConfigError, EngineError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="blockyard", description="LLM serving from one paged KV pool")
    parser.add_argument("--version", action="version", version=f"blockyard {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    agent = commands.add_parser(
        "agent",
        help="serve a model over HTTP",
        description="Every flag is also BLOCKYARD_NAME in the environment, and name in the --config file.",
    )
    agent.add_argument("--config", type=Path, help="settings from a .toml or .json file")
    _add_flags(agent, AgentSettings)

    gateway = commands.add_parser(
        "gateway",
        help="take requests for many agents",
        description="Every flag is also BLOCKYARD_GATEWAY_NAME in the environment.",
    )
    _add_flags(gateway, GatewaySettings)

    run = commands.add_parser(
        "up",
        help="run an LLMService on this machine",
        description="Runs the manifest that a cluster would: agents and a gateway as processes. A change of "
        "the file is rolled out. Ctrl-C stops everything.",
    )
    run.add_argument("manifest", type=Path, help="YAML file with one LLMService")
    run.add_argument("--port", type=int, default=8000, help="port of the gateway (default: %(default)s)")
    run.add_argument("--keys", type=Path, help="folder with API keys, in place of spec.auth's Secret")

    for name, text in (("status", "show all LLMServices"), ("top", "keep showing all LLMServices")):
        watch = commands.add_parser(
            name,
            help=text,
            description="Those of this machine and those of the cluster in KUBECONFIG or ~/.kube/config.",
        )
        watch.add_argument("-n", "--namespace", help="of the cluster; all namespaces if unset")
        watch.add_argument("--local", action="store_true", help="those of this machine alone")

    talk = commands.add_parser("chat", help="chat with any OpenAI server in the terminal")
    talk.add_argument(
        "--url", default="http://127.0.0.1:8000", help="server to talk to (default: %(default)s)"
    )
    talk.add_argument("--model", help="model name; the server's first if unset")
    talk.add_argument("--system", help="system prompt")
    talk.add_argument("--temperature", type=float)
    talk.add_argument("--max-tokens", type=int)
    return parser


def _add_flags(parser: argparse.ArgumentParser, settings: type[BaseSettings]) -> None:
    for name, field in settings.model_fields.items():
        default = "" if field.is_required() or field.default is None else f" (default: {field.default})"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            metavar=_metavar(field.annotation),
            help=f"{field.description}{default}".replace("%", "%%"),
        )


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "{" + ",".join(get_args(annotation)) + "}"
    if annotation is bool:
        return "{true,false}"
    return "N" if annotation in (int, int | None) else "X" if annotation is float else "TEXT"


def _flags(arguments: argparse.Namespace, settings: type[BaseSettings]) -> dict[str, Any]:
    return {name: value for name in settings.model_fields if (value := getattr(arguments, name)) is not None}


def _operate(arguments: argparse.Namespace) -> int:
    """The commands that need the operator's packages, which an agent's image does not have."""
    try:
        from .operator import terminal
        from .operator.kube import KubeError
        from .operator.local.manifest import ManifestError
        from .operator.settings import SettingsError as OperatorSettingsError
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"blockyard {arguments.command} needs {error.name}: pip install 'blockyard[operator]'"
        ) from None
    try:
        if arguments.command == "up":
            return asyncio.run(terminal.up(arguments.manifest, arguments.port, arguments.keys))
        shown = terminal.show(arguments.namespace, here=arguments.local, follow=arguments.command == "top")
        return asyncio.run(shown)
    except KubeError as error:
        raise EngineError(terminal.words(error)) from None
    except (ManifestError, OperatorSettingsError) as error:
        raise EngineError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command != "chat":
            logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        if arguments.command == "agent":
            from .agent import server

            settings = AgentSettings.load(_flags(arguments, AgentSettings), arguments.config)
            return asyncio.run(server.serve(settings))
        if arguments.command == "gateway":
            from .agent.gateway import server as gateway

            return asyncio.run(gateway.serve(GatewaySettings.load(_flags(arguments, GatewaySettings))))
        if arguments.command in ("up", "status", "top"):
            return _operate(arguments)
        options = {
            name: value
            for name in ("temperature", "max_tokens")
            if (value := getattr(arguments, name)) is not None
        }
        from .agent.chat_client import chat

        return chat(arguments.url, arguments.model, arguments.system, options)
    except (EngineError, SettingsError) as error:
        print(f"blockyard: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the shell's prompt goes on a line of its own
        return 130


if __name__ == "__main__":
    sys.exit(main())
