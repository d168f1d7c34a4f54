"""Image URLs in, their bytes out: only where a person allowed it, within limits, each address once.

Redirects are followed and checked again. An address of a private, local or reserved network is refused, and the
connection goes to the very address that was checked, so that a name cannot lead elsewhere in between.
Proxies are not used.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urljoin, urlsplit

from align.data.entry import BadRow

MAX_BYTES = 20_000_000
TIMEOUT_S = 20.0
MAX_REDIRECTS = 5
CHUNK_BYTES = 1 << 16
NOT_FETCHED = "image cannot be fetched"


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open Internet.

    >>> [is_public(address) for address in ("8.8.8.8", "127.0.0.1", "10.0.0.1", "169.254.169.254", "::ffff:10.0.0.1")]
    [True, False, False, False, False]
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_global and not (mapped or found).is_multicast


@dataclass(frozen=True)
class UrlCache:
    """Fetches images into `folder`, where they are found the next time.

    max_bytes: of one image. timeout_s: seconds for one image from the first connection to the last byte. is_allowed:
    says of an IP address whether it may be connected to.
    """

    folder: Path
    max_bytes: int = MAX_BYTES
    timeout_s: float = TIMEOUT_S
    is_allowed: Callable[[str], bool] = is_public

    def fetch(self, url: str) -> bytes:
        """The bytes behind an http or https URL, from the cache where they are there; BadRow with the reason else."""
        cached = self.folder / hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
        if cached.is_file():
            return cached.read_bytes()
        try:
            data = self._download(url, time.monotonic() + self.timeout_s)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise BadRow(NOT_FETCHED, f"{url[:200]}: {error or type(error).__name__}") from None
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_suffix(".tmp")
        temporary.write_bytes(data)
        temporary.replace(cached)
        return data

    def _download(self, url: str, deadline: float) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            connection = self._connect(urlsplit(url), deadline)
            try:
                parts = urlsplit(url)
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", target, headers={"User-Agent": "align-data", "Accept": "image/*"})
                response = connection.getresponse()
                if response.status in (301, 302, 303, 307, 308):
                    url = urljoin(url, response.getheader("Location") or "")
                    continue
                if response.status != 200:
                    raise ValueError(f"the server says {response.status} {response.reason}")
                return self._read(response, connection, deadline)
            finally:
                connection.close()
        raise ValueError(f"more than {MAX_REDIRECTS} redirects")

    def _connect(self, parts: SplitResult, deadline: float) -> http.client.HTTPConnection:
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("not an http or https URL")
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        addresses = [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        refused = [address for address in addresses if not self.is_allowed(address)]
        if refused or not addresses:
            raise ValueError(f"{host} is {refused[0]}, which is not on the open Internet" if refused else "no address")
        connection = http.client.HTTPConnection(host, port, timeout=_left(deadline))
        sock = socket.create_connection((addresses[0], port), timeout=_left(deadline))
        if parts.scheme == "https":
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        connection.sock = sock
        return connection

    def _read(
        self, response: http.client.HTTPResponse, connection: http.client.HTTPConnection, deadline: float
    ) -> bytes:
        data = bytearray()
        while chunk := response.read1(CHUNK_BYTES):
            data += chunk
            if len(data) > self.max_bytes:
                raise ValueError(f"more than {self.max_bytes} bytes")
            remaining = _left(deadline)
            if connection.sock is not None:
                connection.sock.settimeout(remaining)
        length = response.getheader("Content-Length")
        if length is not None and length.isdigit() and len(data) < int(length):
            raise ValueError(f"{len(data)} of {length} bytes came")
        return bytes(data)


def _left(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError("too slow")
    return remaining
