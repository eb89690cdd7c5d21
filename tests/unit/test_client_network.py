"""Whose calls and guesses count together: those of one address, or of one IPv6 network."""

import pytest

from runtime.grpc_server import client_network


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        ("ipv4:192.0.2.1:40000", "192.0.2.1"),
        ("ipv6:%5B2001:db8::1%5D:40000", "2001:db8::/64"),
        ("ipv6:[2001:db8::ffff:1:2:3]:40000", "2001:db8::/64"),
        ("ipv6:%5B2001:db8:0:1::1%5D:40000", "2001:db8:0:1::/64"),
        ("ipv6:%5B::ffff:192.0.2.1%5D:40000", "192.0.2.1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:40000", "fe80::/64"),
        ("unix:", ""),
        ("", ""),
    ],
)
def test_a_client_is_its_address_or_its_network(peer: str, network: str) -> None:
    assert client_network(peer) == network
