"""The scripts that a newcomer copies from: they run, and stay as short as they promise."""

import ast
import json
import runpy
import sys
from pathlib import Path

import pytest

from rim_probe.plots import PANELS, Panel

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoints" / "rim-tiny"


@pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="checkpoints/rim-tiny is not here")
def test_nearest_step(monkeypatch, tmp_path, capsys):
    script, page = ROOT / "examples" / "nearest_step.py", tmp_path / "figure.html"
    assert len(script.read_text(encoding="utf-8").splitlines()) < 40
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["nearest_step.py", "60", str(page)])
    shares = runpy.run_path(str(script))["shares"]
    assert list(shares) == ["step 1", "step 2", "step 3"]
    for column in shares.values():
        assert list(column) == [*(f"block {k}" for k in range(1, 9)), "last question token"]
        assert all(0 <= share <= 1 for share in column.values())
    printed = capsys.readouterr().out
    assert "n = 18, ± 23 points at most" in printed and "last question token" in printed
    assert "Plotly.newPlot" in page.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="checkpoints/rim-tiny is not here")
def test_the_notebook_draws_every_panel(monkeypatch, capsys):
    file = ROOT / "examples" / "panels.ipynb"
    cells = [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), "without what it has shown"
    monkeypatch.chdir(ROOT)
    known, drawn = {}, set()
    for cell in cells:
        *lines, last = ast.parse("".join(cell["source"])).body
        exec(compile(ast.Module(lines, []), "notebook", "exec"), known)
        if isinstance(last, ast.Expr):
            shown = eval(compile(ast.Expression(last.value), "notebook", "eval"), known)
            if isinstance(shown, Panel):
                assert "<figure" in shown.html()
                drawn.add(shown.panel)
        else:
            exec(compile(ast.Module([last], []), "notebook", "exec"), known)
    assert drawn == {*PANELS, "evidence"} and "memory" in capsys.readouterr().out
