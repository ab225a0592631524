"""Commands on a disk that fills while they write: the replaced file stays whole, and one sentence says why.

The disk is a small tmpfs, which takes a right to mount (root, on Linux); elsewhere the group is skipped.
"""

import contextlib
import io
import json
import os
import random
import subprocess
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from rim_probe.cli import main
from rim_probe.files import write_atomic
from rim_probe.options import open_card, silence_transformers

from . import Count
from .checkpoints import make

SIZE = 1_000_000  # bytes of the disk
PAGE = 4096


@contextlib.contextmanager
def small_disk() -> Iterator[Path]:
    """A disk of `SIZE` bytes.

    Raises:
        OSError: it cannot be mounted.
    """
    with tempfile.TemporaryDirectory() as place:
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", place]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            raise OSError("there is no mount") from None
        if done.returncode:
            raise OSError(done.stderr.strip().splitlines()[0])
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", "-l", place], check=True)


def free(disk: Path) -> int:
    told = os.statvfs(disk)
    return told.f_bavail * told.f_frsize


def fill(disk: Path, left: int) -> Path:
    """Leaves no more than `left` bytes of a disk."""
    ballast = disk / "ballast"
    with open(ballast, "wb") as file:
        file.write(bytes(max(0, free(disk) - left)))
    return ballast


def held(disk: Path) -> dict[str, bytes]:
    """All files of a disk but the ballast and what a training keeps for itself."""
    files = (path for path in disk.rglob("*") if path.is_file() and path.name != "ballast")
    return {name: path.read_bytes() for path in files if ".run/" not in (name := str(path.relative_to(disk)))}


def command(*words: object) -> None:
    """A command that must end well, or with one sentence.

    Raises:
        OSError: with the sentence.
    """
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(word) for word in words])
    if code:
        raise OSError(errors.getvalue().strip().splitlines()[-1])


def write_data(disk: Path, work: Path) -> None:
    command("data", "arithmetic", "--split", "test", "--rows", 900, "--output", disk / "data.txt")


def write_report(disk: Path, work: Path) -> None:
    write_atomic(disk / "report.json", json.dumps({"format": "rim-probe-comparison/1", "n": [1] * 40_000}).encode())


def write_card(disk: Path, work: Path) -> None:
    open_card(str(disk / "card.md"), "eval")("| table |\n" * 12_000)


def write_export(disk: Path, work: Path) -> None:
    command("export", work / "checkpoint", disk / "plain")


def write_training(disk: Path, work: Path) -> None:
    """The finished checkpoint of a run that is done, over an earlier one."""
    import yaml

    from .kills import RECIPE

    recipe = work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"output": str(disk / "out")} | RECIPE), encoding="utf-8")
    resume = ["--resume"] if (disk / "out.run").exists() else []
    command("train", recipe, *resume)


KINDS = {  # what is written, and how many bytes of it, about
    "data": (write_data, 110_000),
    "report": (write_report, 130_000),
    "card": (write_card, 120_000),
    "export": (write_export, 60_000),
    "train": (write_training, 500_000),
}


def attempt(count: int, seed: int, kinds: tuple[str, ...] = tuple(KINDS)) -> Count:
    """Lets the disk run full at a random byte, `count` times, by turns in each kind of writing."""
    chance, found = random.Random(seed), Count()
    silence_transformers()
    try:
        with small_disk():
            pass
    except OSError as error:
        return Count(skipped=f"no small disk can be made ({error})")
    with tempfile.TemporaryDirectory() as work:
        if "export" in kinds:
            make(Path(work) / "checkpoint")
        for number in range(count):
            kind = kinds[number % len(kinds)]
            with small_disk() as disk:
                (disk / "card.md").write_text("<!-- eval -->\nold\n<!-- /eval -->\n", encoding="utf-8")
                found.note(*tried(kind, disk, Path(work), chance))
    return found


def tried(kind: str, disk: Path, work: Path, chance: random.Random) -> tuple[str, str | None]:
    """One kind of writing on a disk that runs full; what became of it."""
    write, size = KINDS[kind]
    if kind in ("data", "report"):
        (disk / {"data": "data.txt", "report": "report.json"}[kind]).write_bytes(b"What is 1 + 1?||<<1+1=2>> #### 2\n")
    before = held(disk)
    ballast = fill(disk, chance.randrange(size // PAGE) * PAGE)
    try:
        write(disk, work)
        return f"{kind}: there was room", None
    except OSError as error:
        told = str(error)
    except Exception:
        return f"{kind}: full", traceback.format_exc()[-500:]
    if held(disk) != before:
        return f"{kind}: full", f"files changed: {sorted(held(disk).items() ^ before.items())[:3]!r}"[:300]
    if not told or "\n" in told or ("full" not in told and "No space" not in told):
        return f"{kind}: full", f"it does not say so: {told}"
    ballast.unlink()
    try:
        write(disk, work)
    except Exception:
        return f"{kind}: full", f"not with room either: {traceback.format_exc()[-300:]}"
    return f"{kind}: full", None
