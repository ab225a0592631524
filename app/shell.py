"""The page around the panels as HTML: masthead, tabs, the head of the open panel, history, files to save.

Pure functions over `app/templates`. Does not know Gradio, models or what a panel shows.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from app import figures
from app.figures import render
from app.view import GROUPS
from app.words import NAMES, facts

if TYPE_CHECKING:
    from app.runs import Run
    from app.session import Session
    from app.view import Looking

CITATION = Path(__file__).parent.parent / "CITATION.cff"
_drawn = itertools.count()  # the page's script hears of what has changed alone, and waits for it


@functools.cache
def masthead() -> str:
    """Title, one sentence, and the links: tour, this view, paper, code, BibTeX."""
    cited = yaml.safe_load(CITATION.read_text(encoding="utf-8"))
    paper = cited["references"][0]
    entries = [_bibtex("article", "rim", paper), _bibtex("software", "rim-probe", cited)]
    return render("masthead.html", paper=paper["url"], code=cited.get("repository-code"), bibtex="\n\n".join(entries))


def _bibtex(kind: str, key: str, cited: Mapping[str, Any]) -> str:
    """An entry of `CITATION.cff` in BibTeX."""
    people = [person.get("family-names") or f"{{{person['name']}}}" for person in cited["authors"]]
    fields = {"title": f"{{{cited['title']}}}", "author": " and ".join(people)}
    fields |= {name: cited[name] for name in ("year", "version", "url") if name in cited}
    number = next((one["value"] for one in cited.get("identifiers", ()) if one["value"].startswith("arXiv:")), None)
    fields |= {"eprint": number.removeprefix("arXiv:"), "archivePrefix": "arXiv"} if number else {}
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@{kind}{{{key},\n{lines}\n}}"


def tabs() -> str:
    """The row of panels. Which one is open is marked by the page's script, which knows it before the server does."""
    return render("tabs.html", groups=GROUPS)


def panel(name: str, body: str, address: str, run: Run | None, beside: bool = False) -> str:
    """The open panel, under the question it is about; `beside`: two runs, each of which says whose it is."""
    whose = run if name not in ("race", "evidence") and not beside else None
    return render("panel.html", name=name, body=body, address=address, run=whose, number=next(_drawn))


def away() -> str:
    """Says to the page's script that its address must be loaded anew: what it asks for is not kept here."""
    return f'<div data-reload data-drawn="{next(_drawn)}"></div>'


def pending(words: str) -> str:
    """A panel that will come."""
    return render("pending.html", words=words)


def side_by_side(pictures: Sequence[tuple[Run | None, str, str]]) -> str:
    """One picture, or two: each with the run it belongs to, or else a name."""
    if len(pictures) == 1:
        return pictures[0][2]
    # By hand one works on the current run alone; the attribute cannot come from a text, where quotes are escaped.
    (run, name, first), *others = pictures
    still = [
        (other, called, re.sub(r" (?=data-do(-input)?=['\"])", " disabled ", html)) for other, called, html in others
    ]
    shown = [
        (one, called, figures.verdict(one) if one else "", html) for one, called, html in [(run, name, first), *still]
    ]
    return render("compared.html", shown=shown)


def history(session: Session, looking: Looking) -> str:
    """The runs of this session, newest first, with what came of each: show one, or lay it beside the current one."""
    signs = {"right": "✓", "wrong": "✗", "": ""}
    rows = [
        {
            "index": str(index),
            "run": run,
            "current": run is session.run,
            "compared": run is looking.compared,
            "answers": [
                f"{NAMES[method]} {figures.shorten(facts(lane)['value'], 16)} {signs[facts(lane)['mark']]}".strip()
                for method, lane in run.lanes.items()
                if lane.answer is not None
            ],
        }
        for index, run in reversed(list(enumerate(session.runs)))
    ]
    return render("history.html", rows=rows)


def file(name: str, content: str) -> str:
    """A file that the page's script saves as soon as it comes."""
    return render("file.html", name=name, content=content, number=next(_drawn))
