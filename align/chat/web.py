"""Checkpoints in, a page out on which people talk to them, served until Ctrl-C.

It listens on its own machine by default, asks nothing of the network, and lets a browser fetch nothing but
its own parts and what was shown to it (`align.chat.guard`). Conversations live in memory;
they and what was uploaded end with it.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import typer

from align.chat.answers import Chat
from align.chat.guard import Guard, in_one_line
from align.engines.base import SamplingSettings
from align.errors import UserError
from align.log import log
from align.versions import install_extra

MAX_FILE_SIZE = "200mb"
# Of the system: the page fetches no font.
FONTS = ["system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
MONO_FONTS = ["ui-monospace", "Menlo", "Consolas", "monospace"]


@dataclass(frozen=True)
class Address:
    """Where the page is; `share` also opens a tunnel to it through gradio.live."""

    host: str
    port: int
    share: bool = False


def chat_on_page(
    checkpoints: Sequence[str], settings: SamplingSettings, address: Address, *, api_key_env: str | None = None
) -> None:
    """Serve the page until Ctrl-C. `settings` are what its controls begin with.

    Raises:
        UserError: Gradio is not installed, a checkpoint cannot be opened, or the address is taken.
    """

    def build() -> Any:
        from align.chat.page import Page

        chats = [Chat(checkpoint, api_key_env=api_key_env) for checkpoint in checkpoints]
        return Page(chats, settings).build()

    serve_page(build, address, css=Path(__file__).with_name("page.css"), name="chat", offers="talk to the model")


def serve_page(
    build: Callable[[], Any], address: Address, *, css: Path, name: str, offers: str, head: str = ""
) -> None:
    """Serve the Gradio page that `build` makes until Ctrl-C.

    `name`: of its temporary folder. `offers`: what whoever reaches the address can do. `head`: HTML of its own.

    Raises:
        UserError: Gradio is not installed, or the address is taken.
    """
    _require_gradio()
    _require_free(address)
    with tempfile.TemporaryDirectory(prefix=f"align-{name}-") as uploads:
        # Read when Gradio is imported; without the first it reports its use to its makers.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads}
        blocks = build()
        try:
            _launch(blocks, address, Path(uploads), css=css, offers=offers, head=head)
            threading.Event().wait()
        except KeyboardInterrupt:
            typer.echo("\nstopped")
        finally:
            blocks.close(verbose=False)


def _launch(blocks: Any, address: Address, uploads: Path, *, css: Path, offers: str, head: str) -> None:
    import gradio
    import gradio.queueing
    from starlette.middleware import Middleware

    # Gradio prints a traceback for every event that fails, those of malformed requests too; no setting changes that.
    gradio.queueing.traceback = OneLine
    # Where a tunnel is opened, its name is known only after the launch.
    names = {address.host, socket.gethostname()}
    blocks.launch(
        server_name=address.host,
        server_port=address.port,
        share=address.share,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=MAX_FILE_SIZE,
        app_kwargs={"middleware": [Middleware(Guard, uploads=uploads, names=names)]},
        theme=gradio.themes.Default(font=FONTS, font_mono=MONO_FONTS),
        css_paths=css,
        head=head,
    )
    if blocks.share_url:
        names.add(str(urlsplit(blocks.share_url).hostname))
    typer.echo(f"the page: {blocks.share_url or blocks.local_url}   (Ctrl-C ends it)")
    if address.share or address.host not in ("127.0.0.1", "localhost", "::1"):
        log.warning("whoever reaches this address can %s; there is no password", offers)


class OneLine:
    """Stands where Gradio looks for `traceback`: what an event raised is one line of the log."""

    @staticmethod
    def print_exc() -> None:
        """Logs the exception that is being handled; its traceback goes to the debug level."""
        error = sys.exc_info()[1]
        assert error is not None
        log.warning("a request to the page failed: %s", in_one_line(error))
        log.debug("where it failed", exc_info=True)


def _require_gradio() -> None:
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio, which is not installed", fix=install_extra("web"))


def _require_free(address: Address) -> None:
    try:
        with socket.create_server((address.host, address.port)):
            pass
    except OSError as error:
        raise UserError(
            f"the page cannot listen on {address.host}:{address.port} ({error.strerror or error})",
            fix="name another with --port (or --host)",
        ) from None
