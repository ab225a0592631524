"""The evidence panel draws what `load_evidence` gives, whole, in part, or with nothing in it."""

import copy

import pytest

from rim_probe.pictures.evidence import draw_evidence
from rim_probe.probing.evidence import load_evidence

NOTHING = {"checkpoint": "x", "metrics": None, "probes": [], "causes": [], "complaints": ["Run `this` first."]}


@pytest.fixture(scope="module")
def evidence():
    return load_evidence("checkpoints/rim-tiny")


def test_figures_on_the_page_are_those_of_the_files(evidence):
    html = draw_evidence(evidence).html().replace("\u00a0", " ")
    for one in evidence["metrics"]["accuracy"]:
        assert f"{100 * one['all']['value']:.1f} % ({100 * one['all']['low']:.1f} to" in html
    for probe in evidence["probes"]:
        assert probe["headline"]["text"] in html
    rows = draw_evidence(evidence).table.rows
    share = evidence["metrics"]["accuracy"][0]["all"]
    numbers = [round(share[key], 4) for key in ("value", "low", "high")]
    assert ["right, RiM", "all problems", *numbers, share["n"]] in [list(row) for row in rows]


def test_each_probe_folds_and_every_command_is_named_once(evidence):
    html = draw_evidence(evidence).html()
    assert html.count('<details class="evidence-probe">') == len(evidence["probes"])
    commands = html[html.index("evidence-commands") :]
    assert commands.count(evidence["metrics"]["made"]["command"]) == 1


def test_accuracy_stands_before_causes_before_probes(evidence):
    html = draw_evidence(evidence).html()
    places = [html.index(name) for name in ("How often the answer is right", "evidence-causes", "evidence-probe")]
    assert places == sorted(places)


def test_nothing_measured_is_a_sentence():
    picture = draw_evidence(NOTHING)
    assert "Run `this` first." in picture.html() and picture.table is None


def test_a_part_is_enough(evidence):
    assert "evidence-probe" not in draw_evidence({**evidence, "probes": [], "causes": []}).html()
    assert "How often" not in draw_evidence({**evidence, "metrics": None}).html()
    bare = copy.deepcopy(evidence)
    bare["metrics"] |= {"latency": [], "sweep": [], "paired": []}
    bare["probes"][0] |= {"headline": None, "rows": [], "targets": []}
    assert "no single score" in draw_evidence(bare).html()


def test_texts_of_a_report_cannot_write_html(evidence):
    evil = copy.deepcopy(evidence)
    for key in ("title", "question", "summary", "measure"):
        evil["probes"][0][key] = "<script>alert(1)</script>"
    evil["causes"][0]["text"] = evil["checkpoint"] = "<script>alert(1)</script>"
    assert "<script" not in draw_evidence(evil).html()


@pytest.mark.parametrize("url, shown", [("report/rim-tiny", True), ("javascript:alert(1)", False), ("", False)])
def test_a_link_is_an_address_of_a_page(evidence, url, shown):
    assert ("<a href=" in draw_evidence(evidence, report_url=url).html()) == shown
