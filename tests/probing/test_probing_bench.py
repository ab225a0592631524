"""The bench of probing: sides that agree, ratios, memory as the allocator tells it, the command; never a time."""

import json

import pytest
import torch
from conftest import tiny_rim

from rim_probe.cli import main
from rim_probe.probing import bench
from rim_probe.probing.capture import capture
from rim_probe.problems import Problem
from rim_probe.report import format_probing_bench

PROBLEMS = [
    Problem("Anna has 3 apples and buys 14 more. How many apples has she?", ("<<3+14=17>>",), "17"),
    Problem("3+4=?", ("<<3+4=7>>",), "7"),
    Problem("How many are 9 and 1?", ("<<9+1=10>>",), "10"),
]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_side_delivers_our_capture(family):
    rim = tiny_rim(family)
    questions = [problem.question for problem in PROBLEMS]
    with torch.inference_mode():
        expected = capture(rim, questions, num_blocks=3)
        for name, side in bench._sides(rim, 3).items():
            held = side(questions)
            assert (held.layers, held.question_ids) == (expected.layers, expected.question_ids), name
            for part, tensor in held.numpy().items():
                torch.testing.assert_close(
                    torch.tensor(tensor), torch.tensor(expected.numpy()[part]), atol=1e-4, rtol=1e-4
                )
    assert rim.model.config._attn_implementation == "sdpa"


def test_report(tmp_path):
    report = bench.run_probing_bench(tiny_rim(), PROBLEMS, num_blocks=2, batch_size=2, progress=False)
    json.dumps(report)
    assert (report["questions"], report["num_blocks"], report["batch_size"]) == (3, 2, 2)
    assert [entry["n"] for entry in report["ratios"]] == [6, 6, 6, 2, 2, 2, 3]  # two batches in three rounds
    assert (
        all(max(found.values()) < 1e-4 for found in report["differences"].values()) and len(report["differences"]) == 3
    )
    assert (report["sweep"]["layers"], report["sweep"]["blocks"], report["sweep"]["questions"]) == (2, 2, 3)
    assert report["sweep"]["difference"] < 1e-3
    everything = report["ratios"][3]
    assert everything["what"] == "peak memory: TransformerLens, everything / capture"
    assert everything["ratio"]["median"] > 5 and everything["met"]  # exact: no clock is involved
    text = format_probing_bench(report | {"checkpoint": "x", "command": "y"})
    assert text.count("\n| ") == 8 and "questions/s" in text and "MiB" in text


def test_peak_bytes_count_what_is_alive_at_once():
    kilobytes = lambda count: torch.empty(count, 256)  # noqa: E731

    def work():
        first = kilobytes(100)
        for _ in range(3):
            kilobytes(200)
        del first
        return kilobytes(50)

    before = kilobytes(1000)
    held, peak = bench._peak_bytes(torch.device("cpu"), work)
    assert peak == 300 * 1024 and held.shape == (50, 256) and before.shape == (1000, 256)


def test_the_command_writes_json_and_card(capsys, small_checkpoint, tmp_path):
    card, output = tmp_path / "card.md", tmp_path / "bench.json"
    card.write_text("before\n<!-- bench-probing -->\n<!-- /bench-probing -->\nafter\n", encoding="utf-8")
    options = ["--probing", "--questions", "2", "--num-blocks", "2", "--json", str(output), "--card", str(card)]
    assert main(["bench", str(small_checkpoint), *options]) == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["format"] == bench.PROBING_BENCH_FORMAT and report["checkpoint"] == str(small_checkpoint)
    table = capsys.readouterr().out
    assert table in card.read_text(encoding="utf-8") and "--probing" in table


def test_a_card_without_the_marks_of_probing_is_refused(capsys, small_checkpoint, tmp_path):
    card = tmp_path / "card.md"
    card.write_text("<!-- bench -->\n<!-- /bench -->\n", encoding="utf-8")
    assert main(["bench", str(small_checkpoint), "--probing", "--card", str(card)]) == 2
    assert "bench-probing" in capsys.readouterr().err
