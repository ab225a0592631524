"""Probes of a model of SmolLM2's size: small enough to lie beside it, and still saying what they said."""

import json

import numpy as np
import pytest
import torch
from planted import PlantedStudy, chains

from rim_probe.errors import RiMError
from rim_probe.probing import artifacts, compact
from rim_probe.probing import lens as lens_module
from rim_probe.probing.adaptive import HALF_TIME, WITHIN_POINT, AdaptivePolicy
from rim_probe.probing.artifacts import load_report, load_results, save_artifact, save_report
from rim_probe.probing.compact import PLAIN_BYTES, is_large, packed, rounded, unpacked
from rim_probe.probing.correctness import MEMORY, MEMORY_OWN, MEMORY_READOUTS, PROBE, PROBE_OWN, CorrectnessProbe
from rim_probe.probing.judge import Judge, cells
from rim_probe.probing.lens import VocabularyLens, pack_factors
from rim_probe.probing.linear import LinearMap
from rim_probe.probing.nearest_step.fit import BlockMap, StepDecoder
from rim_probe.probing.nearest_step.formula import DIRECTIONS, Bank, StepMap
from rim_probe.probing.results import Estimate, Report, Result
from rim_probe.probing.values import ValueProbes

LAYERS, WIDTH, BLOCKS, SLOTS = tuple(range(31)), 576, 8, 2  # SmolLM2-135M with K = 8, M = 2
LIMIT = 12_000_000  # of what is fitted; the report beside it takes as much again
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, dtype=np.float32)


def size(tensors) -> int:
    return sum(array.nbytes for array in tensors.values())


