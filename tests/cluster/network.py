"""Addresses for pods: a block of loopback addresses that no other test run uses.

All pods are processes of one machine, and each has an address of its own, so that every pod can listen on the
same port, as pods do. Linux lets anyone listen anywhere in 127.0.0.0/8. An API server that was not built by
binaries.py refuses loopback addresses in endpoints; for such a one, route another block to this machine and
name it:

    ip address add 10.123.0.0/16 dev lo
    BLOCKYARD_TEST_POD_NETWORK=10.123.0.0/16 make test
"""

from __future__ import annotations

import ipaddress
import os
import random
import socket
from collections.abc import Iterator
from types import TracebackType

SETTING = "BLOCKYARD_TEST_POD_NETWORK"
_CLAIM_PORT = 10250  # held on the block's last address; a kubelet's port, since that address is the nodes'
_TRIES = 50


class PodNetwork:
    """A /16, ours until it is closed.

    Addresses are given out once each: a late client of an ended pod must not reach another one.
    """

    def __init__(self) -> None:
        given = os.environ.get(SETTING)
        blocks = [given] if given else [f"127.{n}.0.0/16" for n in random.sample(range(64, 255), _TRIES)]
        self._claim = socket.socket()
        for block in blocks:
            self.block = ipaddress.IPv4Network(block)
            self.host = str(self.block[-2])  # the nodes' own address
            try:
                self._claim.bind((self.host, _CLAIM_PORT))
                self._claim.listen(1)
                break
            except OSError as error:
                problem = error
        else:
            self._claim.close()
            raise OSError(f"no network for pods: {self.host}:{_CLAIM_PORT}: {problem}; see {SETTING}")
        self._free: Iterator[ipaddress.IPv4Address] = self.block.hosts()

    def take(self) -> str:
        """An address that no pod of this run has had."""
        address = str(next(self._free))
        if address == self.host:
            raise OSError(f"{self.block} has no more addresses")
        return address

    def close(self) -> None:
        self._claim.close()

    def __enter__(self) -> PodNetwork:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
