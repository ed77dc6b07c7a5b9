"""Bearer tokens: what agents, gateways and the operator of one service know each other by.

A token can change while everybody goes on working. It comes from a folder, as Kubernetes mounts a Secret: the
file ``token`` holds the one to send, the file ``previous``, if it is there, one that is accepted as well. The
kubelet brings a changed Secret to each pod at a time of its own, up to two minutes apart, so for a while some
pods know only the old token and some only the new one. Therefore a token that the folder no longer names is
still accepted, and still tried where the newer one is refused, for ``OVERLAP`` seconds.
"""

from __future__ import annotations

import hmac
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from .errors import SettingsError

log = logging.getLogger("blockyard.agent")

OVERLAP = 600.0  # seconds; longer than any kubelet takes to bring a changed Secret to its pods
LOOK_INTERVAL = 1.0  # seconds between two looks at the folder
FILES = ("token", "previous")  # in the order in which their tokens are tried


def bearer(request: web.Request) -> str:
    """What the client sent as ``Authorization: Bearer``; empty if nothing."""
    kind, _, credential = request.headers.get("Authorization", "").partition(" ")
    return credential.strip() if kind.lower() == "bearer" else ""


class Tokens:
    """The tokens of one process: those it accepts, and those it sends, the newest first."""

    def __init__(
        self, token: str | None, folder: Path | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """One token or a folder with it; with neither, none is asked for. SettingsError if it has none."""
        if token is not None and folder is not None:
            raise SettingsError("token and token_dir are both set; set one of them")
        self._folder = folder
        self._clock = clock
        self._looked = -math.inf
        self._until = {} if token is None else {token: math.inf}  # token -> until when it is valid
        if folder is not None:
            self._take(_read(folder))

    def all(self) -> tuple[str, ...]:
        """The valid ones in the order in which they are to be tried; none if nobody is asked for any."""
        now = self._clock()
        if self._folder is not None and now - self._looked >= LOOK_INTERVAL:
            self._looked = now
            try:
                self._take(_read(self._folder))
            except SettingsError as error:
                log.warning("%s; the token stays as it is", error)
        if any(until < now for until in self._until.values()):
            self._until = {token: until for token, until in self._until.items() if until >= now}
        return tuple(self._until)

    def accept(self, request: web.Request) -> bool:
        """Whether the request may pass: it carries a valid token, or none is asked for.

        Each token is compared in a time that says nothing about it.
        """
        valid = self.all()
        given = bearer(request).encode("utf-8", "surrogateescape")
        return not valid or any(hmac.compare_digest(given, token.encode()) for token in valid)

    def _take(self, named: list[str]) -> None:
        """``named`` are valid until further notice, others that were valid so far for a while."""
        if [token for token, until in self._until.items() if until == math.inf] == named:
            return
        if self._until:
            log.info("the token has changed; the one before is accepted for %.0f s more", OVERLAP)
        end = self._clock() + OVERLAP
        before = {token: min(until, end) for token, until in self._until.items()}
        self._until = dict.fromkeys(named, math.inf)
        self._until |= {token: until for token, until in before.items() if token not in self._until}


def authorizations(tokens: Tokens) -> list[dict[str, str]]:
    """The headers to send, to be tried in this order where the one before is refused; at least one."""
    return [{"Authorization": f"Bearer {token}"} for token in tokens.all()] or [{}]


def _read(folder: Path) -> list[str]:
    """The tokens that a folder names, without repetition. SettingsError if there is none."""
    try:
        found = {name: (folder / name).read_text().strip() for name in FILES if (folder / name).exists()}
    except (OSError, ValueError) as error:
        raise SettingsError(f"the token in token_dir {folder} cannot be read: {error}") from None
    if not found.get(FILES[0]):
        raise SettingsError(f"token_dir {folder} has no token: its file {FILES[0]} is missing or empty")
    return list(dict.fromkeys(filter(None, found.values())))
