"""Tokens that change while requests come: the new one counts at once, the one before for a while."""

from __future__ import annotations

from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from blockyard.agent.bearer import LOOK_INTERVAL, OVERLAP, Tokens
from blockyard.agent.errors import SettingsError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def request(token: str) -> web.Request:
    return make_mocked_request("GET", "/status", {"Authorization": f"Bearer {token}"} if token else {})


def mount(folder: Path, **files: str) -> Path:
    """As the kubelet does it: all files change at once."""
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_without_a_token_everybody_passes_and_with_one_only_who_has_it() -> None:
    assert Tokens(None, None).accept(request(""))
    tokens = Tokens("secret", None)
    assert tokens.accept(request("secret"))
    assert not any(tokens.accept(request(wrong)) for wrong in ("", "secre", "secrets", "sécret"))


def test_a_changed_folder_is_followed_and_the_token_before_ends_after_the_overlap(tmp_path: Path) -> None:
    clock = Clock()
    tokens = Tokens(None, mount(tmp_path / "t", token="old\n"), clock)
    assert tokens.all() == ("old",)
    mount(tmp_path / "t", token="new")
    clock.now += LOOK_INTERVAL
    assert tokens.all() == ("new", "old"), "the new one is tried first"
    assert tokens.accept(request("old")) and tokens.accept(request("new"))
    clock.now += OVERLAP - 1
    assert tokens.accept(request("old"))
    clock.now += 2
    assert tokens.all() == ("new",) and not tokens.accept(request("old"))


def test_a_token_that_the_folder_calls_previous_is_valid_as_long_as_it_does(tmp_path: Path) -> None:
    clock = Clock()
    tokens = Tokens(None, mount(tmp_path / "t", token="new", previous="old"), clock)
    clock.now += 10 * OVERLAP
    assert tokens.all() == ("new", "old")
    mount(tmp_path / "t", token="new")
    clock.now += LOOK_INTERVAL
    assert tokens.accept(request("old"))
    clock.now += OVERLAP + 1
    assert not tokens.accept(request("old"))


@pytest.mark.parametrize("files", [{}, {"token": ""}, {"previous": "old"}])
def test_a_folder_without_a_token_changes_nothing_and_is_an_error_at_the_start(
    tmp_path: Path, files: dict[str, str]
) -> None:
    clock = Clock()
    tokens = Tokens(None, mount(tmp_path / "t", token="kept"), clock)
    mount(tmp_path / "t", **files)
    clock.now += 10 * OVERLAP
    assert tokens.all() == ("kept",)
    with pytest.raises(SettingsError, match="token_dir"):
        Tokens(None, tmp_path / "t")


def test_a_token_and_a_folder_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="set one of them"):
        Tokens("a", mount(tmp_path / "t", token="b"))
