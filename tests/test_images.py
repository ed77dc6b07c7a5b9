"""What the Dockerfiles promise, as far as it can be proven without a container engine."""

from __future__ import annotations

import ast
import fnmatch
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

from blockyard.cli import main

ROOT = Path(__file__).parents[1]
DOCKERFILES = sorted(ROOT.glob("docker/*.Dockerfile"))
REQUIREMENTS = ROOT / "docker/operator-requirements.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

each_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)


class Instruction(NamedTuple):
    name: str
    text: str


def instructions(path: Path) -> list[Instruction]:
    """The instructions in order, comments gone, continued lines joined, ARGs' defaults filled in."""
    lines = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    found, arguments = [], {}
    for line in lines.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        name, _, text = line.strip().partition(" ")
        text = re.sub(r"\$\{(\w+)\}", lambda match: arguments.get(match[1], match[0]), text)
        if name == "ARG":
            key, _, default = text.partition("=")
            arguments[key] = default
        found.append(Instruction(name, re.sub(r"\s+", " ", text)))
    return found


def texts(path: Path, name: str) -> list[str]:
    return [instruction.text for instruction in instructions(path) if instruction.name == name]


def requirements() -> list[Requirement]:
    lines = REQUIREMENTS.read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def in_build_context(dockerfile: Path, name: str) -> bool:
    """Does the .dockerignore let the file or folder through? The last pattern that fits decides."""
    inside = True
    for pattern in dockerfile.with_name(dockerfile.name + ".dockerignore").read_text().split():
        if fnmatch.fnmatchcase(name, pattern.lstrip("!")) and (
            "/" not in name or "/" in pattern or pattern == "**"
        ):
            inside = pattern.startswith("!")
    return inside


def test_there_are_two_images() -> None:
    assert [path.name for path in DOCKERFILES] == ["agent.Dockerfile", "operator.Dockerfile"]


@each_dockerfile
def test_bases_are_pinned_to_a_patch_release_of_a_named_distribution(path: Path) -> None:
    stages = {text.split(" AS ")[1] for text in texts(path, "FROM") if " AS " in text}
    bases = {text.split(" AS ")[0] for text in texts(path, "FROM")} - stages
    assert bases
    for base in bases:
        assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", base), f"{path.name} starts from {base}"


@each_dockerfile
def test_the_images_run_as_a_numbered_user_who_is_not_root(path: Path) -> None:
    last = [each.name for each in instructions(path)]
    assert last.index("USER") > len(last) - 1 - last[::-1].index("RUN"), "what is installed belongs to root"
    user, _, group = texts(path, "USER")[-1].partition(":")
    assert int(user) > 0
    assert int(group) > 0


@each_dockerfile
def test_nothing_is_fetched_but_packages(path: Path) -> None:
    assert not texts(path, "ADD"), "ADD fetches what nobody has verified: use COPY"
    for run in texts(path, "RUN"):
        assert not re.search(r"\b(curl|wget|git clone)\b|https?://", run)


@each_dockerfile
def test_what_is_copied_exists_and_is_in_the_build_context(path: Path) -> None:
    copies = [text.split() for text in texts(path, "COPY") if not text.startswith("--from")]
    for *sources, _ in copies:
        for source in sources:
            if source != ".":
                assert (ROOT / source).exists(), f"{path.name} copies {source}, which does not exist"
                assert in_build_context(path, source), f"{path.name}.dockerignore leaves {source} out"


@each_dockerfile
def test_all_packages_of_the_wheel_are_copied(path: Path) -> None:
    copied = {source for text in texts(path, "COPY") for source in text.split()[:-1]}
    folders = {name.split(".")[1] for name in PROJECT["tool"]["setuptools"]["packages"] if "." in name}
    assert folders <= copied
    assert {*PROJECT["project"]["license-files"], PROJECT["project"]["readme"], "pyproject.toml"} <= copied
    assert {name for name in copied if name.endswith(".py")} == {path.name for path in ROOT.glob("*.py")}


def test_secrets_and_junk_stay_out_of_the_build_context() -> None:
    for path in DOCKERFILES:
        for name in (".git", ".env", ".venv", "tests", "benchmarks", "id_rsa"):
            assert not in_build_context(path, name)


def test_the_agents_image_starts_a_command_that_exists(capsys: pytest.CaptureFixture[str]) -> None:
    dockerfile = ROOT / "docker/agent.Dockerfile"
    (entrypoint,), (command,) = texts(dockerfile, "ENTRYPOINT"), texts(dockerfile, "CMD")
    assert json.loads(entrypoint) == ["blockyard"]
    assert "blockyard" in PROJECT["project"]["scripts"]
    with pytest.raises(SystemExit) as ended:
        main([*json.loads(command), "--help"])
    assert ended.value.code == 0
    assert "--model" in capsys.readouterr().out


