"""Which address of a machine a process listens at, and which one it is told: loopback wherever that is enough."""

from __future__ import annotations

import socket
from collections.abc import Iterable

LOOPBACK = "127.0.0.1"


def address_for(owner: str, audience: Iterable[str]) -> str:
    """The address at which the nodes with the addresses `audience` reach the node `owner`: loopback where all of them
    are that node, else the node's own address."""
    return LOOPBACK if all(address == owner for address in audience) else owner


def own_address(towards: str) -> str:
    """This machine's address as the machine at `towards` (an IP address or a name) sees it. Nothing is sent."""
    family, kind, protocol, _, target = socket.getaddrinfo(towards, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return probe.getsockname()[0]


def interface_of(address: str) -> str:
    """The name of the network interface with this IP address. Raises OSError where this machine has none."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    raise OSError(f"no network interface of this machine ({socket.gethostname()}) has the address {address}")
