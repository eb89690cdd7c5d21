"""No user makes a center call its own network: not by an address, a name, or a name that changes."""

import pytest

from runtime.destinations import Destinations, RefusedDestination
from tests.fakes import resolves

PUBLIC = "93.184.216.34"


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "https://EXAMPLE.com/hooks?of=me",
        "https://hooks.example.com:8443/",
        "https://xn--bcher-kva.example/",
        f"https://{PUBLIC}/",
        "https://[2606:2800:220:1::1]:8443/hook",
    ],
)
def test_public_https_urls_are_in_order(url: str) -> None:
    assert resolves().origin(url).scheme == "https"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.com/", "https"),
        ("ftp://example.com/", "such as"),
        ("file:///etc/passwd", "such as"),
        ("https://", "such as"),
        ("https:///path", "such as"),
        ("example.com", "such as"),
        ("", "printable"),
        ("https://example.com/" + "a" * 2048, "2048"),
        ("https://user:password@example.com/", "password"),
        ("https://example.com@evil.example/", "password"),
        ("https://@example.com/", "password"),
        ("https://example.com\\@evil.example/", "printable"),
        ("https://example.com/#fragment", "fragment"),
        ("https://example.com/\r\nHost: evil", "printable"),
        (" https://example.com/", "printable"),
        ("https://b\u00fccher.example/", "printable"),
        ("https://example.com:0/", "port"),
        ("https://example.com:65536/", "a URL"),
        ("https://[::1/", "a URL"),
        ("https://exa_mple-.com/", "host"),
        ("https://.../", "host"),
        ("https://2130706433/", "usual form"),
        ("https://0x7f000001/", "usual form"),
        ("https://0x7f.1/", "usual form"),
        ("https://0177.0.0.1/", "usual form"),
        ("https://127.1/", "usual form"),
        ("https://127.0.0.1./", "usual form"),
    ],
)
def test_other_urls_are_not_and_the_refusal_repeats_nothing(url: str, why: str) -> None:
    with pytest.raises(RefusedDestination, match=why) as refused:
        resolves().origin(url)
    assert "evil" not in str(refused.value)


PRIVATE = [
    "127.0.0.1",
    "127.255.255.254",
    "0.0.0.0",  # noqa: S104 - nobody listens there
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "169.254.169.254",
    "192.0.2.1",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0a00:1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::",
    "2001:0:0:0:0:0:80ff:fffe",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "fd00:ec2::254",
    "ff02::1",
    "2001:db8::1",
]


@pytest.mark.parametrize("address", PRIVATE)
async def test_private_addresses_are_not_called_by_whatever_name(address: str) -> None:
    with pytest.raises(RefusedDestination, match="network"):
        await resolves().addresses(address)
    with pytest.raises(RefusedDestination, match="network"):
        await resolves(hooks=[address]).addresses("hooks.example.com")


async def test_one_private_address_among_public_ones_is_enough() -> None:
    with pytest.raises(RefusedDestination, match="network"):
        await resolves(hooks=[PUBLIC, "10.0.0.1"]).addresses("hooks.example.com")


async def test_a_name_without_an_address_is_refused() -> None:
    with pytest.raises(RefusedDestination, match="no address"):
        await resolves().addresses("nowhere.example.com")


@pytest.mark.parametrize(
    "address", [PUBLIC, "2606:2800:220:1::1", "::ffff:5db8:d822", "64:ff9b::5db8:d822"]
)
async def test_public_addresses_are_called(address: str) -> None:
    assert await resolves(hooks=[address]).addresses("hooks.example.com") == [address]


async def test_what_the_configuration_allows_is_called_and_nothing_beside_it() -> None:
    allowing = Destinations(
        resolves().resolve, http_allowed=True, networks_allowed=("10.1.0.0/16", "::1/128")
    )
    assert allowing.origin("http://10.1.0.1:8080/").port == 8080
    for address in ("10.1.0.1", "::1", "::ffff:10.1.0.1"):
        assert await allowing.addresses(address)
    for address in ("10.2.0.1", "127.0.0.1"):
        with pytest.raises(RefusedDestination):
            await allowing.addresses(address)
