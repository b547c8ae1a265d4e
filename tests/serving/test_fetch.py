"""Where images are fetched from, and where not."""

import asyncio
import ipaddress
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.http_server import HERE, serve_connections
from tests.helpers.serving import IMAGE_FILE, ImageHost

from fusion_hf.common import image_fetching
from fusion_hf.common.errors import InputError
from fusion_hf.common.image_hosts import Host, HostPolicy, is_allowed
from fusion_hf.serving.api_errors import ApiError
from fusion_hf.serving.image_fetching import fetch_image
from fusion_hf.serving.limits import Limits

TLS = Path(__file__).parents[1] / "fixtures" / "tls"


def get(url: str, public: tuple[str, ...] = (), private: tuple[str, ...] = ()) -> bytes:
    return asyncio.run(fetch_image(url, HostPolicy.parse(public, private), Limits()))


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address: str):
    assert is_allowed(ipaddress.ip_address(address))


PRIVATE = (
    "127.0.0.1",
    "127.255.255.254",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "::1",
    "fd00::1",
    "::ffff:10.0.0.1",
)
NEVER = (
    "0.0.0.0",
    "169.254.169.254",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "fe80::1",
    "fec0::1",
    "ff02::1",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",  # the same through NAT64
    "2002:a9fe:a9fe::1",  # and through 6to4
)


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address: str):
    assert not is_allowed(ipaddress.ip_address(address))
    assert is_allowed(ipaddress.ip_address(address), may_be_private=True)


@pytest.mark.parametrize("address", NEVER)
def test_addresses_that_no_flag_allows(address: str):
    assert not is_allowed(ipaddress.ip_address(address))
    assert not is_allowed(ipaddress.ip_address(address), may_be_private=True)


@pytest.mark.parametrize("address", ["100.64.0.1", "192.0.2.1", "64:ff9b::a00:1", "2002:7f00:1::"])
def test_other_addresses_that_are_not_public(address: str):
    assert not is_allowed(ipaddress.ip_address(address))


@pytest.mark.parametrize("text", ["", "http://a", "a/b", "a b", "a@b", "a:b", "a:99999", "a?b", "*", "[::1"])
def test_wrong_hosts(text: str):
    with pytest.raises(InputError, match="image host"):
        Host.parse(text)


def test_hosts():
    assert Host.parse("Example.COM") == Host("example.com", None)
    assert Host.parse("[::1]:8080") == Host("::1", 8080)
    assert Host("a", None).covers("a", 443) and not Host("a", None).covers("a", 8080)
    assert Host("a", 8080).covers("a", 8080) and not Host("a", 8080).covers("a", 80)
    assert not Host("a.b", None).covers("x.a.b", 80)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Addresses by name, for a resolver; each question takes one off the list, and the name's last stays."""
    table: dict[str, list[str]] = {}

    async def resolve(self: Any, host: str, port: int, **kwargs: Any) -> list[Any]:
        answers = table[host]
        addresses = (answers.pop(0) if len(answers) > 1 else answers[0]).split()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
    return table


def test_names_with_one_private_address(names: dict[str, list[str]], image_host: ImageHost):
    names["mixed.test"] = ["8.8.8.8 127.0.0.1"]
    with pytest.raises(ApiError, match="not public"):
        get("http://mixed.test/red.png", ("mixed.test",))
    names["late.test"] = ["127.0.0.1"]
    asked = len(image_host.requested)
    with pytest.raises(ApiError, match="not public"):
        get(f"http://late.test:{image_host.port}/red.png", (f"late.test:{image_host.port}",))
    assert len(image_host.requested) == asked


def test_a_name_is_resolved_once(names: dict[str, list[str]], image_host: ImageHost):
    """The address that was checked is the one that is used, whatever the name means a moment later."""
    host = f"rebound.test:{image_host.port}"
    names["rebound.test"] = [HERE, "192.0.2.1"]
    assert get(f"http://{host}/red.png", private=(host,)) == IMAGE_FILE.read_bytes()
    assert names["rebound.test"] == ["192.0.2.1"]


def test_environment_proxies_are_not_used(image_host: ImageHost, monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert get(f"{image_host.url}/red.png", private=(f"{HERE}:{image_host.port}",)) == IMAGE_FILE.read_bytes()


def test_silent_hosts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(image_fetching, "SECONDS", 0.3)
    with socket.create_server((HERE, 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ApiError, match="longer than"):
            get(f"http://{HERE}:{port}/", private=(f"{HERE}:{port}",))
    with pytest.raises(ApiError, match="cannot be fetched"):
        get(f"http://{HERE}:{port}/", private=(f"{HERE}:{port}",))


def test_hosts_that_speak_no_http():
    def answer(connection: socket.socket, stop: threading.Event) -> None:
        connection.recv(2**16)
        connection.sendall(b"SSH-2.0-OpenSSH\r\n" * 10)

    with (
        serve_connections(answer) as port,
        pytest.raises(ApiError, match=r"cannot be fetched \(RemoteProtocolError\)"),
    ):
        get(f"http://{HERE}:{port}/", private=(f"{HERE}:{port}",))


def test_https(monkeypatch: pytest.MonkeyPatch):
    """The certificate has to be known, and to be that of the name in the address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")
    with ImageHost(context) as host:
        hosts = (f"localhost:{host.port}", f"{HERE}:{host.port}")
        url = f"https://localhost:{host.port}/red.png"
        with pytest.raises(ApiError, match="SSLCertVerificationError"):
            get(url, private=hosts)
        monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "cert.pem"))
        assert get(url, private=hosts) == IMAGE_FILE.read_bytes()
        with pytest.raises(ApiError, match="SSLCertVerificationError"):
            get(f"https://{HERE}:{host.port}/red.png", private=hosts)
        assert host.requested == ["/red.png"]
