"""What the documents say is where they say it is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
# `folder/file.py` or `folder/file.py: name`, and further bare `name`s after it in the same table cell.
REFERENCE = re.compile(
    r"`((?:kernels|engine|agent|operator|tests|benchmarks|examples|docs)/[\w/.-]*)(?:: (\w+))?`((?:, `\w+`)*)"
)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def names(path: Path) -> set[str]:
    """Everything a file defines: functions, classes, methods, fields."""
    if path.suffix != ".py":
        return set(re.findall(r"\w+", path.read_text()))
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_names_exist(document: Path) -> None:
    text = document.read_text()
    for match in REFERENCE.finditer(text):
        path, name, more = ROOT / match[1], match[2], re.findall(r"\w+", match[3])
        assert path.exists(), f"{document.name} speaks of {match[1]}, which does not exist"
        for each in [name, *more] if name else []:
            assert each in names(path), f"{document.name} speaks of {each} in {match[1]}, which is not there"
    for target in LINK.findall(text):
        assert (document.parent / target).exists(), f"{document.name} links to {target}, which does not exist"


def test_the_readme_has_the_two_commands() -> None:
    """They are what CI runs and what a newcomer types."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = set(re.findall(r"make ([a-z]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= commands <= targets
    assert "make test" in (ROOT / ".ci/run").read_text()
