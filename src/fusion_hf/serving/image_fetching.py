"""Images at http(s) addresses, fetched without becoming a way into the network where the server is.

A host has to be on the operator's list. Its name is resolved once, all its addresses are checked, and the connection
goes to a checked address, never to the name again. Redirects are followed by the same rules; proxies are not used.
"""

import asyncio
import ipaddress
import re
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

import httpcore

from fusion_hf.common.errors import InputError, short_name
from fusion_hf.serving.api_errors import BAD_REQUEST, ApiError
from fusion_hf.serving.client_images import PARAM, too_large
from fusion_hf.serving.limits import Limits

PORTS = {"http": 80, "https": 443}
MAX_REDIRECTS = 3
SECONDS = 15.0  # for an image, redirects included
OK, REDIRECTS = 200, (301, 302, 303, 307, 308)
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
IPV4_BITS = 32
HEADERS = {"User-Agent": "fusion-hf", "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


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
        """Return whether it is the host and port of an address."""
        return self.name == name and (port in PORTS.values() if self.port is None else port == self.port)


@dataclass(frozen=True)
class HostPolicy:
    """Hosts whose images are fetched: `public` ones, and `private` ones that may have private addresses."""

    public: tuple[Host, ...] = ()
    private: tuple[Host, ...] = ()

    @classmethod
    def parse(cls, public: Iterable[str], private: Iterable[str]) -> "HostPolicy":
        """Read lists of hosts as `Host.parse` does."""
        return cls(tuple(map(Host.parse, public)), tuple(map(Host.parse, private)))


@dataclass(frozen=True)
class _Target:
    """Where a request goes: what the URL says, and whether its host may be a private one."""

    url: SplitResult
    host: str
    port: int
    may_be_private: bool


async def fetch_image(url: str, policy: HostPolicy, limits: Limits) -> bytes:
    """
    Fetch the content at an http(s) address.

    Raises:
        ApiError: if the address is not allowed, or gives no content within the limits.
    """
    try:
        return await asyncio.wait_for(_follow(url, policy, limits), SECONDS)
    except asyncio.TimeoutError as error:
        raise _refused(url, f"it took longer than {SECONDS:g} s") from error
    except (OSError, httpcore.NetworkError, httpcore.ProtocolError) as error:
        # what is wrong inside a network is not for clients; httpcore raises its own errors in the context of others
        raise _refused(url, f"it cannot be fetched ({type(error.__context__ or error).__name__})") from error


async def _follow(url: str, policy: HostPolicy, limits: Limits) -> bytes:
    for _ in range(MAX_REDIRECTS + 1):
        target = check_url(url, policy)
        reply = await _get(target, await _resolve(target), limits)
        if isinstance(reply, bytes):
            return reply
        url = urljoin(url, reply)
    raise _refused(url, f"it is redirected more than {MAX_REDIRECTS} times")


def _refused(url: str, reason: str) -> ApiError:
    return ApiError(BAD_REQUEST, f"The image {short_name(url)!r}: {reason}.", PARAM, "image_not_allowed")


def check_url(url: str, policy: HostPolicy) -> _Target:
    """Split an address, or raise an `ApiError` if it is no http(s) address, or its host and port are not listed."""
    if not url.isascii() or not url.isprintable() or " " in url:
        raise _refused(url, "it has characters that an address has not; quote them")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _refused(url, "it is no address") from error
    if parts.scheme not in PORTS:
        raise _refused(url, "allowed: a data URI, or an http or https address")
    if not host or "@" in parts.netloc:
        raise _refused(url, "it has no host, or a user's name")
    port = PORTS[parts.scheme] if port is None else port
    is_private = any(known.covers(host, port) for known in policy.private)
    if not is_private and not any(known.covers(host, port) for known in policy.public):
        raise _refused(url, "its host is not on this server's list of allowed image hosts")
    return _Target(parts, host, port, is_private)


async def _resolve(target: _Target) -> Address:
    """The first of the host's addresses; all of them have to be allowed."""
    known = await asyncio.get_running_loop().getaddrinfo(target.host, target.port, proto=6)
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in known]
    if not addresses or not all(is_allowed(address, target.may_be_private) for address in addresses):
        raise _refused(target.url.geturl(), "its host has an address that is not public")
    return addresses[0]


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


async def _get(target: _Target, address: Address, limits: Limits) -> bytes | str:
    """The content, or at which other address it is. The host's name serves the header, TLS and the certificate."""
    path = (target.url.path or "/") + (f"?{target.url.query}" if target.url.query else "")
    url = httpcore.URL(scheme=target.url.scheme, host=str(address), port=target.port, target=path)
    headers = [("Host", target.url.netloc), *HEADERS.items()]
    certificates = ssl.create_default_context() if target.url.scheme == "https" else None  # slow to load
    content = bytearray()
    async with (
        httpcore.AsyncConnectionPool(ssl_context=certificates) as pool,
        pool.stream("GET", url, headers=headers, extensions={"sni_hostname": target.host}) as response,
    ):
        given = {name.decode("ascii").lower(): value.decode("latin-1") for name, value in response.headers}
        if response.status in REDIRECTS and "location" in given:
            return given["location"]
        if response.status != OK:
            raise _refused(target.url.geturl(), f"its server answers {response.status}")
        if given.get("content-encoding", "identity") != "identity":
            raise _refused(target.url.geturl(), "its server sends it compressed")
        async for chunk in response.aiter_stream():
            content += chunk
            if len(content) > limits.image_bytes:
                raise too_large(limits)
    return bytes(content)
