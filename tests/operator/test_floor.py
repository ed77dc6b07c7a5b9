"""The operator is small: it imports the standard library, its few dependencies, and agent.protocol."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "operator").glob("**/*.py"))
OF_THE_IMAGE = {"aiohttp", "kopf", "kubernetes", "prometheus_client", "pydantic", "pydantic_core"}
OF_THE_IMAGE |= {"pydantic_settings", "yaml"}
OF_THE_TERMINAL = {"filelock", "rich"}  # what only the command line and the local runtime need


def imported(file: Path) -> list[str]:
    """Everything that a module imports, wherever in it; our own with the dots resolved."""
    package = ["blockyard", *file.relative_to(ROOT).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def in_the_pod() -> set[Path]:
    """main.py and every module of ours that it leads to."""
    found, left = set(), {ROOT / "operator" / "main.py"}
    while left:
        file = left.pop()
        found.add(file)
        for name in imported(file):
            parts = name.removeprefix("blockyard.").split(".")
            folders = [ROOT / Path(*parts[:length]) for length in range(1, len(parts) + 1)]
            files = {each for path in folders for each in (path.with_suffix(".py"), path / "__init__.py")}
            left |= {each for each in files if each in FILES and each not in found}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_only_what_it_may_know_is_imported(file: Path) -> None:
    others = OF_THE_IMAGE if file in in_the_pod() else OF_THE_IMAGE | OF_THE_TERMINAL
    for name in imported(file):
        if name.startswith("blockyard"):
            allowed = ("blockyard.__version__", "blockyard.agent.protocol.", "blockyard.operator.")
            allowed += ("blockyard.user_cache.",)
            assert name.startswith(allowed), f"{file.name} imports {name}"
        else:
            top = name.partition(".")[0]
            assert top in sys.stdlib_module_names | others, f"{file.name} imports {name}"


def test_the_walk_finds_what_the_operator_is_made_of() -> None:
    names = {file.name for file in in_the_pod()}
    assert {"main.py", "reconcile.py", "replicas.py", "children.py", "merge.py", "llmservice.py"} <= names


def test_it_is_no_package_of_its_own() -> None:
    """A file operator/__init__.py would shadow the standard library's operator for who runs in the root."""
    assert not (ROOT / "operator" / "__init__.py").exists()
