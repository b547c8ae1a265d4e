"""Images at http(s) URLs, fetched without giving access to the network of the machine that fetches them.

A host must be on the list of `image_hosts`. Its name is resolved once, all its addresses are checked, and the
connection goes to a checked address, never to the name again. Redirects follow the same rules. Proxies are not used.
"""

import asyncio
import ipaddress
import ssl
from urllib.parse import urljoin

import httpcore

from fusion_hf.common.image_hosts import Address, HostPolicy, ImageRefused, Target, check_url, is_allowed

MAX_REDIRECTS = 3
SECONDS = 15.0  # for an image, redirects included
OK, REDIRECTS = 200, (301, 302, 303, 307, 308)
HEADERS = {"User-Agent": "fusion-hf", "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}


class ImageTooLarge(ImageRefused):
    """The content at a URL has more bytes than allowed."""


async def fetch(url: str, policy: HostPolicy, max_bytes: int) -> bytes:
    """
    Fetch the content at an http(s) URL.

    Args:
        url: URL of the image.
        policy: Hosts from which images may be fetched.
        max_bytes: Maximum size of the content in bytes.

    Returns:
        The content.

    Raises:
        ImageRefused: If the URL is not allowed, or if it gives no content within the limits.
    """
    try:
        return await asyncio.wait_for(_follow(url, policy, max_bytes), SECONDS)
    except asyncio.TimeoutError as error:
        raise ImageRefused(url, f"it took longer than {SECONDS:g} s") from error
    except (OSError, httpcore.NetworkError, httpcore.ProtocolError) as error:
        # clients need no details about a network; httpcore raises its own errors in the context of others
        raise ImageRefused(url, f"it cannot be fetched ({type(error.__context__ or error).__name__})") from error


async def _follow(url: str, policy: HostPolicy, max_bytes: int) -> bytes:
    for _ in range(MAX_REDIRECTS + 1):
        target = check_url(url, policy)
        reply = await _get(target, await _resolve(target), max_bytes)
        if isinstance(reply, bytes):
            return reply
        url = urljoin(url, reply)
    raise ImageRefused(url, f"it is redirected more than {MAX_REDIRECTS} times")


async def _resolve(target: Target) -> Address:
    """Return the first address of the host. All of its addresses must be allowed."""
    known = await asyncio.get_running_loop().getaddrinfo(target.host, target.port, proto=6)
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in known]
    if not addresses or not all(is_allowed(address, target.may_be_private) for address in addresses):
        raise ImageRefused(target.url.geturl(), "its host has an address that is not public")
    return addresses[0]


async def _get(target: Target, address: Address, max_bytes: int) -> bytes | str:
    """Return the content or the URL of a redirect. The host's name is used for the header, TLS and certificate."""
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
            raise ImageRefused(target.url.geturl(), f"its server answers {response.status}")
        if given.get("content-encoding", "identity") != "identity":
            raise ImageRefused(target.url.geturl(), "its server sends compressed content")
        async for chunk in response.aiter_stream():
            content += chunk
            if len(content) > max_bytes:
                raise ImageTooLarge(url=target.url.geturl(), reason=f"it has more than {max_bytes} bytes")
    return bytes(content)
