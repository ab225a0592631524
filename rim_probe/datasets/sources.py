"""Problem files by path or from the Hugging Face Hub.

Knows how a source is named: `path/to/file.txt[.gz]`, or `hub:owner/dataset/file.txt` for a file of a Hub data set.
"""

from rim_probe.errors import ProblemError
from rim_probe.problems import ProblemFile, read_problems

HUB = "hub:"


def load_problems(source: str) -> ProblemFile:
    """Reads problems from a path or a Hub data set.

    Raises:
        ProblemError: a file that is missing or cannot be read, or a Hub that cannot be reached.
    """
    if not source.startswith(HUB):
        return read_problems(source)
    parts = source.removeprefix(HUB).split("/")
    if len(parts) < 3:
        raise ProblemError(f"{source}: name a Hub file as hub:owner/dataset/file.txt.")
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]), repo_type="dataset")
    except Exception as error:  # the Hub client raises many kinds; a user needs one sentence
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ProblemError(f"{source} cannot be downloaded ({reason}).") from error
    return read_problems(path)
