"""An evaluation of several files: report, going on after a break, costs, tables and figures made from JSON alone."""

import json
import re
import shutil

import pytest
import torch

from rim_probe import comparison, costs, evaluation
from rim_probe.cli import main
from rim_probe.costs import BATCH_SIZES, median_interval
from rim_probe.decoding import answer, time_batch
from rim_probe.model import METHODS, load_methods
from rim_probe.options import name_files
from rim_probe.plots import comparison as measures
from rim_probe.plots.comparison import draw_measures
from rim_probe.probing.evidence import load_evidence
from rim_probe.report import format_report, relative_accuracy

QUESTIONS = ["1 + 1?", "How many apples has she?", "3 + 14?", "more more more 5", "Anna has 3 apples?", "Has she 14?"]
FAST = ["--max-new-tokens", "4", "--latency-samples", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Three tiny random models: memory, cot and direct."""
    from conftest import tiny_rim

    folder = tmp_path_factory.mktemp("checkpoint") / "three"
    for seed, place in enumerate((folder, folder / "cot", folder / "direct")):
        tiny_rim(num_blocks=2, seed=seed).save_pretrained(place)
    return folder


@pytest.fixture(scope="module")
def data(checkpoint, tmp_path_factory):
    """Two files; random models are never right, so the gold answer is what one of them says."""
    folder = tmp_path_factory.mktemp("data")
    models = load_methods(checkpoint, "cpu")
    lines = []
    for i, question in enumerate(QUESTIONS):
        method = ("memory", "direct", "cot")[i % 3]
        value = answer(models[method], question, method, max_new_tokens=4).value or "7"
        lines.append((question, "<<1+1=2>>" * (1 + i % 2), value))
    steps = folder / "steps.txt"
    steps.write_text("".join(f"{q}||{' '.join(re.findall('<<.*?>>', s))} #### {v}\n" for q, s, v in lines))
    bare = folder / "bare.txt"
    bare.write_text("".join(f"{q}|| #### {v}\n" for q, _, v in lines[:4]))
    return [f"GSM8K={steps}", f"GSM-Hard={bare}"]


def compare(checkpoint, data, folder, *options):
    """Runs the command; returns the exit code and, if it was written, the report."""
    output = folder / "metrics.json"
    command = ["eval", str(checkpoint), "--data", *data, "--output", str(output), *FAST, *options]
    code = main([str(word) for word in command])
    return code, json.loads(output.read_text()) if output.exists() else None


@pytest.fixture(scope="module")
def report(checkpoint, data, tmp_path_factory):
    code, report = compare(checkpoint, data, tmp_path_factory.mktemp("out"))
    assert code == 0
    return report


def told(report):
    return [{key: entry["report"][key] for key in ("accuracy", "paired", "sweep")} for entry in report["files"]]


# ----------------------------------------------------------------------------------------------------------- the report


def test_each_file_has_the_report_it_would_have_alone(report, checkpoint, data, tmp_path):
    assert [entry["name"] for entry in report["files"]] == ["GSM8K", "GSM-Hard"]
    single = tmp_path / "single.json"
    assert main(["eval", str(checkpoint), "--data", data[0].partition("=")[2], "--output", str(single), *FAST]) == 0
    alone = json.loads(single.read_text())
    assert alone["files"][0]["name"] == "steps" and told(alone) == told(report)[:1]
    assert report["files"][0]["report"]["accuracy"]["memory"]["all"]["final"]["right"] > 0
    assert set(report["run"]["fingerprints"]) == set(METHODS)


def test_a_report_alone_makes_the_same_tables_and_figures(report, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rim_probe.model.load_methods", lambda *a, **o: pytest.fail("a model was loaded"))
    stored, card, figures = tmp_path / "m.json", tmp_path / "docs" / "CARD.md", tmp_path / "figures"
    stored.write_text(json.dumps(report))
    card.parent.mkdir()
    card.write_text("above\n<!-- eval -->\nold\n<!-- /eval -->\nbelow\n")
    assert main(["eval", "--from", str(stored), "--card", str(card), "--figures", str(figures)]) == 0
    printed, written = capsys.readouterr().out, card.read_text()
    assert printed == format_report(report)
    assert written.startswith("above\n<!-- eval -->\n") and written.endswith("<!-- /eval -->\nbelow\n")
    for name in draw_measures(report):
        assert (figures / f"{name}.html").exists() and f"(../figures/{name}.html)" in written


# ------------------------------------------------------------------------------------------------------------- going on


def test_a_broken_run_goes_on_where_it_was(report, checkpoint, data, tmp_path, monkeypatch, capsys):
    real, calls = evaluation.answer_batch, []

    def breaks(*arguments, **options):
        calls.append(arguments[1])
        if len(calls) == 28:  # five arms: the first file is 25 (five groups of one batch of one question), and so on
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(evaluation, "GROUP_BATCHES", 1)
    monkeypatch.setattr(evaluation, "answer_batch", breaks)
    one_by_one = ("--batch-size", "1")
    code, nothing = compare(checkpoint, data, tmp_path, *one_by_one)
    printed = capsys.readouterr()
    assert code == 130 and nothing is None
    assert "Interrupted: GSM8K 5 of 6 problems done" in printed.out and "the same command goes on" in printed.err
    partial = tmp_path / "metrics.json.partial"
    kept = partial.read_text()

    def asked_again():
        monkeypatch.setattr(evaluation, "answer_batch", lambda *a, **o: (calls.append(a[1]), real(*a, **o))[1])
        calls.clear()
        return compare(checkpoint, data, tmp_path, *one_by_one)

    code, whole = asked_again()
    assert code == 0 and told(whole) == told(report)
    assert len(calls) == 5 * (6 + 4) - 25 and not partial.exists()
    partial.write_text(kept[:-40])  # cut off
    assert asked_again()[0] == 0 and len(calls) == 5 * (6 + 4)
    partial.write_text(kept.replace('"seed": 0', '"seed": 1'))  # other settings
    assert asked_again()[0] == 0 and len(calls) == 5 * (6 + 4)


def test_other_weights_are_asked_anew(checkpoint, data, tmp_path, monkeypatch, make_rim):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)

    def breaks(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(costs, "time_batch", breaks)
        assert compare(copy, data, tmp_path)[0] == 130
    make_rim(num_blocks=2, seed=9).save_pretrained(copy / "cot")
    asked, real = [], evaluation.answer_batch
    monkeypatch.setattr(evaluation, "answer_batch", lambda *a, **o: (asked.append(a), real(*a, **o))[1])
    assert compare(copy, data, tmp_path)[0] == 0 and asked


def test_a_break_before_the_report_loses_no_card_and_no_figure(checkpoint, data, tmp_path, monkeypatch):
    card = tmp_path / "CARD.md"
    card.write_text("<!-- eval -->\n<!-- /eval -->\n")
    wanted = ("--card", card, "--figures", tmp_path / "figures")

    def breaks(report):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measures, "draw_measures", breaks)
        assert compare(checkpoint, data, tmp_path, *wanted) == (130, None)
    monkeypatch.setattr(evaluation, "answer_batch", lambda *a, **o: pytest.fail("asked again"))
    code, report = compare(checkpoint, data, tmp_path, *wanted)
    assert code == 0 and report and "| RiM, final block" in card.read_text()
    assert (tmp_path / "figures" / "costs.html").exists() and not (tmp_path / "metrics.json.partial").exists()


def test_costs_go_on_too(checkpoint, data, tmp_path, monkeypatch):
    real, calls = costs.time_batch, []

    def breaks(*arguments, **options):
        calls.append(1)
        if len(calls) == 6 + 3 + 2:  # two warm-ups and the first turn of three methods, then the second turn
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(costs, "time_batch", breaks)
    assert compare(checkpoint, data, tmp_path)[0] == 130
    kept = json.loads((tmp_path / "metrics.json.partial").read_text())["costs"]["cpu"]
    assert [len(turns) for turns in kept] == [1, 0]
    monkeypatch.setattr(costs, "time_batch", real)
    monkeypatch.setattr(evaluation, "answer_batch", lambda *a, **o: pytest.fail("asked again"))
    code, whole = compare(checkpoint, data, tmp_path)
    assert code == 0 and [batch["n"] for batch in whole["costs"][0]["batches"]] == [2, 1]


# ---------------------------------------------------------------------------------------------------------------- costs


def test_costs_of_both_batch_sizes(report):
    [place] = report["costs"]
    assert place["device"] == "cpu" and place["machine"]["cpu"]
    assert [batch["batch_size"] for batch in place["batches"]] == list(BATCH_SIZES)
    one, many = (batch["methods"] for batch in place["batches"])
    for method in METHODS:
        for batch in (one, many):
            assert batch[method]["total_ms"]["median"] > 0
            assert 1 <= batch[method]["forward_passes"]["median"] <= 4
        assert many[method]["kv_cache_bytes"]["median"] > one[method]["kv_cache_bytes"]["median"]
        if many[method]["ttft_ms"]:
            assert many[method]["ttft_ms"]["median"] <= many[method]["total_ms"]["median"]
    ratios = [(r["of"], r["first"], r["second"]) for r in place["batches"][0]["ratios"]]
    assert ("ttft_ms", "cot", "memory") in ratios and ("ttft_ms", "memory", "direct") in ratios


@pytest.mark.parametrize("method", METHODS)
def test_a_timed_batch_answers_as_each_alone(rim, method):
    limits = [1, 9, 2, 9, 3, 9]  # rows end at different times, so some leave the batch
    batch = time_batch(rim, QUESTIONS, method, max_new_tokens=limits)
    for question, limit, given, first in zip(QUESTIONS, limits, batch.answers, batch.ttft_seconds, strict=True):
        alone = answer(rim, question, method, max_new_tokens=limit, readouts="final")
        assert (given.text, given.token_ids, given.truncated) == (alone.text, alone.token_ids, alone.truncated)
        assert (first is None) == (alone.ttft_seconds is None)
        assert first is None or first in batch.pass_seconds
    assert list(batch.pass_seconds) == sorted(batch.pass_seconds) and batch.pass_seconds[-1] <= batch.total_seconds
    assert len(batch.pass_seconds) == max(len(given.token_ids) for given in batch.answers)


@pytest.mark.parametrize(
    ("n", "ranks"),  # of the lower and upper end; Conover, Practical Nonparametric Statistics, the sign test's table
    [(5, None), (6, (1, 6)), (8, (1, 8)), (9, (2, 8)), (20, (6, 15)), (50, (18, 33))],
)
def test_the_interval_of_a_median_is_that_of_the_sign_test(n, ranks):
    assert median_interval([float(i) for i in range(n, 0, -1)]) == (ranks or (None, None))


# --------------------------------------------------------------------------------------------------- what is said of it


def pair(both, first, other, neither):
    p_value = evaluation.mcnemar_p(first, other)
    counts = {"both_right": both, "only_first": first, "only_second": other, "both_wrong": neither}
    return {"first": "memory", "second": "cot", "n": sum(counts.values()), "p_value": p_value, **counts}


@pytest.mark.parametrize(
    ("counts", "ratio"),
    [
        # 4 of 42 against 16 of 42, two in both: 0.25 times or divided by exp(1.96 * sqrt(16 / (4 * 16))).
        ((2, 2, 14, 24), (0.250, 0.0938, 0.6661)),
        ((80, 2, 3, 115), (82 / 83, None, None)),  # too few discordant problems
        ((0, 0, 60, 140), (0.0, None, None)),
        ((0, 0, 0, 200), (None, None, None)),
    ],
)
def test_relative_accuracy_has_the_interval_of_paired_proportions(counts, ratio, report):
    assert relative_accuracy(pair(*counts)) == pytest.approx(ratio, abs=1e-3)
    edited = json.loads(json.dumps(report))
    edited["files"][0]["report"]["paired"] = [pair(*counts)]
    assert "McNemar" in format_report(edited)


# -------------------------------------------------------------------------------------------------------------- figures


def test_figures_hold_the_numbers_of_the_report(report):
    drawn = draw_measures(report)
    assert list(drawn) == ["accuracy-by-blocks", "accuracy-by-steps", "costs"]
    blocks = [line for line in drawn["accuracy-by-blocks"][1].data if line.name == "RiM"]
    for line, entry in zip(blocks, report["files"], strict=True):
        sweep = entry["report"]["sweep"]
        assert list(line.y) == [one["accuracy"] for one in sweep]
        assert list(line.error_y.array) == pytest.approx([one["high"] - one["accuracy"] for one in sweep])
    assert len(drawn["accuracy-by-steps"][1].data) == 3  # one of the two files states no steps
    assert {line.name for line in drawn["costs"][1].data} == {"RiM", "direct", "chain of thought"}


# --------------------------------------------------------------------------------------------------- mistakes, evidence


def test_files_are_named_by_their_stem_or_as_asked(tmp_path):
    odd = tmp_path / "a=b.txt"
    odd.touch()
    assert name_files(["x/test.txt.gz", "GSM-Hard=y/hard.txt"]) == {"test": "x/test.txt.gz", "GSM-Hard": "y/hard.txt"}
    assert name_files([str(odd)]) == {"a=b": str(odd)}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{box}", "--data", "A={file}", "A={file}"], "Two files are called A"),
        (["{box}", "--data", "={file}"], "is no NAME=FILE"),
        (["{box}", "--data", "A={file}", "--cost-devices", "nonsense"], "'nonsense' cannot be used here"),
        (["--data", "A={file}"], "Give a CHECKPOINT and --data"),
        (["{box}"], "--data"),
        (["{box}", "--from", "{file}"], "leave out CHECKPOINT"),
        (["--from", "{file}"], "is no JSON"),
        (["--from", "{box}/config.json"], "is no report of an evaluation"),
        (["--from", "{box}/none.json"], "cannot be read"),
        (["{box}", "--data", "A={file}", "--card", "{card}"], "lacks the lines <!-- eval -->"),
    ],
)
def test_mistakes_are_told_in_one_sentence(arguments, told, checkpoint, data, tmp_path, capsys):
    card = tmp_path / "README.md"
    card.write_text("<!-- bench -->\n<!-- /bench -->\n")
    places = {"box": checkpoint, "file": data[0].partition("=")[2], "card": card}
    assert main(["eval", *(word.format(**places) for word in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and told in captured.err and "Traceback" not in captured.err


def test_a_report_edited_by_hand_is_told_in_one_sentence(report, tmp_path, capsys):
    (tmp_path / "m.json").write_text(json.dumps({**report, "files": [{"name": "GSM8K"}]}))
    assert main(["eval", "--from", str(tmp_path / "m.json")]) == 2
    assert capsys.readouterr().err.strip().endswith("lacks parts of a report; have it measured anew.")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_costs_on_a_missing_gpu_are_refused_before_the_work(checkpoint, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "evaluate", lambda *a, **o: pytest.fail("the work was begun"))
    assert compare(checkpoint, data, tmp_path, "--cost-devices", "cpu", "cuda")[0] == 2
    assert "There is no cuda on this machine" in capsys.readouterr().err


def test_the_evidence_panel_reads_a_comparison(report, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(report))
    metrics = load_evidence(tmp_path)["metrics"]
    first, other = (entry["report"] for entry in report["files"])
    assert metrics["data"] == "GSM8K" and metrics["n"] == first["done"]
    assert metrics["accuracy"][0]["all"]["value"] == first["accuracy"]["memory"]["all"]["final"]["accuracy"]
    single = report["costs"][0]["batches"][0]["methods"]
    assert {one["method"]: one["total_ms"] for one in metrics["latency"]} == {
        m: c["total_ms"] for m, c in single.items()
    }
    [there] = metrics["others"]
    assert there["name"] == "GSM-Hard" and there["n"] == other["done"]
    from rim_probe.plots.evidence import draw_evidence

    shown = draw_evidence(load_evidence(tmp_path)).html()
    assert "problems of GSM8K" in shown and "GSM-Hard, n = 4" in shown


def test_the_place_of_the_readout_and_shallow_baselines_stand_beside_the_accuracy(report, checkpoint, data, tmp_path):
    placed = report["files"][0]["report"]["placed"]
    assert [(one["place"], one["num_blocks"], one["n"]) for one in placed[:2]] == [
        ("lone end", 1, 6),
        ("lone end", 2, 6),
    ]
    assert {one["place"] for one in placed} == {"lone end", "one block", "one position"}
    assert report["files"][0]["report"]["chains"]["memory"]["clusters"] == 2
    text = format_report(report)
    assert "control: lone end (n = 6)" in text and "over 2 chains" in text and "last number" in text
    code, fitted = compare(checkpoint, data, tmp_path, "--placed", "0", "--baselines", data[0].partition("=")[2])
    assert code == 0 and not fitted["files"][0]["report"]["placed"]
    assert set(fitted["files"][0]["report"]["baselines"]) == {
        "last number",
        "keyword rules",
        "majority",
        "bag of words",
    }


def test_an_interval_over_clusters_is_wider_where_they_agree():
    outcomes = [i % 4 < 2 for i in range(400)]
    own = evaluation.cluster_interval(outcomes, [str(i) for i in range(400)])
    shared = evaluation.cluster_interval(outcomes, [str(i % 4) for i in range(400)])
    assert own["clusters"] == 400 and shared["clusters"] == 4
    assert shared["high"] - shared["low"] > 3 * (own["high"] - own["low"])
