"""Hosts from which images may be fetched: only those on a list, without access to the local network."""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from fusion_hf.common.errors import InputError, short_name

PORTS = {"http": 80, "https": 443}
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
IPV4_BITS = 32

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class ImageRefused(Exception):
    """
    A URL from which no image is fetched.

    Attributes:
        reason: Reason, as the end of a sentence.
    """

    def __init__(self, url: str, reason: str):
        super().__init__(f"{short_name(url)!r}: {reason}")
        self.url, self.reason = url, reason


@dataclass(frozen=True)
class Host:
    """A host and a port. Without a port, those of http and https are meant."""

    name: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> "Host":
        """
        Parse a host.

        Args:
            text: `name`, `name:port`, an IPv4 address or an IPv6 address in brackets, with or without a port.

        Raises:
            InputError: If `text` is not a host.
        """
        try:
            parts = urlsplit(f"//{text}")
            name, port = parts.hostname, parts.port
        except ValueError:
            name = port = None
        if not name or parts.netloc != text or "@" in text or not re.fullmatch(r"[\w.:-]+", name, re.ASCII):
            raise InputError(f"An image host must be NAME, NAME:PORT or an IP address, got {text!r}.")
        return cls(name, port)

    def covers(self, name: str, port: int) -> bool:
        """Return whether this is the host and port of a URL."""
        return self.name == name and (port in PORTS.values() if self.port is None else port == self.port)


@dataclass(frozen=True)
class HostPolicy:
    """Hosts from which images may be fetched. Those in `private` may have private addresses."""

    public: tuple[Host, ...] = ()
    private: tuple[Host, ...] = ()

    @classmethod
    def parse(cls, public: Iterable[str], private: Iterable[str]) -> "HostPolicy":
        """
        Parse lists of hosts.

        Args:
            public: Hosts with public addresses, see `Host.parse`.
            private: Hosts that may have private addresses.

        Raises:
            InputError: If a text is not a host.
        """
        return cls(tuple(map(Host.parse, public)), tuple(map(Host.parse, private)))


@dataclass(frozen=True)
class Target:
    """Destination of a request: the parts of the URL, and whether its host may have a private address."""

    url: SplitResult
    host: str
    port: int
    may_be_private: bool


def check_url(url: str, policy: HostPolicy) -> Target:
    """
    Check that an image may be fetched from a URL.

    Args:
        url: URL of the image.
        policy: Hosts from which images may be fetched.

    Returns:
        The parts of the URL.

    Raises:
        ImageRefused: If it is not an http(s) URL, or if its host and port are not on the list.
    """
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ImageRefused(url, "it has characters that a URL must quote")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ImageRefused(url, "it is not a valid URL") from error
    if parts.scheme not in PORTS:
        raise ImageRefused(url, "it must be a data URI, or an http or https URL")
    if not host or "@" in parts.netloc:
        raise ImageRefused(url, "it must have a host and no user name")
    port = PORTS[parts.scheme] if port is None else port
    is_private = any(known.covers(host, port) for known in policy.private)
    if not is_private and not any(known.covers(host, port) for known in policy.public):
        raise ImageRefused(url, "its host is not on the list of allowed image hosts")
    return Target(parts, host, port, is_private)


def is_allowed(address: Address, may_be_private: bool = False) -> bool:
    """
    Return whether connections to an address are allowed.

    Args:
        address: IP address of a host.
        may_be_private: Whether addresses of private networks and of this machine are allowed as well as public ones.
    """
    if isinstance(address, ipaddress.IPv6Address):
        inner = _inner_address(address)
        if inner is not None:
            return is_allowed(inner, may_be_private)
        if address.is_site_local:
            return False
    if address.is_multicast or address.is_unspecified or address.is_link_local:
        return False
    if may_be_private and (address.is_loopback or (address.is_private and not address.is_reserved)):
        return True
    return address.is_global and not address.is_reserved and not address.is_private


def _inner_address(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address to which a packet would go."""
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & (2**IPV4_BITS - 1))
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
