"""`python -m rim_probe probe`: the whole run on a tiny random model; resumed, interrupted, and for one question."""

import pytest

from rim_probe.cli import main
from rim_probe.datasets.arithmetic import World, generate
from rim_probe.probing import run
from rim_probe.probing.artifacts import load_report
from rim_probe.probing.probes import PROBES
from rim_probe.probing.tables import format_headline
from rim_probe.problems import read_problems, write_problems

QUICK = "geometry"  # needs no answers and no controls of its own
QUESTION = "Ann has 3 apples. Ann buys 4 more apples. How many apples does Ann have now?"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problems")
    for name, split, rows in (("fit", "train", 60), ("choose", "valid", 30), ("report", "test", 40)):
        write_problems(folder / f"{name}.txt", generate(World(), split, rows, unique=True))
    return folder


def three(files) -> list[str]:
    names = {"--data": "report", "--fit": "fit", "--choose": "choose"}
    return [part for flag, name in names.items() for part in (flag, str(files / f"{name}.txt"))]


def complaint(capsys, *argv) -> str:
    assert main([str(part) for part in argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Traceback" not in error
    return error


def test_one_file_is_cut_in_three_and_leaves_a_report(small_checkpoint, files, tmp_path, capsys):
    out = tmp_path / "probes"
    assert (
        main(["probe", str(small_checkpoint), "--data", str(files / "fit.txt"), "--only", QUICK, "--output", str(out)])
        == 0
    )
    printed = capsys.readouterr().out
    reports, provenance = load_report(out)
    assert [report.name for report in reports] == [QUICK]
    assert {split: part["problems"] for split, part in provenance["data"].items()} == {
        "fit": 30,
        "choose": 12,
        "report": 18,
    }
    assert (
        PROBES[QUICK].title in printed and "memory tokens" in printed
    )  # the probe's tables, after the model's verdict
    assert "<html" in (out / "report.html").read_text(encoding="utf-8")
    assert not out.with_name("probes.run").exists()


def test_the_page_is_drawn_again_from_the_report_alone(small_checkpoint, files, tmp_path, capsys):
    out = tmp_path / "probes"
    assert main(["probe", str(small_checkpoint), *three(files), "--only", QUICK, "--output", str(out)]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    (out / "report.html").unlink()
    assert main(["probe", str(small_checkpoint), "--page", "--output", str(out)]) == 0
    assert (out / "report.html").read_text(encoding="utf-8") == page
    told = complaint(capsys, "probe", small_checkpoint, "--page", "--output", tmp_path / "p")
    assert "report.json is missing" in told


def test_what_is_done_is_not_done_again_and_other_data_is(small_checkpoint, files, tmp_path, monkeypatch):
    command = ["probe", str(small_checkpoint), "--only", QUICK, "--output", str(tmp_path / "probes")]
    asked = []
    original = PROBES[QUICK].run
    counting = run.PROBES | {
        QUICK: type(PROBES[QUICK])(**vars(PROBES[QUICK]) | {"run": lambda w: asked.append(1) or original(w)})
    }
    monkeypatch.setattr(run, "PROBES", counting)
    assert main([*command, *three(files)]) == 0 and len(asked) == 1
    assert main([*command, *three(files)]) == 0 and len(asked) == 1
    assert main([*command, *three(files), "--seed", "1"]) == 0 and len(asked) == 2
    assert main([*command, "--data", str(files / "fit.txt")]) == 0 and len(asked) == 3


def test_an_interrupted_run_keeps_what_is_done_and_goes_on(small_checkpoint, files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "probes"
    command = ["probe", str(small_checkpoint), *three(files), "--only", QUICK, "words", "--output", str(out)]

    def interrupted(workbench):
        raise KeyboardInterrupt

    stopped = run.PROBES | {QUICK: type(PROBES[QUICK])(**vars(PROBES[QUICK]) | {"run": interrupted})}
    with monkeypatch.context() as patch:
        patch.setattr(run, "PROBES", stopped)
        assert main(command) == 130
    assert [report.name for report in load_report(out)[0]] == ["words"]
    capsys.readouterr()
    assert main(command) == 0
    assert [report.name for report in load_report(out)[0]] == ["words", QUICK]


def test_a_probe_that_cannot_run_does_not_stop_the_others(small_checkpoint, files, tmp_path, capsys):
    command = ["probe", str(small_checkpoint), *three(files), "--output", str(tmp_path / "probes")]
    assert main([*command, "--only", "adaptive", QUICK]) == 0  # the checkpoint has no cot model
    said = capsys.readouterr()
    assert "adaptive was not run" in said.err and "Traceback" not in said.err
    assert QUICK in [report.name for report in load_report(tmp_path / "probes")[0]]
    assert main([*command, "--only", "adaptive"]) == 2
    assert capsys.readouterr().err.strip().endswith("the reasons stand above.")


def test_a_card_gets_the_targets_and_sentences(small_checkpoint, files, tmp_path, monkeypatch, capsys):
    card = tmp_path / "card.md"
    card.write_text("before\n<!-- probe -->\nold\n<!-- /probe -->\nafter\n", encoding="utf-8")
    out = ["--output", str(tmp_path / "probes"), "--card", str(card)]
    assert "--only" in complaint(capsys, "probe", small_checkpoint, *three(files), "--only", QUICK, *out)
    monkeypatch.setattr(run, "PROBES", {QUICK: PROBES[QUICK]})
    assert main(["probe", str(small_checkpoint), *three(files), *out]) == 0
    text = card.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- probe -->\n") and text.endswith("<!-- /probe -->\nafter\n")
    (report,), _ = load_report(tmp_path / "probes")
    assert format_headline(report) in text and "report 40" in text and "old" not in text


def test_one_question_before_and_after_probes_are_fitted(small_checkpoint, files, tmp_path, capsys):
    ask = [
        "probe",
        str(small_checkpoint),
        "--question",
        QUESTION,
        "--steps",
        "<<3+4=7>>",
        "--output",
        str(tmp_path / "p"),
    ]
    assert main(ask) == 0
    said = capsys.readouterr()
    assert "readout" in said.out and "gold steps: <<3+4=7>>" in said.out
    assert "Traceback" not in said.err and "steps, lens, values, correctness" in said.err
    # what is missing is named, the rest is shown


def test_mistakes_are_told_in_one_sentence(small_checkpoint, files, tmp_path, capsys):
    probe = ["probe", small_checkpoint, "--output", tmp_path / "p"]
    assert "--choose" in complaint(capsys, *probe, "--data", files / "report.txt", "--fit", files / "fit.txt")
    assert "'taste'" in complaint(capsys, *probe, *three(files), "--only", "taste")
    twice = [*probe, "--data", files / "fit.txt", "--fit", files / "fit.txt", "--choose", files / "choose.txt"]
    assert "other problems" in complaint(capsys, *twice)
    assert "never seen" in complaint(capsys, *probe, "--question", "How many zebras?")
    assert "outside" in complaint(capsys, *probe, "--question", QUESTION, "--steps", "3+4=7")
    assert "--output" in complaint(capsys, "probe", "owner/name", *three(files))


def test_a_question_in_two_files_is_never_reported_on(files, tmp_path):
    fit, report = (run.Source(name, read_problems(files / f"{name}.txt").problems) for name in ("fit", "report"))
    mixed = run.Source("mixed", [*report.problems, *fit.problems[:5]])
    given = {"report": mixed, "fit": fit, "choose": run.Source("c", read_problems(files / "choose.txt").problems)}
    sources, left_out = run.splits_of(given, seed=0)
    assert left_out == 5 and list(sources["report"].problems) == report.problems
