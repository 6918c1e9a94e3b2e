"""Serve the explorer's page: from this machine, behind the gate, and if wanted by a public address."""

import errno
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from urllib.parse import urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio.networking import setup_tunnel

from dcdit.errors import UserError
from dcdit.explorer import view
from dcdit.explorer.gate import Gate

_SESSIONS = 32
"""Browsers whose images are remembered."""


@contextmanager
def serving(page: gr.Blocks, host: str, port: int | None, share: bool, names: Sequence[str] = ()) -> Iterator[str]:
    """Answer browsers within the block; yields the page's address.

    Gradio's own ``launch`` would answer everything that Gradio can, see :class:`dcdit.explorer.gate.Gate`.

    Args:
        page: the page.
        host, port: where to listen; without a port, at the first free one from 7860.
        names: more names that the page is served at, such as that of a proxy.
        share: whether to open a public address of Gradio's as well, and yield that.

    Raises:
        UserError: if nothing can listen there, or there is no public address.
    """
    page.state_session_capacity = _SESSIONS
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        "/",
        theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
        css=view.CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size="1b",
    )
    gate = Gate(app, host, page.fns)
    gate.hosts.update(name.lower() for name in names)
    listening = _listen(host, port)
    server = uvicorn.Server(
        uvicorn.Config(
            gate,
            http="h11",  # the one that limits headers
            ws="none",
            log_config=None,
            log_level="critical",
            access_log=False,
            limit_concurrency=8 * _SESSIONS,
            timeout_graceful_shutdown=1,
        )
    )
    thread = Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.01)
    try:
        number = listening.getsockname()[1]
        if share:
            yield _public_address(page, host, number, gate)
        else:
            name = "localhost" if gate.any_address else host
            yield f"http://{f'[{name}]' if ':' in name else name}:{number}"
    finally:
        server.should_exit = True
        thread.join(timeout=5)


def _listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens at the port, or at the first free one."""
    ports = range(7860, 7960) if port is None else [port]
    for number in ports:
        try:
            return socket.create_server((host, number), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"host={host} port={number}: nothing can listen there, {error.strerror}") from None
    raise UserError(
        f"port={port or '7860 to 7959'}: it is taken, choose another" + " or leave the key out" * bool(port)
    )


def _public_address(page: gr.Blocks, host: str, port: int, gate: Gate) -> str:
    """Open an address of Gradio's that leads here, and let the gate answer to it."""
    try:
        address = setup_tunnel(host, port, page.share_token, None, None)
    except Exception as error:
        raise UserError(f"share=true: Gradio has no public address for it ({error}), leave the key out") from error
    public = urlsplit(address)
    gate.hosts.add(str(public.hostname))
    return f"https://{public.netloc}"
