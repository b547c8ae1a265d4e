"""Hosts whose images may be fetched: only those on a list, and no way into the network of who fetches."""

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
    An address from which no image is fetched.

    Attributes:
        reason: why, as the end of a sentence.
    """

    def __init__(self, url: str, reason: str):
        super().__init__(f"{short_name(url)!r}: {reason}")
        self.url, self.reason = url, reason


@dataclass(frozen=True)
class Host:
    """A host and a port; no port: those of http and https."""

    name: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> "Host":
        """
        Args:
            text: `name`, `name:port`, an IPv4 address or an IPv6 address in brackets, with or without a port.

        Raises:
            InputError: if it is none.
        """
        try:
            parts = urlsplit(f"//{text}")
            name, port = parts.hostname, parts.port
        except ValueError:
            name = port = None
        if not name or parts.netloc != text or "@" in text or not re.fullmatch(r"[\w.:-]+", name, re.ASCII):
            raise InputError(f"The image host is {text!r}; allowed: a name or an address, or with a port NAME:PORT.")
        return cls(name, port)

    def covers(self, name: str, port: int) -> bool:
        """Whether it is the host and port of an address."""
        return self.name == name and (port in PORTS.values() if self.port is None else port == self.port)


@dataclass(frozen=True)
class HostPolicy:
    """Hosts whose images are fetched: `public` ones, and `private` ones that may have private addresses."""

    public: tuple[Host, ...] = ()
    private: tuple[Host, ...] = ()

    @classmethod
    def parse(cls, public: Iterable[str], private: Iterable[str]) -> "HostPolicy":
        """
        Raises:
            InputError: see `Host.parse`.
        """
        return cls(tuple(map(Host.parse, public)), tuple(map(Host.parse, private)))


@dataclass(frozen=True)
class Target:
    """Where a request goes: what the URL says, and whether its host may be a private one."""

    url: SplitResult
    host: str
    port: int
    may_be_private: bool


def check_url(url: str, policy: HostPolicy) -> Target:
    """
    Raises:
        ImageRefused: if it is no http(s) address, or its host and port are not on the list.
    """
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ImageRefused(url, "it has characters that an address has not; quote them")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ImageRefused(url, "it is no address") from error
    if parts.scheme not in PORTS:
        raise ImageRefused(url, "allowed: a data URI, or an http or https address")
    if not host or "@" in parts.netloc:
        raise ImageRefused(url, "it has no host, or a user's name")
    port = PORTS[parts.scheme] if port is None else port
    is_private = any(known.covers(host, port) for known in policy.private)
    if not is_private and not any(known.covers(host, port) for known in policy.public):
        raise ImageRefused(url, "its host is not on the list of allowed image hosts")
    return Target(parts, host, port, is_private)


def is_allowed(address: Address, may_be_private: bool = False) -> bool:
    """Whether a connection to an address is: a public one, or, if it may be, one of a private network or this host."""
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
    """The IPv4 address to which a packet would go."""
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & (2**IPV4_BITS - 1))
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
