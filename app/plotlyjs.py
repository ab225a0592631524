"""Serves plotly.js from the installed package, gzipped, when the first chart of a visitor asks for it."""

from __future__ import annotations

import functools
import gzip

from starlette.requests import Request
from starlette.responses import Response


async def plotly_js(request: Request) -> Response:
    """The script; a browser keeps it for a day."""
    headers = {"Content-Encoding": "gzip", "Cache-Control": "public, max-age=86400"}
    return Response(_packed(), media_type="text/javascript", headers=headers)


@functools.cache
def _packed() -> bytes:
    from plotly.offline import get_plotlyjs

    return gzip.compress(get_plotlyjs().encode(), 6, mtime=0)
