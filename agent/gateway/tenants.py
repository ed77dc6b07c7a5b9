"""Who is asking, and how much they may: API keys and the limits of each tenant."""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import SettingsError

log = logging.getLogger("blockyard.gateway")

MAX_TENANT = 128  # characters; agents take no longer ones
LOOK_INTERVAL = 1.0  # seconds between two looks at the keys
MANY_TENANTS = 1024  # more are remembered only if they have requests open or recent
ROUNDING = 1e-6  # of a request; rounding must not refuse a tenant who waited as long as Retry-After said


class Keys:
    """A folder as Kubernetes mounts a Secret: a file is a tenant, its lines are the tenant's API keys.

    Keys are looked up by a digest that is keyed with a secret of this process, so that the time of a look-up
    tells nothing about any key. Changed files take effect within a second; files that cannot be read change
    nothing.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """SettingsError if the folder cannot be read."""
        self._folder = folder
        self._clock = clock
        self._pepper = secrets.token_bytes(32)
        self._looked = -math.inf
        self._seen: object = None
        self._tenants: dict[bytes, str] = {}
        try:
            self._read()
        except OSError as error:
            raise SettingsError(f"keys_dir {folder} cannot be read: {error}") from None

    def tenant(self, key: str) -> str | None:
        """Whose key it is; None if nobody's."""
        now = self._clock()
        if now - self._looked >= LOOK_INTERVAL:
            self._looked = now
            try:
                self._read()
            except OSError as error:
                log.warning("the API keys in %s cannot be read and stay as they are: %s", self._folder, error)
        return self._tenants.get(self._digest(key))

    def _digest(self, key: str) -> bytes:
        return hmac.digest(self._pepper, key.encode("utf-8", "surrogatepass"), hashlib.sha256)

    def _read(self) -> None:
        # Kubernetes keeps the files in hidden folders and swaps a link to change them all at once.
        files = sorted(file for file in self._folder.iterdir() if not file.name.startswith("."))
        stats = [(file, file.stat()) for file in files]
        seen = [(file, stat.st_mtime_ns, stat.st_size, stat.st_ino) for file, stat in stats]
        if seen == self._seen:
            return
        tenants: dict[bytes, str] = {}
        for file in files:
            if not file.is_file() or len(file.name) > MAX_TENANT or not file.name.isascii():
                log.warning(
                    "%s is no tenant: the name must be ASCII of at most %d characters", file, MAX_TENANT
                )
                continue
            for key in file.read_text(errors="replace").split():
                if tenants.setdefault(self._digest(key), file.name) != file.name:
                    log.warning("a key of tenant %s is another tenant's too and is not taken", file.name)
        self._tenants, self._seen = tenants, seen
        log.info("API keys read tenants=%d keys=%d", len(set(tenants.values())), len(tenants))


class LimitReached(Exception):
    """The tenant asks for more than it may. ``retry_after`` in whole seconds."""

    def __init__(self, message: str, *, reason: str, retry_after: int) -> None:
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after


@dataclass(slots=True)
class _Account:
    tokens: float  # requests that may begin now
    at: float  # when that was so
    open: int = 0  # requests being served


class Limits:
    """A token bucket (a minute's requests may come at once) and a bound on open requests, for each tenant."""

    def __init__(
        self,
        requests_per_minute: int | None,
        concurrent_requests: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_minute = requests_per_minute
        self._concurrent = concurrent_requests
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._many = MANY_TENANTS

    def __len__(self) -> int:
        return len(self._accounts)

    @contextmanager
    def request(self, tenant: str) -> Iterator[None]:
        """Within it a request of the tenant is open. LimitReached if it may not begin."""
        account = self._account(tenant)
        if self._concurrent is not None and account.open >= self._concurrent:
            raise LimitReached(
                f"{account.open} requests of this tenant are open and at most {self._concurrent} may be "
                "(concurrent_requests). Wait until one has ended",
                reason="concurrent_requests",
                retry_after=1,
            )
        if self._per_minute is not None:
            if account.tokens < 1 - ROUNDING:
                wait = math.ceil((1 - account.tokens) * 60 / self._per_minute)
                raise LimitReached(
                    f"this tenant may make {self._per_minute} requests per minute (requests_per_minute). "
                    f"Try again in {wait} s",
                    reason="requests_per_minute",
                    retry_after=wait,
                )
            account.tokens -= 1
        account.open += 1
        try:
            yield
        finally:
            account.open -= 1

    def _account(self, tenant: str) -> _Account:
        now = self._clock()
        if len(self._accounts) >= self._many and tenant not in self._accounts:
            # A tenant with nothing open and a full bucket can be forgotten.
            self._accounts = {
                name: account
                for name, account in self._accounts.items()
                if account.open or self._filled(account, now) < (self._per_minute or 0)
            }
            self._many = max(MANY_TENANTS, 2 * len(self._accounts))
        account = self._accounts.setdefault(tenant, _Account(float(self._per_minute or 0), now))
        account.tokens, account.at = self._filled(account, now), now
        return account

    def _filled(self, account: _Account, now: float) -> float:
        most = float(self._per_minute or 0)
        return min(most, account.tokens + (now - account.at) * most / 60)
