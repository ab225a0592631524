"""Problems by the name of their source: files, the Hugging Face Hub, and the data sets we know.

Knows how a source is named and how it is downloaded:
- `path/to/file.txt[.gz]`: a file in our line format;
- `hub:owner/dataset/file.txt`: such a file of a Hub data set;
- `gsm8k:train`: a split of a data set known by name (`gsm`), converted on the way.
"""

from collections.abc import Iterator
from pathlib import Path

from rim_probe.datasets.gsm import SETS, convert_file
from rim_probe.errors import ProblemError
from rim_probe.problems import Problem, ProblemFile, RejectedLine, gather, iter_problems, read_problems

HUB = "hub:"


def load_problems(source: str) -> ProblemFile:
    """All problems of a source, and what had to be left out.

    Raises:
        ProblemError: a file that is missing, cannot be read or holds no problem, a split that a data set does not
            have, or a Hub that cannot be reached.
    """
    if known := _known(source):
        name, split = known
        return load_split(name, split)
    return read_problems(_local(source))


def iter_source(source: str) -> Iterator[Problem | RejectedLine]:
    """The same one by one, for sources too large to be held in memory; one without a problem is no error here."""
    if known := _known(source):
        name, split = known
        return convert_file(SETS[name], split, download_split(name, split))
    return iter_problems(_local(source))


def load_split(name: str, split: str, path: str | None = None) -> ProblemFile:
    """A split of a data set known by name, from a file of it at `path` or from the Hub."""
    file = download_split(name, split) if path is None else path
    found = gather(convert_file(SETS[name], split, file))
    if not found.problems:
        why = f" (row {found.rejected[0].line_number}: {found.rejected[0].reason})" if found.rejected else ""
        raise ProblemError(f"“{file}” holds no problem of {name}:{split}{why}; choose the data set it belongs to.")
    return found


def download_split(name: str, split: str, revision: str | None = None) -> str:
    """Where the file of a split lies after its download, or from an earlier one; the set's own revision if None."""
    dataset, file = SETS[name], _file(name, split)
    revision = revision or dataset.revision
    pinned = {"revision": revision} if revision else {}
    try:
        return _download(f"{name}:{split}", dataset.repo, file, **pinned)
    except ProblemError as error:
        page = f"https://huggingface.co/datasets/{dataset.repo}/resolve/{revision or 'main'}/{file}"
        raise ProblemError(
            f"{str(error).removesuffix('.')}; elsewhere, download {page} and convert it: "
            f"python -m rim_probe data {name} --split {split} --from FILE --output OUTPUT"
        ) from error


def commit_of(path: str) -> str | None:
    """The Hub commit a downloaded file belongs to, read from its place in the Hub's cache; None for other files."""
    parts = Path(path).parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-2] else None


def _known(source: str) -> tuple[str, str] | None:
    """(data set, split) of a source such as `gsm8k:train`; None for paths and `hub:` files."""
    name, colon, split = source.partition(":")
    if not colon or name not in SETS:
        return None
    _file(name, split)
    return name, split


def _file(name: str, split: str) -> str:
    files = SETS[name].files
    if split not in files:
        raise ProblemError(f"{name}:{split}: {SETS[name].title} has {', '.join(files)}; name one of them.")
    return files[split]


def _local(source: str) -> str:
    """The path of a file in our line format, downloaded where the source is one of the Hub."""
    if not source.startswith(HUB):
        return source
    parts = source.removeprefix(HUB).split("/")
    if len(parts) < 3:
        raise ProblemError(f"{source}: name a Hub file as hub:owner/dataset/file.txt.")
    return _download(source, "/".join(parts[:2]), "/".join(parts[2:]))


def _download(source: str, repo: str, file: str, **pinned: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repo, file, repo_type="dataset", **pinned)
    except Exception as error:  # the Hub client raises many kinds; a user needs one sentence
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ProblemError(f"{source} cannot be downloaded ({reason}).") from error
