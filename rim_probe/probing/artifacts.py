"""Fitted probes beside their checkpoint: `<checkpoint>/probes/<name>.safetensors` and `<name>.json`, and the report.

Method:
1. a fingerprint of the model (`fingerprint`) ties a probe to the weights that it was fitted on;
2. tensors are written first and the JSON after them, each to a temporary file that is then renamed; the JSON holds the
   digest of the tensors, so that an interrupted save is neither loaded nor taken for done;
3. loading checks, in this order: format, layout, fingerprint, digest. Nothing is ever unpickled;
4. a probe's report of more than `LARGE_PROBE` bytes lies gzipped in its JSON, with numbers of `DIGITS` digits; in
   report.json as well where that would be larger than `LARGE_REPORT`.

Knows files, digests and who belongs to whom. Knows nothing of what a probe's tensors mean.
"""

import base64
import datetime
import gzip
import hashlib
import json
import re
import weakref
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from rim_probe.errors import ArtifactError
from rim_probe.evaluation import describe_machine
from rim_probe.files import write_atomic
from rim_probe.model import RiM
from rim_probe.probing.results import Report, plain

FOLDER = "probes"
REPORT_FILE = "report.json"
FORMAT = "rim-probe artifact"
REPORT_FORMAT = "rim-probe report"
VERSION = 1
LARGE_PROBE, LARGE_REPORT = 200_000, 1_000_000  # bytes of JSON
DIGITS = 6  # significant ones
_PACKED = "gzip"  # the key of a packed report

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_CONFIG_KEYS = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_fingerprints: "weakref.WeakKeyDictionary[RiM, tuple[tuple, str]]" = weakref.WeakKeyDictionary()


def fingerprint(rim: RiM) -> str:
    """A SHA-256 of layout, architecture and all parameters: equal for a model and the same saved and loaded again.

    Parameters are compared as bfloat16, so that a float32 checkpoint has one fingerprint on a CPU (where it is read as
    float32) and on a GPU (as bfloat16). They are digested one by one and the digests sorted: names and order, which
    differ between versions of transformers, do not matter. Takes less than a second for 135 million parameters and is
    kept until one of them changes.
    """
    parameters = list(rim.model.parameters())
    state = tuple((id(p), p.data_ptr(), p._version) for p in parameters)
    known = _fingerprints.get(rim)
    if known is None or known[0] != state:
        known = _fingerprints[rim] = (state, _fingerprint(rim, parameters))
    return known[1]


def _fingerprint(rim: RiM, parameters: Sequence[torch.Tensor]) -> str:
    config = rim.model.config
    head = {"layout": _layout(rim), "config": {key: getattr(config, key, None) for key in _CONFIG_KEYS}}
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter
        digests = list(pool.map(_digest, parameters))
    whole = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for digest in sorted(digests):
        whole.update(digest)
    return whole.hexdigest()


def _digest(parameter: torch.Tensor) -> bytes:
    values = parameter.detach().to(torch.bfloat16).contiguous().cpu().view(torch.int16)
    digest = hashlib.sha256(repr(tuple(values.shape)).encode())
    digest.update(values.numpy().reshape(-1).data)
    return digest.digest()


def _layout(rim: RiM) -> dict[str, Any]:
    layout = rim.layout
    return {"num_blocks": layout.num_blocks, "slots_per_block": layout.slots_per_block, "tokens": list(layout.tokens)}


def describe_study(
    rim: RiM, data: Mapping[str, tuple[str | Path, int]], *, command: str, seed: int, **measured: Any
) -> dict[str, Any]:
    """Where a probe comes from: the provenance that artifacts and the report carry.

    Args:
        data: by split, the file and how many of its problems were used; digests are taken of the files as they are.
        measured: further entries, such as a probe's score and its control.
    """
    files = {path for path, _ in data.values()}  # one file may serve as several splits
    digests = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in files}
    return {
        "checkpoint": rim.name,
        "fingerprint": fingerprint(rim),
        "layout": _layout(rim),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "seed": seed,
        "data": {
            split: {"file": str(path), "sha256": digests[path], "problems": n} for split, (path, n) in data.items()
        },
        "machine": describe_machine(rim.device),
        **measured,
    }


