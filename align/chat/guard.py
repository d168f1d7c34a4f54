"""Requests to the chat page in; those that the page itself makes go on, everything else is refused.

Gradio offers more than this page uses: files by their path, a proxy, addresses fetched for the visitor, its own editor.
None of that is let through. Every answer forbids the browser to load anything from elsewhere, whatever a model or a
card writes. A site that points a name of its own at this machine (DNS rebinding)
is refused by the name it gives in `Host`.
"""

from __future__ import annotations

import ipaddress
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from align.log import log

# What a browser asks for while it shows the page, one file each, and folders of Gradio's own files.
PATHS = {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"}
API_PATHS = {"startup-events", "queue/join", "queue/data", "upload", "upload_progress", "cancel", "reset", "theme.css"}
FOLDERS = ("/assets/", "/static/", "/gradio_api/heartbeat/")
API, FILE = "/gradio_api/", "/gradio_api/file="
POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


def is_allowed(path: str, uploads: Path) -> bool:
    """Whether the page may ask for a path; of files, only for those that lie in `uploads`.

    >>> [is_allowed(path, Path("/tmp/up")) for path in ("/assets/a.js", "/gradio_api/file=/tmp/up/ab/cat.png")]
    [True, True]
    >>> [is_allowed("/gradio_api/file=" + name, Path("/tmp/up")) for name in ("/etc/passwd", "/tmp/up/../x", "http://a/b")]
    [False, False, False]
    """
    if path.startswith(FILE):
        name = path.removeprefix(FILE)
        try:
            return name.startswith("/") and Path(name).resolve().is_relative_to(uploads.resolve())
        except (OSError, ValueError, RuntimeError):
            return False
    if ".." in path.split("/"):
        return False
    return path in PATHS or path.startswith(FOLDERS) or path.removeprefix(API).rstrip("/") in API_PATHS


def is_own_host(host: str, names: Collection[str]) -> bool:
    """Whether a `Host` header names this server: an IP address, localhost, or one of `names`.

    A page on another site reaches this machine by a name that its owner points here, never by an address.

    >>> [is_own_host(host, ["gpu7"]) for host in ("127.0.0.1:7860", "[::1]:7860", "localhost", "GPU7:80", "10.0.0.5")]
    [True, True, True, True, True]
    >>> [is_own_host(host, ["gpu7"]) for host in ("evil.org:7860", "127.0.0.1.evil.org", "", "[::1", "gpu7.evil")]
    [False, False, False, False, False]
    """
    name = host.strip().lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0] if "]" in name else ""
    else:
        name = name.rpartition(":")[0] if name.count(":") == 1 else name
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost" or name in {known.lower() for known in names}
    return True


class Guard:
    """ASGI middleware: `is_own_host` and `is_allowed` in front of an application, `HEADERS` on all it says.

    `names`: of this server, beside its addresses. A request that the application cannot take is answered with 400.
    """

    def __init__(self, app: Any, uploads: Path, names: Collection[str] = ()) -> None:
        self.app = app
        self.uploads = uploads
        self.names = names

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answers one request, as ASGI asks."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        has_begun = False

        async def send_with_headers(message: dict[str, Any]) -> None:
            nonlocal has_begun
            has_begun = True
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        hosts = [value.decode("latin-1") for key, value in scope["headers"] if key == b"host"]
        if len(hosts) != 1 or not is_own_host(hosts[0], self.names):
            await _refuse(send_with_headers, 403, b"this page is not served under that name")
        elif not is_allowed(unquote(scope["path"]), self.uploads):
            await _refuse(send_with_headers, 403, b"not offered here")
        else:
            try:
                await self.app(scope, receive, send_with_headers)
            except Exception as error:  # whatever Gradio makes of a request that its page would not send
                log.debug("a request for %r cannot be read: %s", scope["path"], in_one_line(error))
                if not has_begun:
                    await _refuse(send_with_headers, 400, b"the request cannot be read")


def in_one_line(error: BaseException) -> str:
    """What was raised, and where.

    >>> try:
    ...     int("x")
    ... except ValueError as error:
    ...     in_one_line(error).startswith("ValueError: invalid literal for int() with base 10: 'x' (")
    True
    """
    last = traceback.extract_tb(error.__traceback__)[-1]
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line[:300]} ({Path(last.filename).name}:{last.lineno})"


async def _refuse(send: Any, status: int, reason: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": reason})
