"""The evidence panel draws what `load_evidence` gives, whole, in part, or with nothing in it."""

import copy

import pytest
from readings import words

from rim_probe.plots.evidence import draw_evidence
from rim_probe.probing.evidence import load_evidence

NOTHING = {"checkpoint": "x", "metrics": None, "probes": [], "causes": [], "complaints": ["Run `this` first."]}


@pytest.fixture(scope="module")
def evidence():
    return load_evidence("checkpoints/rim-tiny")


def test_figures_and_table_hold_the_numbers_of_the_files(evidence):
    panel = draw_evidence(evidence)
    drawn = {x for trace in panel.figures["accuracy"].data for x in trace.x}
    shares = [one["all"]["value"] for one in evidence["metrics"]["accuracy"]]
    assert set(shares) < drawn, "and a control"
    medians = {one["total_ms"]["median"] for one in evidence["metrics"]["latency"]}
    assert {x for trace in panel.figures["latency"].data for x in trace.x} == medians
    share = evidence["metrics"]["accuracy"][0]["all"]
    numbers = [round(share[key], 4) for key in ("value", "low", "high")]
    assert ["right, RiM", "all problems", *numbers, share["n"]] in [list(row) for row in panel.table.rows]
    for probe in evidence["probes"]:
        assert probe["told"] in words(panel.html()) and f"probe {probe['name']} 0" in panel.figures


def test_controls_are_hollow(evidence):
    figure = draw_evidence(evidence).figures["accuracy"]
    symbols = {name: s for trace in figure.data for name, s in zip(trace.hovertext, trace.marker.symbol, strict=False)}
    hollow = [name.partition("<br>")[0] for name, symbol in symbols.items() if symbol == "circle-open"]
    assert hollow == ["control: RiM, blocks removed"]


def test_each_probe_folds_and_every_command_is_named_once(evidence):
    html = draw_evidence(evidence).html()
    assert html.count('<details class="evidence-probe">') == len(evidence["probes"])
    assert html[html.index("evidence-commands") :].count(evidence["metrics"]["made"]["command"]) == 1


def test_a_part_is_enough(evidence):
    assert draw_evidence(NOTHING).table is None and "Run `this` first." in draw_evidence(NOTHING).html()
    assert "evidence-probe" not in draw_evidence({**evidence, "probes": [], "causes": []}).html()
    assert "How often" not in draw_evidence({**evidence, "metrics": None}).html()
    bare = copy.deepcopy(evidence)
    bare["metrics"] |= {"latency": [], "sweep": [], "paired": []}
    bare["probes"][0] |= {"report": bare["probes"][0]["report"] | {"results": []}, "targets": []}
    assert "no single score" in draw_evidence(bare).html()


def test_texts_of_a_report_cannot_write_html(evidence):
    evil = copy.deepcopy(evidence)
    for key in ("title", "question", "told"):
        evil["probes"][0][key] = "<script>alert(1)</script>"
    report = evil["probes"][0]["report"]
    report["results"][0][report["columns"].index("of")] = "<script>alert(1)</script>"
    evil["causes"][0]["verdict"] = evil["checkpoint"] = "<script>alert(1)</script>"
    assert "<script" not in draw_evidence(evil).html()


@pytest.mark.parametrize("url, shown", [("report/rim-tiny", True), ("javascript:alert(1)", False), ("", False)])
def test_a_link_is_an_address_of_a_page(evidence, url, shown):
    assert ("<a href=" in draw_evidence(evidence, report_url=url).html()) == shown