def test_the_agents_image_installs_extras_that_exist() -> None:
    (extra,) = re.findall(r"\[(\w+)\]\"", " ".join(texts(ROOT / "docker/agent.Dockerfile", "RUN")))
    assert extra in PROJECT["project"]["optional-dependencies"]


# ── The operator goes without torch ───────────────────────────────────────────────────────────────────────


def with_dependencies(wanted: list[Requirement]) -> dict[str, Distribution]:
    """The distributions that pip would install for these, by canonical name."""
    found: dict[str, Distribution] = {}
    waiting = list(wanted)
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found[name] = distribution(name)
        waiting += map(Requirement, found[name].requires or ())
    return found


def top_level(installed: Distribution) -> set[str]:
    """The entries of site-packages that belong to a distribution."""
    return {file.parts[0] for file in installed.files or () if file.parts[0] not in ("..", "__pycache__")}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like site-packages of the operator's image: the listed packages, theirs, and blockyard."""
    folder = tmp_path_factory.mktemp("site")
    for installed in with_dependencies(requirements()).values():
        for name in top_level(installed):
            if not (folder / name).exists():
                (folder / name).symlink_to(str(installed.locate_file(name)))
    (folder / "blockyard").symlink_to(ROOT)
    return folder


def in_image(site: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code with the standard library and ``site`` alone."""
    return subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", f"import sys; sys.path.append({str(site)!r})\n{code}"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


IMPORT = """
import importlib, json, sys
importlib.import_module({module!r})
print(json.dumps(sorted(sys.modules)))
"""


def started(dockerfile: Path) -> str:
    """The module that the image runs."""
    (entrypoint,) = texts(dockerfile, "ENTRYPOINT")
    python, switch, module = json.loads(entrypoint)
    assert (python, switch) == ("python", "-m")
    return str(module)


@pytest.fixture(scope="module")
def loaded(site: Path) -> set[str]:
    """Names of all modules that the operator's process loads."""
    run = in_image(site, IMPORT.format(module=started(ROOT / "docker/operator.Dockerfile")))
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout))


@pytest.fixture(scope="module")
def imported(loaded: set[str]) -> set[str]:
    """The top-level modules of those."""
    return {name.partition(".")[0] for name in loaded}


def test_the_operators_list_of_packages_is_complete(imported: set[str]) -> None:
    assert {"blockyard", "kopf", "pydantic"} <= imported
    assert not {"torch", "numpy", "triton", "transformers"} & imported


def test_the_operators_list_of_packages_names_nothing_that_is_not_imported(imported: set[str]) -> None:
    for requirement in requirements():
        modules = {name.partition(".")[0] for name in top_level(distribution(requirement.name))}
        assert modules & imported, (
            f"{requirement.name} is in {REQUIREMENTS.name}, but the operator does not import it"
        )


def test_what_the_operator_imports_itself_is_listed_itself(loaded: set[str]) -> None:
    """And does not just happen to come with something else, unless in one exact version (pydantic-core)."""
    brought = [distribution(each.name) for each in requirements()]
    pinned = [
        each
        for one in brought
        for each in map(Requirement, one.requires or ())
        if "==" in str(each.specifier)
    ]
    brought += with_dependencies([each for each in pinned if not each.marker]).values()
    listed = {name.partition(".")[0] for each in brought for name in top_level(each)}
    ours = [ROOT / f"{'/'.join(name.split('.')[1:])}.py" for name in loaded if name.count(".") == 2]
    for path in filter(Path.is_file, ours):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                assert name in listed, f"{path.name} imports {name}, which {REQUIREMENTS.name} does not bring"


def test_torch_cannot_be_imported_there(site: Path) -> None:
    """The check itself can fail: without the list, what is not in it is not found."""
    run = in_image(site, "import torch")
    assert "No module named 'torch'" in run.stderr


def test_the_operators_ranges_are_those_of_the_project() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    lines = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]
    project = {requirement.name: requirement for requirement in map(Requirement, lines)}
    for requirement in requirements():
        assert requirement.name in project, f"{requirement.name} is not in pyproject.toml"
        assert requirement.specifier == project[requirement.name].specifier


def test_the_operators_image_starts_the_operator_which_says_what_it_needs(site: Path) -> None:
    module = started(ROOT / "docker/operator.Dockerfile")
    run = in_image(site, f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)")
    assert run.returncode == 2, run.stderr
    assert "BLOCKYARD_OPERATOR_AGENT_IMAGE" in run.stderr
