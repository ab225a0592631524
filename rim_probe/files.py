"""Writing files so that nobody ever reads half of one."""

import contextlib
import os
import threading
from pathlib import Path


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file so that at any moment the old one or the new one is there, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")  # of this writer alone
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):  # it is there only where something went wrong
            temporary.unlink()
