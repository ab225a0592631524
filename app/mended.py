"""What is mended in Gradio 6.31 itself, because the page cannot avoid it. Knows Gradio's inside; nothing else does.

**Components that lose their number.** Whenever an event leaves a component as it is (`gr.skip()`) or changes one of its
properties, Gradio builds it anew for that session and files it under the old number, but the new one carries a number
of its own. The next value of that component is filed under *that*, and so on: every run left one more copy of the whole
stage behind, 70 kB, for as long as its session was kept. Here the new component gets the number it is filed under.
"""

from __future__ import annotations

from typing import Any

from gradio.blocks import Block
from gradio.state_holder import SessionState

_file = SessionState.__setitem__


def _file_under_its_number(session: SessionState, number: int, value: Any) -> None:
    if isinstance(value, Block) and number in session.blocks_config.blocks:
        value._id = number
    _file(session, number, value)


def mend() -> None:
    """Mends it for the whole process; to do it again changes nothing."""
    SessionState.__setitem__ = _file_under_its_number
