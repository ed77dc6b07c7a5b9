"""Keeps the Secret NAME-internal: the token that agents, gateways and the operator share.

Agents and gateways read it from files, which the kubelet brings up to date up to two minutes after a change,
and in each pod at another time. So a token is never replaced at a stroke: the one before stays in the Secret
as ``previous``, which everybody accepts and falls back to, for OVERLAP seconds.

    somebody deletes the Secret          it comes back with the token that the agents have
    somebody writes another token        that one counts, and the one before becomes ``previous``
    the annotation ROTATE gets a value   a new random token, and the one before becomes ``previous``

The Secrets are not watched: that would need the right to list all Secrets there are. They are read by name, a
few a second. What must survive the operator is in the Secret itself; a token is lost only if its Secret is
deleted while no operator runs. Then a new one is made, which agents follow as they follow any other change.
"""

from __future__ import annotations

import base64
import binascii
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import children
from .api import GROUP
from .cluster import owned_by
from .companions import taken_words
from .kube import FIELD_MANAGER, SECRET, Kube, Raw, writers
from .observed import Service, seconds, stamp

OVERLAP = 900.0  # seconds for which the token before is kept
TOKEN, PREVIOUS = "token", "previous"
ROTATED = f"{GROUP}/rotated"  # annotation of the Secret: the value of ROTATE that was carried out last
CHANGED_AT = f"{GROUP}/token-changed-at"  # annotation of the Secret: when PREVIOUS became that


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a look at a service's Secret.

    ``tokens`` are to be tried in this order. ``taken`` says whose the Secret is if it is somebody else's,
    ``mended`` what was undone, ``again`` after how many seconds another look is due.
    """

    tokens: tuple[str, ...] = ()
    taken: str = ""
    mended: str = ""
    again: float | None = None


@dataclass(frozen=True, slots=True)
class _Content:
    """What a Secret says."""

    token: str
    previous: str
    rotated: str
    changed_at: float | None

    @classmethod
    def of(cls, raw: Raw) -> _Content:
        data, annotations = raw.get("data") or {}, raw["metadata"].get("annotations") or {}
        return cls(
            _decoded(data.get(TOKEN)),
            _decoded(data.get(PREVIOUS)),
            annotations.get(ROTATED, ""),
            seconds(annotations.get(CHANGED_AT)),
        )

    @property
    def tokens(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(filter(None, (self.token, self.previous))))


class InternalSecrets:
    """The Secrets of all services, as they were last read."""

    def __init__(self, kube: Kube, overlap: float = OVERLAP, clock: Callable[[], float] = time.time) -> None:
        self._kube = kube
        self._overlap = overlap
        self._clock = clock
        self._known: dict[str, _Content] = {}  # by uid of the service
        self._stale: set[str] = set()  # uids of services whose Secret must be read again

    def forget(self, uid: str) -> None:
        self._known.pop(uid, None)
        self._stale.discard(uid)

    def doubt(self) -> None:
        """Read all Secrets again before relying on them; the tokens that agents have are remembered."""
        self._stale |= self._known.keys()

    async def changed(self, service: Service) -> bool:
        """Whether somebody has changed the Secret since it was last read, which the next ``ensure`` mends."""
        found = await self._kube.get(SECRET, service.namespace, children.secret_name(service))
        if (
            found is not None
            and _Content.of(found) == self._known.get(service.uid)
            and not _astray(service, found)
        ):
            return False
        self._stale.add(service.uid)
        return True

    async def ensure(self, service: Service, *, write: bool, look: bool = False) -> Outcome:
        """The service's tokens, none if there is no Secret. It is made and mended, but only with ``write``.

        It is read if ``look`` is set, if it is not known, or if there is something to be done about it.
        """
        known = self._known.get(service.uid)
        settled = known is not None and known == self._wanted(service, known, known)
        if known is not None and settled and not look and service.uid not in self._stale:
            return Outcome(known.tokens, again=self._again(known))
        self._stale.discard(service.uid)
        name = children.secret_name(service)
        found = await self._kube.get(SECRET, service.namespace, name)
        if found is not None and not owned_by(found, service):
            return Outcome(known.tokens if known else (), taken=taken_words(found, service))
        if not write:
            if found is not None:
                self._known[service.uid] = known = _Content.of(found)
            return Outcome(known.tokens if known else ())
        mended = ""
        if found is None:
            mended = f"Secret {name} was deleted by somebody else and has been made again" if known else ""
            found = await self._kube.create(children.secret(service, known.token if known else _random()))
        now = _Content.of(found)
        if (wanted := self._wanted(service, now, known)) != now or _astray(service, found):
            if known is not None and now.tokens != known.tokens:
                who = next((each for each in writers(found) if each != FIELD_MANAGER), "somebody else")
                mended = (
                    f"the token in Secret {name} was changed by {who}; the one before stays valid for a while"
                )
            found = await self._kube.merge(SECRET, service.namespace, name, _patch(service, found, wanted))
        self._known[service.uid] = settled_now = _Content.of(found)
        return Outcome(settled_now.tokens, mended=mended, again=self._again(settled_now))

    def _wanted(self, service: Service, now: _Content, known: _Content | None) -> _Content:
        """What the Secret should say, given what it says and what it is known to have said."""
        token, previous, rotated, changed_at = now.token, now.previous, now.rotated, now.changed_at
        if not token:  # emptied
            token = known.token if known is not None and known.token else _random()
        elif known is not None and known.token not in ("", token, previous):  # replaced
            previous, changed_at = known.token, self._clock()
        if service.rotate and rotated != service.rotate:
            token, previous, rotated, changed_at = _random(), token, service.rotate, self._clock()
        if previous and changed_at is None:
            changed_at = self._clock()
        if not previous or (changed_at is not None and self._clock() >= changed_at + self._overlap):
            previous, changed_at = "", None
        return _Content(token, previous, rotated, None if changed_at is None else float(int(changed_at)))

    def _again(self, content: _Content) -> float | None:
        if content.changed_at is None:
            return None
        return max(0.1, content.changed_at + self._overlap - self._clock())


def _astray(service: Service, found: Raw) -> bool:
    """Whether its labels or its owner reference are not as they should be."""
    metadata, wanted = found["metadata"], children.secret(service, "")["metadata"]
    labels = metadata.get("labels") or {}
    return not wanted["labels"].items() <= labels.items() or wanted["ownerReferences"] != (
        metadata.get("ownerReferences") or []
    )


def _patch(service: Service, found: Raw, wanted: _Content) -> Raw:
    """A merge patch of the Secret that was found, and of no other version of it."""
    metadata = children.secret(service, "")["metadata"]
    annotations: dict[str, Any] = {
        ROTATED: wanted.rotated or None,
        CHANGED_AT: None if wanted.changed_at is None else stamp(wanted.changed_at),
    }
    return {
        "metadata": {
            "resourceVersion": found["metadata"]["resourceVersion"],
            "labels": metadata["labels"],
            "ownerReferences": metadata["ownerReferences"],
            "annotations": annotations,
        },
        "data": {
            TOKEN: _encoded(wanted.token),
            PREVIOUS: _encoded(wanted.previous) if wanted.previous else None,
        },
    }


def _random() -> str:
    return secrets.token_urlsafe(32)


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _decoded(data: Any) -> str:
    try:
        return base64.b64decode(data or "").decode().strip()
    except (binascii.Error, UnicodeDecodeError, TypeError):
        return ""
