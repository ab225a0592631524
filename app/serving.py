"""Serves the page: theme, server settings, addresses, and the tools for other programs.

Knows Gradio's server. Does not know what is on the page.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import gradio as gr
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import mended
from app.plotlyjs import plotly_js
from rim_probe.errors import RiMError
from rim_probe.plots.frame import stylesheet

HERE = Path(__file__).parent
KEPT_SESSIONS = 500  # visitors whose state is kept; the one unused for longest goes first
LARGEST_UPLOAD = "16mb"  # an exported run is a tenth of that
LARGEST_BODY = 1_000_000  # bytes of any other request
MAX_WAITING = 200  # events of all visitors together
THREADS = 80  # more than there can be events that wait for a model in a thread (`app.panels.race`)


class BoundedBody:
    """Refuses a body that no event of the page has; uploads have a limit of their own."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LARGEST_BODY:
                raise HTTPException(413, "This request is too large.")
            return message

        is_upload = scope["type"] != "http" or scope["path"].endswith("/upload")
        await self.app(scope, receive if is_upload else bounded, send)


def theme() -> gr.themes.Base:
    """Calm paper and ink, system fonts only (a Google font would be a call to another server)."""
    sans = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif"]
    mono = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "Liberation Mono", "monospace"]
    return gr.themes.Base(primary_hue="indigo", neutral_hue="stone", font=sans, font_mono=mono, radius_size="md").set(
        body_background_fill="#faf9f6",
        body_background_fill_dark="#15151a",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        block_padding="0px",
        input_background_fill="#ffffff",
        input_background_fill_dark="#1e1e25",
        input_border_color="#8a857c",
        input_border_color_dark="#77767f",
        body_text_color_subdued="#57534e",
        body_text_color_subdued_dark="#b3afa8",
        block_label_text_color="#57534e",
        block_label_text_color_dark="#c9c6c0",
        button_primary_background_fill="#4338ca",
        button_primary_background_fill_hover="#3730a3",
        button_primary_background_fill_dark="#a5b4fc",
        button_primary_background_fill_hover_dark="#c7d2fe",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#15151a",
    )


def serve(
    demo: gr.Blocks,
    host: str | None = None,
    port: int | None = None,
    root_path: str | None = None,
    mcp: bool | None = None,
) -> str:
    """Starts the server in the background and returns the page's address.

    What is None is taken from Gradio's variables: GRADIO_SERVER_NAME, GRADIO_SERVER_PORT, GRADIO_ROOT_PATH,
    GRADIO_MCP_SERVER.

    Args:
        root_path: where a proxy serves the page, such as "/rim" or "https://example.org/rim".
        mcp: whether the endpoints are also tools for language models (Model Context Protocol).

    Raises:
        OSError: the port is taken, or the address is not this machine's.
        RiMError: tools were asked for, but the package for them is not there or does not fit.
    """
    if root_path is None:
        root_path = os.environ.get("GRADIO_ROOT_PATH")
    if mcp is None:
        mcp = os.environ.get("GRADIO_MCP_SERVER", "").lower() == "true"
    if mcp and importlib.util.find_spec("mcp") is None:
        raise RiMError("Tools for language models need another package; `pip install 'gradio[mcp]==6.31.0'` adds it.")
    mended.mend()
    # Gradio keeps statistics that nobody here reads, and computes them anew after every single event: 25 ms each time,
    # as long as a panel takes.
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1")
    os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000000000")
    _, url, _ = demo.queue(max_size=MAX_WAITING).launch(
        server_name=host,
        server_port=port,
        root_path=root_path,
        mcp_server=mcp,
        theme=theme(),
        css_paths=HERE / "page.css",
        # Not among the css_paths, for those Gradio rewrites.
        head=f"<style>{stylesheet()}</style><script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
        app_kwargs={"routes": [Route("/plotly.js", plotly_js)], "middleware": [Middleware(BoundedBody)]},
        max_threads=THREADS,
        max_file_size=LARGEST_UPLOAD,
        state_session_capacity=KEPT_SESSIONS,
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        footer_links=["api"],
        prevent_thread_lock=True,
        quiet=True,
    )
    if mcp and not demo.mcp_server:
        demo.close()
        raise RiMError(f"The tools for language models could not be served ({demo.mcp_error}).")
    return url