def resume_key(name: str, provenance: Mapping[str, Any], choices: Mapping[str, Any] | None = None) -> str:
    """What a probe's result depends on, as one digest: model, layout, data, seed and the choices asked for."""
    data = {split: [part["sha256"], part["problems"]] for split, part in provenance["data"].items()}
    parts = [VERSION, name, provenance["fingerprint"], provenance["layout"], data, provenance["seed"], choices or {}]
    return hashlib.sha256(json.dumps(plain(parts), sort_keys=True).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------- one artifact


def save_artifact(
    folder: str | Path,
    name: str,
    tensors: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    *,
    key: str | None = None,
    report: Report | None = None,
) -> int:
    """Writes one probe and returns its size in bytes.

    Args:
        folder: usually `<checkpoint>/probes`; made where it is missing.
        tensors: float16 or float32 arrays (float64 is stored as float32), whole numbers or truth values; may be empty.
        provenance: with `fingerprint` and `layout`, as `describe_study` gives it.
        key: as `resume_key` gives it; without one the probe is fitted again on every run.
        report: the probe's results, so that a resumed run need not score again.

    Raises:
        ArtifactError: a name that is no file name, or an array of another type.
    """
    folder = Path(folder)
    tensors_path, json_path = _paths(folder, name)
    stored = {tensor: _storable(name, tensor, np.asarray(array)) for tensor, array in tensors.items()}
    packed = safetensors.numpy.save(stored)
    entry = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "fingerprint": provenance["fingerprint"],
        "layout": provenance["layout"],
        "key": key,
        "tensors_sha256": hashlib.sha256(packed).hexdigest(),
        "settings": settings,
        "provenance": provenance,
        "report": _pack(report.to_dict()) if report is not None else None,
    }
    text = _json_bytes(entry)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(tensors_path, packed)
    write_atomic(json_path, text)
    return len(packed) + len(text)


