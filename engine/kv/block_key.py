"""Content addresses of KV blocks: the same tokens get the same key on every machine, after every restart.

A key is a hash chain (as in vLLM's prefix cache): it covers the block's tokens, all tokens before them
and a salt. Only content enters the key. If it contained a property of one instance (free memory, pool size,
node), no block would be found again after a restart, and no error would show it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

KEY_BYTES = 32


def root_key(layout_digest: str, tenant: str) -> bytes:
    """The start of a chain. It differs by layout and tenant, so their blocks can never get the same key."""
    salt = f"{len(layout_digest)}:{layout_digest}{tenant}".encode("utf-8", "surrogatepass")
    return blake2b(salt, digest_size=KEY_BYTES, person=b"blockyard-root").digest()


def child_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of the full block holding ``token_ids`` after the chain that ends in ``parent``."""
    return blake2b(_little_endian(token_ids), key=parent, digest_size=KEY_BYTES).digest()


def _little_endian(token_ids: Sequence[int]) -> bytes:
    packed = array("i", token_ids)
    if _BIG_ENDIAN:
        packed.byteswap()
    return packed.tobytes()


_BIG_ENDIAN = array("i", [1]).tobytes()[0] == 0
