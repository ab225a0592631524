"""Addresses: what is looked at survives a restart, and whatever a stranger writes into a link is harmless."""

from urllib.parse import parse_qsl

import pytest

from app.runs import Run
from app.view import LONGEST, PANELS, Address, Looking, query


def read(text: str) -> Address:
    return Address.read(dict(parse_qsl(text.removeprefix("?"))))


def finished(**changes) -> Run:
    return Run(
        **{"checkpoint": "small", "question": "Ann has 3 & 4?", "gold": "7", "num_blocks": 5, "status": "done"}
        | changes
    )


@pytest.mark.parametrize("panel", PANELS)
def test_an_address_brings_back_question_model_k_panel_and_cell(panel):
    looking = Looking()
    looking.open(panel)
    looking.select({"mode": "tuned lens", "cell": "4.2.1"})
    back = read(query(finished(), looking, "small"))
    assert (back.model, back.question, back.gold, back.blocks) == ("small", "Ann has 3 & 4?", "7", 5)
    assert back.looking.panel == panel
    assert back.looking.view == ({} if panel == "race" else looking.view)


def test_every_panel_keeps_its_own_view():
    looking = Looking()
    for panel, layer in (("attention", "2"), ("layers", "5")):
        looking.open(panel)
        looking.select({"layer": layer})
    looking.open("attention")
    assert looking.view == {"layer": "2"}


def test_a_recorded_run_is_named_by_its_number_and_not_recomputed():
    address = query(finished(), Looking(), "small", recorded=2)
    assert "q=" not in address
    assert read(address).recorded == 2


def test_nothing_is_promised_of_a_run_that_was_stopped():
    assert query(finished(status="stopped"), Looking(), "small") == "?model=small"


@pytest.mark.parametrize(
    "text", ["?panel=../../etc&k=x&recorded=-1", "?k=99999&recorded=²", "?panel=<script>&v.=1&v.cell=<img>", ""]
)
def test_nonsense_in_an_address_is_ignored(text):
    address = read(text)
    assert (address.blocks, address.recorded, address.looking.panel) == (None, None, "race")


def test_an_address_cannot_hold_more_than_a_page_can_bear():
    address = Address.read({"q": "x" * 10**6, "panel": "layers"} | {f"v.{n}": "y" * 10**5 for n in range(100)})
    assert len(address.question) == LONGEST
    assert len(address.looking.view) <= 12
    assert all(len(value) <= LONGEST for value in address.looking.view.values())


@pytest.mark.parametrize("change", [None, "x", 3, ["mode"]])
def test_only_a_mapping_changes_a_view(change):
    looking = Looking("layers")
    looking.select(change)
    assert looking.view == {}
