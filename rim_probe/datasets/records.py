"""Rows of data files: JSON, JSON lines and Parquet, one row at a time.

Knows file formats. Knows nothing of what the fields mean.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rim_probe.errors import ProblemError
from rim_probe.problems import RejectedLine, read_lines

JSON_ENDINGS = (".json", ".jsonl", ".jsonl.gz")
PARQUET_ENDING = ".parquet"
_ROWS_AT_ONCE = 4096


def iter_rows(path: str, fields: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any] | RejectedLine]]:
    """(number from 1, field -> value) of each row of a file; what is no JSON object comes as a RejectedLine.

    Raises ProblemError for a file that is missing, damaged or without one of `fields` (Parquet), and where pyarrow,
    which reads Parquet, is missing.
    """
    return _parquet_rows(path, fields) if path.endswith(PARQUET_ENDING) else _json_rows(path)


def _json_rows(path: str) -> Iterator[tuple[int, Mapping[str, Any] | RejectedLine]]:
    """Of a `.json` file that is one list of objects, or of lines."""
    if path.endswith(".json"):
        rows = _json("".join(line for _, line in read_lines(path)))
        if isinstance(rows, list):
            for number, row in enumerate(rows, start=1):
                yield number, row if isinstance(row, dict) else RejectedLine(path, number, "This is no JSON object.")
            return
    for number, line in read_lines(path):
        if line.strip():
            row = _json(line)
            yield number, row if isinstance(row, dict) else RejectedLine(path, number, "This line is no JSON object.")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _parquet_rows(path: str, fields: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ProblemError(
            f"“{path}” is a Parquet file, which pyarrow reads; install it: pip install pyarrow."
        ) from None
    try:
        with ParquetFile(path) as file:
            if missing := set(fields) - set(file.schema_arrow.names):
                raise ProblemError(
                    f"“{path}” has no column “{min(missing)}” (but {', '.join(file.schema_arrow.names)}); "
                    "choose the data set that the file belongs to."
                )
            number = 0
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=list(fields)):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except FileNotFoundError:
        raise ProblemError(f"The file “{path}” does not exist; check its path.") from None
    except (ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ProblemError(f"“{path}” cannot be read as Parquet ({reason}); download it again.") from None
