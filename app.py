"""Starts the page: `python app.py`. Parses the flags and hands over to `app/`."""

import argparse
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        description="RiM Probe: ask a word problem and watch memory race chain of thought."
    )
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1; 0.0.0.0 for every network)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    parser.add_argument(
        "--model", help="checkpoint folder or Hugging Face Hub id to start with (default: checkpoints/)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: the GPU where there is one; falls back to the CPU)")
    flags = parser.parse_args()

    # Before gradio and huggingface_hub are imported: the page makes no calls of its own.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if flags.model is None or Path(flags.model).exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from app.demo import build_demo, serve
    from app.models import ModelShelf

    shelf = ModelShelf(preferred=flags.model, device=flags.device)
    demo = build_demo(shelf)
    try:
        url = serve(demo, flags.host, flags.port)
    except OSError:
        place = f"{flags.host or 'this machine'}, port {flags.port or '7860 or the next hundred'}"
        print(
            f"error: The page cannot be served at {place}; give a free --port and a --host of this machine.",
            file=sys.stderr,
        )
        return 1
    print(f"RiM Probe is at {url}  (Ctrl+C stops it)", flush=True)
    for name in shelf.names[:1]:  # while the first visitor reads the page
        shelf.start(name)
    demo.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