def load_artifact(
    folder: str | Path, name: str, rim: RiM
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """The tensors, settings and provenance of a probe that was fitted on this very model.

    Raises:
        ArtifactError: missing or damaged files, another format, another memory layout, another checkpoint.
    """
    tensors_path, json_path = _paths(Path(folder), name)
    entry = _read_entry(json_path, name)
    _check_model(entry, rim, json_path)
    try:
        packed = tensors_path.read_bytes()
    except OSError:
        raise ArtifactError(f"{tensors_path} is missing; {_again(name)}.") from None
    if hashlib.sha256(packed).hexdigest() != entry["tensors_sha256"]:
        raise ArtifactError(f"{tensors_path} is damaged or does not belong to {json_path.name}; {_again(name)}.")
    try:
        tensors = safetensors.numpy.load(packed)
    except Exception:  # the digest fits, so somebody wrote it so; safetensors raises errors of several kinds
        raise ArtifactError(f"{tensors_path} is no safetensors file; {_again(name)}.") from None
    return tensors, entry["settings"], entry["provenance"]


def load_results(folder: str | Path, name: str) -> Report | None:
    """The results that were saved with a probe; None where there were none.

    Raises:
        ArtifactError: a missing or damaged file.
    """
    json_path = _paths(Path(folder), name)[1]
    report = _read_entry(json_path, name).get("report")
    return None if report is None else _unpack(report, json_path)


def load_provenance(folder: str | Path, name: str) -> dict[str, Any]:
    """Where a stored probe comes from, whatever model it belongs to.

    Raises:
        ArtifactError: a missing or damaged file.
    """
    return _read_entry(_paths(Path(folder), name)[1], name)["provenance"]


def is_done(folder: str | Path, name: str, key: str) -> bool:
    """Whether this probe lies complete in `folder`, made from exactly what `key` (of `resume_key`) stands for."""
    tensors_path, json_path = _paths(Path(folder), name)
    try:
        entry = _read_entry(json_path, name)
        whole = hashlib.sha256(tensors_path.read_bytes()).hexdigest() == entry["tensors_sha256"]
    except (ArtifactError, OSError):
        return False
    return whole and entry.get("key") == key and entry.get("report") is not None


def size_report(folder: str | Path) -> dict[str, int]:
    """Bytes of every file of a folder of artifacts, the largest first, and their `total`."""
    files = [path for path in Path(folder).iterdir() if path.is_file()] if Path(folder).is_dir() else []
    sizes = {path.name: path.stat().st_size for path in files}
    return dict(sorted(sizes.items(), key=lambda item: -item[1])) | {"total": sum(sizes.values())}


# ----------------------------------------------------------------------------------------------------------- the report


def report_to_dict(reports: Sequence[Report], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What `report.json` holds."""
    return {
        "format": REPORT_FORMAT,
        "version": VERSION,
        "provenance": plain(dict(provenance)),
        "reports": [report.to_dict() for report in reports],
    }


def save_report(folder: str | Path, reports: Sequence[Report], provenance: Mapping[str, Any]) -> Path:
    """Writes `report.json`."""
    path = Path(folder) / REPORT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    report = report_to_dict(reports, provenance)
    content = _json_bytes(report)
    if len(content) > LARGE_REPORT:
        content = _json_bytes(report | {"reports": [_pack(one) for one in report["reports"]]})
    write_atomic(path, content)
    return path


def load_report(folder: str | Path) -> tuple[list[Report], dict[str, Any]]:
    """The reports of the probes, and the provenance they share.

    Raises:
        ArtifactError: a missing or damaged file.
    """
    path = Path(folder) / REPORT_FILE
    report = _read_json(path, "run `python -m rim_probe probe` again")
    _check_format(report, REPORT_FORMAT, path)
    if not isinstance(report.get("reports"), list) or not isinstance(report.get("provenance"), dict):
        raise ArtifactError(f"{path} lacks its results; run `python -m rim_probe probe` again.")
    return [_unpack(one, path) for one in report["reports"]], report["provenance"]


def is_report(folder: Path) -> bool:
    """Whether a folder holds a report of `probe`; older ones carry no mark (see `files`)."""
    try:
        return _read_json(folder / REPORT_FILE, "").get("format") == REPORT_FORMAT
    except ArtifactError:
        return False


# -------------------------------------------------------------------------------------------------------------- helpers


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    if not _NAME.fullmatch(name) or f"{name}.json" == REPORT_FILE:
        raise ArtifactError(f"{name!r} is no name for a stored probe; use small letters, digits, - and _.")
    return folder / f"{name}.safetensors", folder / f"{name}.json"


def _storable(name: str, tensor: str, array: np.ndarray) -> np.ndarray:
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    if array.dtype.kind not in "fiub":
        raise ArtifactError(f"{name}: the array {tensor!r} holds {array.dtype}; store numbers or truth values.")
    return np.ascontiguousarray(array).reshape(array.shape)  # safetensors writes the memory as it lies


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(plain(value), allow_nan=False, ensure_ascii=False, indent=1) + "\n").encode()


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError:
        raise ArtifactError(f"{path} is missing; {remedy}.") from None
    except (ValueError, RecursionError):
        raise ArtifactError(f"{path} is damaged (no JSON); {remedy}.") from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} holds no JSON object; {remedy}.")
    return content


def _read_entry(path: Path, name: str) -> dict[str, Any]:
    entry = _read_json(path, _again(name))
    _check_format(entry, FORMAT, path)
    kinds = {"fingerprint": str, "layout": dict, "tensors_sha256": str, "settings": dict, "provenance": dict}
    for key, kind in kinds.items():
        if not isinstance(entry.get(key), kind):
            raise ArtifactError(f"{path} lacks {key!r}; {_again(name)}.")
    return entry


def _check_format(entry: Mapping[str, Any], form: str, path: Path) -> None:
    if entry.get("format") != form:
        raise ArtifactError(f"{path} is no file of this kind ({form}); run `python -m rim_probe probe` again.")
    if entry.get("version") != VERSION:
        raise ArtifactError(
            f"{path} has format version {entry.get('version')!r} but this program reads {VERSION}; update rim_probe or "
            "run `python -m rim_probe probe` again."
        )


def _check_model(entry: Mapping[str, Any], rim: RiM, path: Path) -> None:
    layout, own = entry["layout"], _layout(rim)
    if layout != own:
        raise ArtifactError(
            f"{path} was made for {layout.get('num_blocks')} memory blocks of {layout.get('slots_per_block')} slots "
            f"({', '.join(map(str, layout.get('tokens') or []))}) but {rim.name} has {own['num_blocks']} of "
            f"{own['slots_per_block']} ({', '.join(own['tokens'])}); {_again(entry.get('name'))}."
        )
    if entry["fingerprint"] != fingerprint(rim):
        made_for = entry["provenance"].get("checkpoint", "another checkpoint")
        raise ArtifactError(
            f"{path} was made for other weights ({made_for}) than those of {rim.name}; {_again(entry.get('name'))}."
        )


def _pack(report: dict[str, Any]) -> dict[str, Any]:
    """A report as it lies in its probe's JSON."""
    text = json.dumps(report, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    if len(text) <= LARGE_PROBE:
        return report
    text = json.dumps(_short(report), allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    return {_PACKED: base64.b64encode(gzip.compress(text, 9, mtime=0)).decode()}


def _short(value: Any) -> Any:
    """Plain data with numbers of `DIGITS` significant digits."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _unpack(data: Any, path: Path) -> Report:
    try:
        if set(data) == {_PACKED}:
            data = json.loads(gzip.decompress(base64.b64decode(data[_PACKED], validate=True)))
        return Report.from_dict(data)
    except (TypeError, KeyError, AttributeError, ValueError, OSError, EOFError, zlib.error):
        raise ArtifactError(f"{path} holds damaged results; run `python -m rim_probe probe` again.") from None


def _again(name: Any) -> str:
    return f"run `python -m rim_probe probe CHECKPOINT --data FILE --only {name}`"
