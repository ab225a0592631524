"""What a link to the page shows where it is pasted: title, description and picture (Open Graph and Twitter tags).

Knows HTML heads and addresses. Does not know what is on the page.

Gradio's own tags say "Gradio", with a picture on another server, and what `launch(head=...)` adds is written by the
page's script, which those who look links up do not run. So the tags are exchanged in the HTML that is sent.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from gradio.route_utils import get_root_url
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TITLE = "RiM Probe"
DESCRIPTION = (
    "A language model that reasons in silent memory blocks, beside one that writes its chain of thought out. "
    "Ask both, then look inside the blocks."
)
PICTURE = Path(__file__).parent / "preview.png"
PICTURE_SIZE = (1200, 630)
LONGEST_QUESTION = 140  # characters


async def picture(_: Request) -> FileResponse:
    return FileResponse(PICTURE, headers={"Cache-Control": "public, max-age=86400"})


class LinkPreview:
    """Middleware that exchanges the tags of the page `/`.

    Args:
        root_path: the address at which a proxy serves the page, if that is not the root of its host.
    """

    def __init__(self, app: ASGIApp, root_path: str | None = None):
        self.app = app
        self.root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/":
            await self.app(scope, receive, send)
            return
        start: Message = {}
        page = b""

        async def rewrite(message: Message) -> None:
            nonlocal start, page
            if message["type"] == "http.response.start":
                start = message
                return
            page += message.get("body", b"")
            if message.get("more_body"):
                return
            if scope["method"] == "GET" and MutableHeaders(scope=start).get("content-type", "").startswith("text/html"):
                page = with_tags(page.decode(), Request(scope), self.root_path).encode()
                MutableHeaders(scope=start)["content-length"] = str(len(page))
            await send(start)
            await send({"type": "http.response.body", "body": page})

        await self.app(scope, receive, rewrite)


def with_tags(page: str, request: Request, root_path: str | None = None) -> str:
    """The HTML of the page with our tags instead of Gradio's; a permalink shows the question it asks."""
    root = get_root_url(request, "/", root_path or request.scope.get("root_path"))
    question = " ".join(request.query_params.get("q", "").split())
    if len(question) > LONGEST_QUESTION:
        question = question[: LONGEST_QUESTION - 1] + "…"
    title = f"{TITLE}: “{question}”" if question else TITLE
    url = f"{root}/?{request.url.query}" if question else f"{root}/"
    width, height = PICTURE_SIZE
    tags = {
        "description": DESCRIPTION,
        "og:type": "website",
        "og:site_name": TITLE,
        "og:title": title,
        "og:description": DESCRIPTION,
        "og:url": url,
        "og:image": f"{root}/preview.png",
        "og:image:width": str(width),
        "og:image:height": str(height),
        "og:image:alt": "A question answered by memory and by chain of thought, side by side",
        "twitter:card": "summary_large_image",
        "twitter:title": title,
        "twitter:description": DESCRIPTION,
        "twitter:image": f"{root}/preview.png",
    }
    ours = "".join(
        f'<meta {"property" if name.startswith("og:") else "name"}="{name}" content="{escape(value, quote=True)}" />'
        for name, value in tags.items()
    )
    page = re.sub(r"<meta\s+(?:property|name)=\"(?:og|twitter):[^>]*>\s*", "", page)
    return page.replace("</head>", f"{ours}</head>", 1)
