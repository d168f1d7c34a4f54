"""Requests to the chat page in; those that the page itself makes go on, everything else is refused.

Gradio offers more than this page uses: files by their path, a proxy, addresses fetched for the visitor, its own editor. None
of that is let through. Every answer forbids the browser to load anything from elsewhere, whatever a model or a card writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote

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
        return name.startswith("/") and Path(name).resolve().is_relative_to(uploads.resolve())
    if ".." in path.split("/"):
        return False
    return path in PATHS or path.startswith(FOLDERS) or path.removeprefix(API).rstrip("/") in API_PATHS


class Guard:
    """ASGI middleware: `is_allowed` in front of an application, `HEADERS` on all it says."""

    def __init__(self, app: Any, uploads: Path) -> None:
        self.app = app
        self.uploads = uploads

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        if is_allowed(unquote(scope["path"]), self.uploads):
            await self.app(scope, receive, send_with_headers)
        else:
            start = {"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]}
            await send_with_headers(start)
            await send({"type": "http.response.body", "body": b"not offered here"})
