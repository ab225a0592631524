"""Finding a checkpoint, here or on the Hub, and its memory layout, in its file or in its tokens.

Knows folders and names of tokens. Knows nothing of weights.
"""

import json
import os
import re
from pathlib import Path

from rim_probe.adapters import has_tokenizer
from rim_probe.errors import CheckpointError, LayoutError
from rim_probe.loading import first_line, load_tokenizer
from rim_probe.memory import DETECTED, LAYOUT_FILE, MemoryLayout, detect


def layout_of(folder: Path, given: MemoryLayout | str | Path | None) -> MemoryLayout:
    """The layout given, or that of the folder; one that its tokens tell has to be asked for.

    Raises:
        LayoutError: none, or an impossible one; the sentence offers what the tokens tell.
    """
    if isinstance(given, MemoryLayout):
        return given
    if given is not None and str(given) != DETECTED:
        return MemoryLayout.load(given)
    try:
        return MemoryLayout.load(folder)
    except LayoutError as error:
        told = (folder / LAYOUT_FILE).exists() or not has_tokenizer(folder)
        found = None if told else detect(load_tokenizer(folder).added_tokens_encoder)
        if found is None:
            raise
        if given is None:
            raise LayoutError(
                f"{error} Or does it come from another program? Its tokens {', '.join(found.tokens)} look like memory "
                f"blocks: give --layout {DETECTED} for {found.num_blocks} blocks {found.block_text} (the numbers of "
                "the paper, for tokens tell none), or --layout FILE with your own, such as "
                f"{json.dumps(found.to_dict())}."
            ) from None
        return found


def local_folder(path: str | Path) -> Path:
    """The folder of a checkpoint here, or of a Hub id that is fetched.

    Raises:
        CheckpointError: neither of the two.
    """
    if os.path.isdir(path):
        return Path(path)
    text = str(path)
    # Anything but owner/name is a mistyped folder: it is not asked for on the Hub.
    looks_like_hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", text) and not text.startswith("checkpoints/")
    if os.path.exists(path) or not looks_like_hub_id:
        raise CheckpointError(f"There is no checkpoint folder {path}; give a folder or a Hugging Face Hub id.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.md"]))
    except Exception as error:
        raise CheckpointError(
            f"{path} is neither a folder here nor a repository that the Hub can be asked for ({first_line(error)}); "
            "check the name and the connection."
        ) from error
