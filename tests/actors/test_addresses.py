"""Which address processes are told, and which they listen at."""

from __future__ import annotations

import psutil
import pytest

from actors.addresses import address_for, interface_of, own_address


def test_loopback_is_told_only_to_those_on_the_same_node() -> None:
    assert address_for("10.0.0.1", ["10.0.0.1", "10.0.0.1"]) == "127.0.0.1"
    assert address_for("10.0.0.1", ["10.0.0.1", "10.0.0.2"]) == "10.0.0.1"
    assert address_for("10.0.0.1", ["10.0.0.2"]) == "10.0.0.1"


def test_a_machine_listens_on_the_interface_that_leads_to_the_others() -> None:
    """Not on the one that its host name resolves to."""
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert interface_of(own_address("127.0.0.1")) in ("lo", "lo0")
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family.name == "AF_INET":
                assert own_address(each.address) in (each.address, "127.0.0.1")
                assert interface_of(each.address) == name


def test_an_address_of_another_machine_has_no_interface_here() -> None:
    with pytest.raises(OSError, match=r"no network interface .* 198\.51\.100\.254"):
        interface_of("198.51.100.254")
