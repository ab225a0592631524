"""What a command may write, and how it is written so that nobody ever reads half of it.

Method:
1. a file is written beside its place, brought to the disk and renamed into its place: at any moment the old one or the
   new one is there, whole (`write_atomic`); a folder likewise (`whole_folder`, `replace_files`);
2. a file is replaced only if it is what the command writes (`check_file`); a folder is filled only if it is new, empty,
   or carries the command's name in the file `MARK` (`claim`, `check_folder`);
3. one process at a time fills a folder (`hold`). The lock is flock: the system frees it when its process ends, however
   it ends, so none is ever stale.
"""

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from rim_probe.errors import RiMError

MARK = ".made-by"  # in a folder that a command fills: the command's name
LOCK = ".lock"
_FULL = ("No space left", "Disk quota exceeded", "file write failed")  # as Rust and PyTorch tell it, without a number


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file so that at any moment the old one or the new one is there, whole.

    Raises:
        OSError: with the name of `path`, a full disk among others.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")  # of this writer alone
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):  # it is there only where something went wrong
            temporary.unlink()


# -------------------------------------------------------------------------------------------------- whose is it


def check_file(path: Path, is_own: Callable[[Path], bool], what: str) -> None:
    """Refuses a file that holds anything but what is to be written there: `what`, as `is_own` recognises it.

    Raises:
        RiMError: such a file.
    """
    if path.exists() and (not path.is_file() or (path.stat().st_size and not is_own(path))):
        raise RiMError(f"{path} exists and is not {what}, so it is not replaced; name another file, or move it away.")


def begins_with(*starts: str) -> Callable[[Path], bool]:
    """For `check_file`: whether a file begins with one of these texts, white space aside."""

    def is_own(path: Path) -> bool:
        with open(path, "rb") as file:
            head = b"".join(file.read(1000).split())
        return head.startswith(tuple("".join(start.split()).encode() for start in starts))

    return is_own


def check_folder(folder: Path, maker: str, is_own: Callable[[Path], bool] = lambda folder: False) -> None:
    """Refuses a folder that the command `maker` did not make.

    Args:
        is_own: recognises a folder without a mark, made before there were marks.

    Raises:
        RiMError: a file, or a folder that holds something else's.
    """
    if folder.exists() and not folder.is_dir():
        raise RiMError(f"{folder} is a file; name a folder.")
    held = sorted(path.name for path in folder.iterdir() if path.name != LOCK) if folder.is_dir() else []
    if not held or is_own(folder):
        return
    mark = folder / MARK
    if not mark.is_file() or mark.read_text(encoding="utf-8", errors="replace").strip() != maker:
        raise RiMError(
            f"{folder} holds what `{maker}` did not make ({next((n for n in held if n != MARK), MARK)}); name another "
            "folder, or move it away."
        )


def claim(folder: Path, maker: str, is_own: Callable[[Path], bool] = lambda folder: False) -> None:
    """Makes a folder that the command `maker` fills, or takes one that it made.

    Raises:
        RiMError: as `check_folder`.
    """
    check_folder(folder, maker, is_own)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MARK).exists():
        write_atomic(folder / MARK, f"{maker}\n".encode())


@contextlib.contextmanager
def hold(folder: Path, maker: str, is_own: Callable[[Path], bool] = lambda folder: False) -> Iterator[None]:
    """Claims a folder and keeps other processes out of it.

    Raises:
        RiMError: as `claim`; or another process at work in it.
    """
    check_folder(folder, maker, is_own)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0):
            claim(folder, maker, is_own)
            yield
    except Timeout:
        raise RiMError(f"Another `{maker}` is at work in {folder}; wait for it, or name another output.") from None


# ------------------------------------------------------------------------------------------------------ whole folders


@contextlib.contextmanager
def whole_folder(place: Path, maker: str) -> Iterator[Path]:
    """A folder to fill, which becomes `place` (new or empty) when all went well; of anything else nothing is left.

    Raises:
        RiMError: another process that makes the same folder.
    """
    work = place.with_name(f".{place.name}.new")
    made = work / "made"
    with hold(work, maker):
        shutil.rmtree(made, ignore_errors=True)  # left by a process that was killed
        try:
            made.mkdir()
            yield made
            _sync_files(made)
            os.replace(made, place)
            _sync(place.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def replace_files(folder: Path, stale: Callable[[], list[Path]]) -> Iterator[Path]:
    """A folder to fill, whose files then take their places in `folder`; of `stale` those go that have no successor.

    Nothing in `folder` is touched before all new files are on the disk.
    """
    made = folder / ".rim-probe-new"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    try:
        yield made
        _sync_files(made)
        fresh = {file.name for file in made.iterdir()}
        for name in fresh:
            os.replace(made / name, folder / name)
        for file in stale():
            if file.name not in fresh:
                file.unlink()
        _sync(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def one_sentence_if_full(place: Path) -> Iterator[None]:
    """Tells a full disk, which every library reports in its own way, in one sentence.

    Raises:
        RiMError: the disk was full.
    """
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if isinstance(error, RiMError) or not (full or any(text in str(error) for text in _FULL)):
            raise
        raise RiMError(
            f"The disk that holds {place} is full; make room and give the same command again (train: with --resume)."
        ) from error


def _sync_files(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            _sync(file)


def _sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    with contextlib.suppress(OSError):  # some systems cannot do that for a folder
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
