"""Images and clips that requests bring: inside a data URL, or, where it is allowed, from the web.

To fetch an address that a stranger names is to let him ask things with this machine's standing. So
by default nothing is fetched. Where it is allowed, a name is resolved once, every address it has
must be a public one, and the connection goes to one of those addresses, not to the name again; the
same holds for each redirect. Proxies of the environment are not used, since they would resolve the
name anew.
"""

import asyncio
import base64
import binascii
import ipaddress
import re
import socket
import ssl
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

import httpx2

from phikit.serve.errors import RefusedError

MAX_REDIRECTS = 3
FETCH_S = 20.0
PORTS = {"http": 80, "https": 443}
_DATA = re.compile(r"data:([a-z]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.IGNORECASE)
_TUNNELS = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16")))
"""Addresses of IPv6 that lead to one of IPv4."""


class Fetcher(NamedTuple):
    """Reads URLs.

    Attributes:
        allows_remote: whether http and https URLs are fetched at all.
        max_bytes: of what is fetched.
    """

    allows_remote: bool = False
    max_bytes: int = 32 << 20

    async def read(self, url: str, *, param: str) -> bytes:
        """What a URL holds.

        Args:
            param: the field of the request that the URL is in, for errors.

        Raises:
            RefusedError: it is neither a data URL in base64 nor one that may be fetched, or cannot
                be read.
        """
        if url[:5].lower() == "data:":
            return decode_data_url(url, param=param)
        scheme = url.partition(":")[0].lower()
        if scheme not in PORTS:
            raise RefusedError(
                f"{param} is no data URL", param=param, fix="send data:...;base64,..."
            )
        if not self.allows_remote:
            raise RefusedError(
                f"{param}: this server fetches nothing from the web",
                param=param,
                fix="send the file itself, as a data URL",
            )
        try:
            async with asyncio.timeout(FETCH_S):
                return await _fetch(url, self.max_bytes, param)
        except TimeoutError:
            raise RefusedError(
                f"{param} was not fetched within {FETCH_S:g} s", param=param
            ) from None


def decode_data_url(url: str, *, param: str) -> bytes:
    """The bytes in a `data:...;base64,...` URL. Raises RefusedError if it is no such URL."""
    found = _DATA.match(url)
    if found is None:
        raise RefusedError(f"{param} is no data URL in base64", param=param)
    return decode_base64(url[found.end() :], param=param)


def decode_base64(text: str, *, param: str) -> bytes:
    """Bytes in base64. Raises RefusedError if it is none, or empty."""
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RefusedError(f"{param} is not base64: {error}", param=param) from error
    if not content:
        raise RefusedError(f"{param} is empty", param=param)
    return content


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip.teredo is not None or any(ip in tunnel for tunnel in _TUNNELS):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


async def _fetch(url: str, max_bytes: int, param: str) -> bytes:
    async with httpx2.AsyncClient(trust_env=False, follow_redirects=False) as client:
        for _ in range(MAX_REDIRECTS + 1):
            host, pinned = await _pin(url, param)
            request = client.build_request(
                "GET",
                pinned,
                # Packed content could unpack to anything.
                headers={"Host": host, "Accept-Encoding": "identity"},
                extensions={"sni_hostname": host},
            )
            try:
                response = await client.send(request, stream=True)
                try:
                    if not response.is_redirect:
                        return await _body(response, max_bytes, param)
                    url = urljoin(url, response.headers["location"])
                finally:
                    await response.aclose()
            except (httpx2.HTTPError, ssl.SSLError, OSError) as error:
                raise RefusedError(f"{param} cannot be fetched: {error}", param=param) from error
    raise RefusedError(f"{param} is redirected more than {MAX_REDIRECTS} times", param=param)


async def _pin(url: str, param: str) -> tuple[str, str]:
    """The host's name, and the URL with a public address of it in its place."""
    try:
        parts = urlsplit(url)
        host, port, scheme = parts.hostname, parts.port, parts.scheme.lower()
    except ValueError as error:
        raise RefusedError(f"{param} is no URL: {error}", param=param) from error
    if scheme not in PORTS or not host or port not in (None, PORTS[scheme]) or parts.username:
        raise RefusedError(
            f"{param}: only http and https URLs with their own ports, and no user, are fetched",
            param=param,
        )
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, PORTS[scheme], type=socket.SOCK_STREAM
        )
    except (OSError, UnicodeError) as error:
        raise RefusedError(f"{param}: {host!r} has no address", param=param) from error
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise RefusedError(f"{param}: {host!r} is not on the public internet", param=param)
    address = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
    return host, parts._replace(netloc=address, fragment="").geturl()


async def _body(response: httpx2.Response, max_bytes: int, param: str) -> bytes:
    if response.status_code != 200:
        raise RefusedError(f"{param} answers with {response.status_code}", param=param)
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > max_bytes:
            raise RefusedError(f"{param} is larger than {max_bytes} bytes", param=param)
    return bytes(body)