def test_eight_bits_keep_an_array_to_a_hundredth_and_zeros_as_they_are():
    array = normal(7, 33, 5) * np.geomspace(1e-6, 1e3, 7, dtype=np.float32)[:, None, None]
    back = rounded(array)
    assert back.shape == array.shape and back.dtype == np.float32
    assert np.linalg.norm(back - array) < 0.01 * np.linalg.norm(array)
    assert not rounded(np.zeros((3, 4))).any() and rounded(np.zeros((0, 4))).shape == (0, 4)
    assert size(packed("a", array)) < 0.3 * array.nbytes + 16
    np.testing.assert_array_equal(unpacked({"a": array}, "a"), array)  # what was not packed is as it was
    np.testing.assert_allclose(rounded(back), back, rtol=1e-5)  # what is used after fitting comes back from disk
    small = [np.zeros(PLAIN_BYTES // 4, np.float16)]
    assert not is_large(small) and is_large([*small, np.zeros(1)])


# ---------------------------------------------------------------------------------------------------------------- lens


def test_a_large_lens_is_fitted_stored_and_restored_in_low_rank(monkeypatch, rim):
    monkeypatch.setattr(compact, "PLAIN_BYTES", 1024)
    monkeypatch.setattr(lens_module, "RANK", 4)
    splits = {split: chains(60, seed) for seed, split in enumerate(("fit", "choose", "report"))}
    states = {("memory", split): normal(60, 3, 2, 2, 32) for split in splits}
    lens = VocabularyLens.fit(PlantedStudy({"memory": rim}, splits, states), steps=30)
    again = VocabularyLens.restore(lens.tensors(), lens.settings(), rim)
    probe = normal(5, 32)
    torch.testing.assert_close(again.logits(probe, 1), lens.logits(probe, 1))
    assert not torch.allclose(lens.logits(probe, 1), lens.logits(probe, 1, "logit")), "a translator was fitted"
    assert size(lens.tensors()) < 4 * lens.weights.numel() / 2
    assert lens.history["rank"] == 4 and len(lens.history["choose_kl of that rank"]) == 2


# ------------------------------------------------------------------------------------------------------- the whole size


def judges() -> CorrectnessProbe:
    found = {}
    for name, view, readouts in (
        (PROBE, "both", "none"),
        (PROBE_OWN, "both", "own"),
        (MEMORY, "memory", "none"),
        (MEMORY_OWN, "memory", "own"),
        (MEMORY_READOUTS, "memory", "all"),
    ):
        seen = len(cells(view, LAYERS, BLOCKS)[0])
        features = seen * (SLOTS + 1) * WIDTH + ("none", "own", "all").index(readouts)
        found[name] = Judge(
            view, readouts, LAYERS, rounded(normal(BLOCKS, features)), normal(BLOCKS).astype(float), 0.1
        )
    scores = {PROBE: 0.5, PROBE_OWN: 0.55, MEMORY: 0.6, MEMORY_OWN: 0.7, MEMORY_READOUTS: 0.8}
    return CorrectnessProbe(found, MEMORY_READOUTS, ("fit", "choose"), scores)


def policy(probe: CorrectnessProbe) -> AdaptivePolicy:
    thresholds = {score: {WITHIN_POINT: 0.5, HALF_TIME: 0.4} for score in ("judge", "own")}
    return AdaptivePolicy(probe.quick_judge, thresholds, probe.splits)


def test_a_judge_is_stored_once_and_found_beside_the_policy():
    probe = judges()
    made = policy(probe)
    again = AdaptivePolicy.restore(made.tensors(), made.settings(), lambda: probe)
    assert again.judge is probe.quick_judge and again.thresholds == made.thresholds
    assert size(made.tensors()) < 1000
    with pytest.raises(RiMError, match="another one"):
        AdaptivePolicy.restore(made.tensors(), made.settings(), judges)


def values(count: int) -> ValueProbes:
    reads = [
        {"quantity": str(i), "choose_accuracy": [0.5 + i / 100] * BLOCKS, "majority": 0.4, "covered": 1.0}
        for i in range(count)
    ]
    probes = [[LinearMap(normal(SLOTS * WIDTH, 9), normal(9)) for _ in range(BLOCKS)] for _ in range(count)]
    return ValueProbes(reads, probes)


def test_of_many_large_value_probes_those_stay_that_say_most():
    probes = values(30)
    again = ValueProbes.restore(probes.tensors(), probes.settings())
    kept = [int(read["quantity"]) for read in again.reads]
    assert 3 < len(kept) < 30 and kept == list(range(30 - len(kept), 30))
    np.testing.assert_allclose(again.probes[0][0].weights, probes.probes[kept[0]][0].weights, atol=0.05)
    assert len(values(2).tensors()) == 4, "few are stored whole"


def test_everything_fitted_for_a_model_of_smollm2s_size_stays_small():
    pairs = normal(len(LAYERS) - 1, 2, lens_module.RANK, WIDTH)
    bank = Bank(("",) * 8_000, normal(8_000, WIDTH))
    to_directions = LinearMap(normal(SLOTS * WIDTH, DIRECTIONS), normal(DIRECTIONS))
    mapped = BlockMap(15, StepMap(to_directions, normal(WIDTH, DIRECTIONS)), 0.5, 0.5, 1.0)
    maps = {(block, step): mapped for block in range(1, BLOCKS + 1) for step in range(1, 6)}
    probe = judges()
    sizes = {
        "lens": size(pack_factors(pairs)),
        "steps": size(StepDecoder(bank, maps, {}, 20).tensors()),
        "correctness": size(probe.tensors()),
        "adaptive": size(policy(probe).tensors()),
        "values": size(values(30).tensors()),
    }
    assert sum(sizes.values()) < LIMIT, sizes


def test_long_reports_are_packed_and_come_back(tmp_path, monkeypatch):
    """That of a probe with six digits, those of all probes as they are."""
    monkeypatch.setattr(artifacts, "LARGE_PROBE", 10_000)
    monkeypatch.setattr(artifacts, "LARGE_REPORT", 10_000)
    numbers = RNG.random(500).tolist()
    results = [Result("m", "a", Estimate(x, x, x, 3), place={"layer": i}) for i, x in enumerate(numbers)]
    report, small = Report("steps", results, {"report": 3}), Report("words", results[:5], {})
    save_artifact(tmp_path, "steps", {}, {}, provenance := {"fingerprint": "f", "layout": {}}, report=report)
    save_artifact(tmp_path, "words", {}, {}, provenance, report=small)
    found = load_results(tmp_path, "steps").frame()
    assert found.value.tolist() == pytest.approx(numbers, rel=1e-5) and found["at layer"].tolist() == list(range(500))
    assert load_results(tmp_path, "words") == small
    path, plain = save_report(tmp_path, [report, small], {"seed": 0}), json.dumps(report.to_dict())
    (steps, words), provenance = load_report(tmp_path)
    assert steps.frame().value.tolist() == pytest.approx(numbers, rel=1e-5) and words == small
    assert provenance == {"seed": 0} and '"words"' in path.read_text()
    assert all(file.stat().st_size < len(plain) / 2 for file in (path, tmp_path / "steps.json"))
