"""Starts the page: `python app.py`. Parses the flags and hands over to `app/`."""

import argparse
import os
import sys


def main() -> int:
    parser = argparse.ArgumentParser(
        description="RiM Probe: ask a word problem, watch memory race chain of thought, look inside the blocks.",
        epilog="Where a flag is not given, Gradio's own variables count: GRADIO_SERVER_NAME, GRADIO_SERVER_PORT, "
        "GRADIO_ROOT_PATH, GRADIO_MCP_SERVER=true.",
    )
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1; 0.0.0.0 for every network)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    parser.add_argument("--root-path", metavar="PATH", help="where a proxy serves the page, such as /rim (default: /)")
    parser.add_argument("--mcp", action="store_true", help="offer the endpoints as tools for language models (MCP)")
    parser.add_argument(
        "--model", help="checkpoint folder or Hugging Face Hub id to start with (default: checkpoints/)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: the GPU where there is one; falls back to the CPU)")
    flags = parser.parse_args()
    port = os.environ.get("GRADIO_SERVER_PORT", "0")
    if not port.isdecimal():
        parser.error(f"GRADIO_SERVER_PORT must be a number, not {port[:40]!r}")

    if flags.model and (flags.model[0] in "./~" or flags.model.count("/") > 1) and not os.path.isdir(flags.model):
        parser.error(f"there is no checkpoint folder {flags.model[:200]!r}")

    from app.models import needs_hub  # with `app.gpu`, before torch is imported

    # Before gradio and huggingface_hub are imported: the page makes no calls of its own.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    may_go_online = "HF_HUB_OFFLINE" not in os.environ  # for a checkpoint that a visitor names
    if not needs_hub(flags.model):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from app.demo import build_demo
    from app.models import ModelShelf
    from app.serving import serve
    from rim_probe.errors import RiMError

    shelf = ModelShelf(preferred=flags.model, device=flags.device, online=may_go_online)
    host = flags.host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    demo = build_demo(shelf, own_machine=host in ("127.0.0.1", "localhost", "::1") and "SPACE_ID" not in os.environ)
    shelf.place()
    try:
        url = serve(demo, flags.host, flags.port, flags.root_path, flags.mcp or None)
    except RiMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError:
        host = flags.host or os.environ.get("GRADIO_SERVER_NAME") or "this machine"
        place = f"{host}, port {flags.port or '7860 or the next hundred'}"
        print(
            f"error: The page cannot be served at {place}; give a free --port and a --host of this machine.",
            file=sys.stderr,
        )
        return 1
    print(f"RiM Probe is at {url}  (Ctrl+C stops it)", flush=True)
    if demo.mcp_server:
        print(f"Tools for language models (MCP) are at {url.rstrip('/')}/gradio_api/mcp/", flush=True)
    if shelf.greeting is not None:  # while the first visitor reads the page
        shelf.start(shelf.greeting)
    demo.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
