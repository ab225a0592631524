"""Imports run one way, as CONTRIBUTING.md says: each part can be understood without those above it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = (  # every part of rim_probe imports from floors below its own
    {"__version__", "errors", "numbers", "precision", "answers"},
    {"files"},
    {"memory", "problems", "report"},
    {"encoding", "equations", "datasets", "gallery", "loading", "anatomy", "baselines", "trained_on"},
    {"bases", "attaching"},
    {"adapters", "packing"},
    {"door", "finding"},
    {"model"},
    {"greedy"},
    {"decoding"},
    {"evaluation"},
    {"bench", "costs", "options", "outcomes"},
    {"comparison"},
    {"probing", "training"},
    {"glassbox", "plots"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
DEVICES_AND_THREADS = {"cuda", "get_num_threads", "set_num_threads"}


def imported(file: Path) -> Iterator[str]:
    """Full names of what a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def packages(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(file)}


def test_the_library_knows_nothing_of_the_screen():
    for file in files("rim_probe"):
        assert not packages(file) & {"app", "benchmarks", "gradio", "spaces"}, file


def test_every_part_of_the_library_imports_from_below_alone():
    for file in files("rim_probe"):
        part = file.relative_to(ROOT / "rim_probe").parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for name in imported(file):
            package, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if package == "rim_probe" and other != part:
                assert FLOOR[other] < FLOOR[part], f"{file} imports {name}"


def test_panels_are_drawn_without_torch():
    """A notebook draws a saved reading on a machine that has no model."""
    code = (
        "import gzip, json, sys\n"
        "from rim_probe.plots import PANELS, draw\n"
        "run = json.load(gzip.open('app/recorded/glass-box.json.gz'))['runs'][0]['run']\n"
        "assert all(draw(run, panel).html() for panel in PANELS)\n"
        "print(*{'torch', 'transformers', 'gradio'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == ""


def test_the_screen_does_no_tensor_maths():
    """Only `app.models` and `app.gpu` touch torch, and of it nothing but devices and threads."""
    for file in files("app"):
        found = packages(file)
        assert not found & {"numpy", "scipy", "sklearn"}, file
        if "torch" in found:
            assert file.name in ("models.py", "gpu.py")
            used = {
                node.attr
                for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
            }
            assert used <= DEVICES_AND_THREADS, used - DEVICES_AND_THREADS
