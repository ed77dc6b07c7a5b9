"""Bearer tokens, compared so that the time taken says nothing about them."""

from __future__ import annotations

import hmac

from aiohttp import web


def bearer(request: web.Request) -> str:
    """What the client sent as ``Authorization: Bearer``; empty if nothing."""
    kind, _, credential = request.headers.get("Authorization", "").partition(" ")
    return credential.strip() if kind.lower() == "bearer" else ""


def has_token(request: web.Request, token: str) -> bool:
    given = bearer(request).encode("utf-8", "surrogateescape")
    return hmac.compare_digest(given, token.encode())
