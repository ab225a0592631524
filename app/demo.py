"""Assembles the panels into one page and serves it.

Knows Gradio's page, theme and server. Does not know what is in a panel.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from app import recorded
from app.models import ModelShelf
from app.panels import race

HERE = Path(__file__).parent
HEADER = """
<header class="masthead">
  <h1>RiM Probe</h1>
  <p><b class="memory">RiM</b> thinks in silent memory blocks; <b class="cot">CoT</b> writes its chain of thought out.
  Ask both, and see what the silence is worth.</p>
</header>
"""


def build_demo(shelf: ModelShelf, recordings: Path = recorded.FOLDER) -> gr.Blocks:
    """The page over the checkpoints of `shelf`, opening with the runs in the folder `recordings`. Loads no model."""
    with gr.Blocks(title="RiM Probe", analytics_enabled=False) as demo:
        gr.HTML(HEADER, apply_default_css=False)
        race.build(race.Race(shelf, recordings), demo)
    return demo


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


def serve(demo: gr.Blocks, host: str | None = None, port: int | None = None) -> str:
    """Starts the server in the background and returns the page's address.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """
    _, url, _ = demo.queue().launch(
        server_name=host,
        server_port=port,
        theme=theme(),
        css_paths=HERE / "page.css",
        head=f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
        run_history=False,
        ssr_mode=False,
        footer_links=["api"],
        prevent_thread_lock=True,
        quiet=True,
    )
    return url
