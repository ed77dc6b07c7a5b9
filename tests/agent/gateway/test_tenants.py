"""API keys and the limits of tenants, with a clock of the test's own."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from blockyard.agent.errors import SettingsError
from blockyard.agent.gateway import tenants
from blockyard.agent.gateway.tenants import LOOK_INTERVAL, ROUNDING, Keys, LimitReached, Limits


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_key_is_its_tenants_and_changes_count(tmp_path: Path) -> None:
    clock = Clock()
    (tmp_path / "alice").write_text("key-a1\n\nkey-a2\n")
    (tmp_path / "bob").write_text("key-b")
    keys = Keys(tmp_path, clock)
    assert [keys.tenant(key) for key in ("key-a1", "key-a2", "key-b")] == ["alice", "alice", "bob"]
    assert [keys.tenant(key) for key in ("", "key-", "key-a1 ", "KEY-B", "\ud800")] == [None] * 5
    (tmp_path / "bob").write_text("key-b2")
    clock.now += LOOK_INTERVAL
    assert [keys.tenant(key) for key in ("key-b", "key-b2")] == [None, "bob"]
    (tmp_path / "alice").unlink()
    clock.now += LOOK_INTERVAL
    assert keys.tenant("key-a1") is None


def test_a_secret_as_kubernetes_mounts_and_swaps_it(tmp_path: Path) -> None:
    clock = Clock()

    def publish(revision: str, key: str) -> None:
        folder = tmp_path / f"..{revision}"
        folder.mkdir()
        (folder / "alice").write_text(key)
        (tmp_path / "..tmp").symlink_to(folder.name)
        (tmp_path / "..tmp").replace(tmp_path / "..data")

    publish("2026_1", "old")
    (tmp_path / "alice").symlink_to("..data/alice")
    keys = Keys(tmp_path, clock)
    assert keys.tenant("old") == "alice"
    publish("2026_2", "new")
    clock.now += LOOK_INTERVAL
    assert [keys.tenant("old"), keys.tenant("new")] == [None, "alice"]


def test_keys_that_cannot_be_read_stay_as_they_are(tmp_path: Path) -> None:
    clock = Clock()
    folder = tmp_path / "keys"
    with pytest.raises(SettingsError, match="keys_dir"):
        Keys(folder)
    folder.mkdir()
    assert Keys(folder).tenant("anything") is None  # no keys yet: nobody gets in
    (folder / "alice").write_text("key")
    (folder / ("x" * 200)).write_text("long")
    (folder / "folder").mkdir()
    keys = Keys(folder, clock)
    assert [keys.tenant("key"), keys.tenant("long")] == ["alice", None]
    folder.rename(tmp_path / "gone")
    clock.now += LOOK_INTERVAL
    assert keys.tenant("key") == "alice"


def test_a_key_of_two_tenants_is_the_firsts(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("same")
    (tmp_path / "a").write_text("same")
    assert Keys(tmp_path).tenant("same") == "a"


@given(st.integers(1, 600), st.lists(st.floats(0, 30), max_size=80))
@example(1, [0.1, 0.0])  # sixty seconds later less than one request has come back, by a rounding error
def test_never_more_requests_than_the_rate_allows(rate: int, pauses: list[float]) -> None:
    clock = Clock()
    limits = Limits(rate, None, clock)
    begun, served = clock.now, 0
    for pause in pauses:
        clock.now += pause
        refusal: LimitReached | None = None
        try:
            with limits.request("a"):
                served += 1
        except LimitReached as error:
            refusal = error
        if refusal is not None:
            assert refusal.reason == "requests_per_minute"
            assert 1 <= refusal.retry_after <= 60 / rate + 1
            # A tenant who waits as long as Retry-After says is served.
            clock.now += refusal.retry_after
            with limits.request("a"):
                served += 1
        assert served <= rate + (clock.now - begun) * rate / 60 + 2 * ROUNDING


def test_a_minutes_requests_may_come_at_once_and_tenants_do_not_share() -> None:
    limits = Limits(3, None, Clock())
    for tenant in ("a", "b"):
        for _ in range(3):
            with limits.request(tenant):
                pass
        with pytest.raises(LimitReached, match="requests_per_minute"), limits.request(tenant):
            pass


def test_open_requests_are_bounded_and_given_back_whatever_happens() -> None:
    limits = Limits(None, 2, Clock())
    with limits.request("a"), limits.request("a"):
        with pytest.raises(LimitReached, match="concurrent_requests") as caught, limits.request("a"):
            pass
        assert caught.value.retry_after >= 1
        with limits.request("b"):
            pass
    for _ in range(5):
        with pytest.raises(ZeroDivisionError), limits.request("a"):
            raise ZeroDivisionError
    with limits.request("a"), limits.request("a"):
        pass


def test_a_refusal_by_concurrency_costs_nothing_of_the_rate() -> None:
    limits = Limits(2, 1, Clock())
    with limits.request("a"):
        for _ in range(5):
            with pytest.raises(LimitReached, match="concurrent_requests"), limits.request("a"):
                pass
    with limits.request("a"):
        pass


def test_tenants_that_ask_for_nothing_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants, "MANY_TENANTS", 100)
    clock = Clock()
    limits = Limits(60, 5, clock)
    with limits.request("open"):
        for number in range(1000):
            clock.now += 1
            with limits.request(str(number)):
                pass
        assert len(limits) <= 101
        with ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(limits.request("open"))
            with pytest.raises(LimitReached), limits.request("open"):
                pass
