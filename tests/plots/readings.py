"""Small readings with made-up numbers, for all panels."""

import copy
import json
import math
import re
from html import unescape

EVIL = "'\"><script>alert(1)</script>"


def decode(step, *nearest, accuracy=0.6):
    near = [{"step": text, "cosine": cosine, "gold": gold} for text, cosine, gold in nearest]
    return {"step": step, "cell": "layer 5", "accuracy": accuracy, "match": None, "nearest": near}


def cell(*entries):
    return [{"text": text, "score": score} for text, score in entries]


def readouts(values, chance=0.9):
    return [{"block": k, "text": v, "value": v, "probability": chance} for k, v in enumerate(values, 1)]


def told(values, chance=0.9, right=True):
    last = {"text": values[-1], "value": values[-1], "probability": chance, "right": right}
    return last | {"readouts": readouts(values, chance)}


def _lens():
    lens = {
        "name": "logit lens",
        "what": "What it would say.",
        "score_name": "probability",
        "layers": [0, 1, 2],
        "positions": [{"block": block, "position": place} for block in (1, 2) for place in (1, "end")],
        "cells": [[cell(("<<", 0.4), ("7", 0.1)) for _ in range(4)] for _ in range(3)],
        "control": "an untrained model",
        "control_cells": [[cell(("2", 0.3), ("7", 0.2)) for _ in range(4)] for _ in range(3)],
        "minus": [[cell(("9", 0.25), ("<<", -0.1)) for _ in range(4)] for _ in range(3)],
    }
    lens["cells"][1][2] = cell(("7", 0.9), ("5", 0.05))
    lens["control_cells"][0][0] = cell(("5", 0.5))
    return lens


def _depth():
    step = {
        "name": "nearest step",
        "what": "The nearest step.",
        "score_name": "cosine",
        "layers": [1, 2],
        "positions": [{"block": block, "position": "slots", "step": block, "fitted_layer": 2} for block in (1, 2)],
        "cells": [[cell(("<<3+4=7>>", 0.81)), cell(("<<7-2=5>>", -0.2))] for _ in range(2)],
        "control": None,
        "control_cells": None,
        "minus": None,
    }
    rank = {
        "value": "7",
        "step": 1,
        "what": "result of gold step 1",
        "layers": [0, 1, 2],
        "best": [40, 3.5, 1],
        "by_block": [[40, 9, 2], [50, 3.5, 1]],
        "control": [45, 20, 8],
        "control_name": "an untrained model",
    }
    return {"modes": [_lens(), step], "ranks": [rank, rank | {"value": "5", "step": 2}]}


def _attention():
    heads = [  # [layers 2][heads 2][blocks 2][words 3]
        [[[0.2, 0.6, 0.0], [0.4, 0.0, 0.2]], [[0.0, 0.4, 0.0], [0.0, 0.0, 0.0]]],
        [[[0.0, 0.2, 0.0], [0.0, 0.6, 0.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]],
    ]
    most = [[[max(a, b) for a, b in zip(*r, strict=True)] for r in zip(*layer, strict=True)] for layer in heads]
    mean = [[[0.1, 0.5, 0.0], [0.2, 0.0, 0.1]], [[0.0, 0.1, 0.0], [0.0, 0.3, 0.0]]]
    return {
        "tokens": ["ann", "3", "?"],
        "numbers": [False, True, False],
        "layers": 2,
        "heads": 2,
        "aggregation": "mean over the 2 slots of a block",
        "slots_to_tokens": {"mean over heads": mean, "max over heads": most, "per head": heads},
        "answer_to_blocks": [[[0.1, 0.0], [0.2, 0.7]], [[0.0, 0.0], [0.4, 0.2]]],
        "answer_to_tokens": [[[0.9, 0.0, 0.0], [0.0, 0.1, 0.0]], [[0.0, 1.0, 0.0], [0.4, 0.0, 0.0]]],
    }


_READING = {
    "format": "rim-probe-reading/1",
    "question": "Ann has 3 ?",
    "tokens": [],
    "num_blocks": 3,
    "num_layers": 2,
    "slots": 2,
    "gold": "5",
    "steps": ["<<3+4=7>>", "<<7-2=5>>"],
    "chain": {"text": "<<3+4=7>> <<7-2=5>> #### 5", "steps": ["<<3+4=7>>", "<<7-2=5>>"], "value": "5"},
    "readouts": [
        {"block": 1, "text": "7", "value": "7", "probability": 0.3, "right": False},
        {"block": 2, "text": "5", "value": "5", "probability": 0.64, "right": True},
        {"block": 3, "text": "5", "value": "5", "probability": 0.999, "right": True},
    ],
    "answer": {"text": "5", "value": "5", "probability": 0.999, "right": True},
    "provenance": {},
    "complaints": [],
    "probes": {
        # Block 1 holds step 1, block 2 step 1 where step 2 was asked for, block 3 nothing of the solution.
        "steps": {
            "blocks": [
                {
                    "block": 1,
                    **decode(1, ("<<3+4=7>>", 0.81, 1), ("<<3+5=8>>", 0.4, 0), ("<<1+1=2>>", 0.2, 0), accuracy=0.72),
                    "others": [decode(2, ("<<7-2=5>>", 0.5, 2))],
                },
                {
                    "block": 2,
                    **decode(2, ("<<3+4=7>>", 0.61, 1), ("<<7-2=5>>", 0.4, 2), ("<<1+1=2>>", 0.2, 0), accuracy=0.51),
                    "others": [],
                },
                {
                    "block": 3,
                    **decode(2, ("<<9-2=7>>", 0.31, 0), ("<<7-2=5>>", 0.3, 2), ("<<1+1=2>>", 0.2, 0)),
                    "others": [decode(1, ("<<3+4=7>>", 0.9, 1))],
                },
            ]
        },
        "words": {
            "blocks": [
                {"block": k, "memory": "5", "stage1": said, "carried": None} for k, said in ((1, "<<7-2=5>>"), (2, "5"))
            ]
        },
        "correctness": {
            "judge": "probe",
            "blocks": [{"block": k, "chance_right": chance} for k, chance in ((1, 0.1), (2, 0.7), (3, 0.93))],
            "chosen_block": 3,
        },
        "values": {
            "blocks": [
                {
                    "block": 1,
                    "values": [
                        {"step": 1, "quantity": "result", "value": "7", "confidence": 0.8, "accuracy": 0.65},
                        {"step": None, "quantity": "result", "value": "5", "confidence": 0.4, "accuracy": 0.9},
                    ],
                }
            ]
        },
        "attention": _attention(),
        "depth": _depth(),
        "importance": {
            "answer": "5",
            "log_probability": math.log(0.9),
            "layers": [0, 1],
            "blocks": [1, 2, 3],
            "change": [[0.0, -2.5, 0.04], [0.0, -0.2, 0.0]],
            "says": [[True, False, True], [True, True, True]],
        },
        "geometry": {
            "layer": 5,
            "blocks": [[0.0, 0.0, 1.0], [10.0, 0.0, 2.0], [10.0, 10.0, 3.0]],
            "depth_layers": [1, 2],
            "depth": [[[0, 0, 0], [1, 1, 1], [2, 2, 2]], [[4, 0, 0], [5, 1, 1], [6, 2, 2]]],
            "explained_blocks": [0.5, 0.2, 0.1],
            "explained_depth": [0.3, 0.2, 0.1],
            "cloud": {"points": [[0, 5], [20, 5], [5, 5]], "right": [True, False, True], "steps": [1, 2, 2], "n": 3},
            "mean_path": [[0.0, 0.0, 1.0], [8.0, 0.0, 1.5], [8.0, 6.0, 2.0]],
        },
    },
}


def reading():
    return copy.deepcopy(_READING)


def surgery():
    """Block 2 blanked: the answer becomes 6; with the control it stays."""
    return {
        "question": _READING["question"],
        "num_blocks": 3,
        "actions": {"2": "blank"},
        "layers": [1, 2],
        "partner": None,
        "unrelated": "what is 9 - 9 ?",
        "before": told(["7", "5", "5"]),
        "after": told(["7", "9", "6"], 0.6, False),
        "answer_changed": True,
        "changed_blocks": [2, 3],
        "answer_log_probability": {"before": math.log(0.9), "after": math.log(0.25)},
        "gold_probability": {"before": 0.9, "after": 0.25},
        "control": {
            "what": "block 2 taken from an unrelated question instead",
            "value": "5",
            "answer_changed": False,
            "answer_log_probability": math.log(0.8),
        },
    }


def counterfactual():
    return {
        "problem": {"question": "what is 3 + 4 - 2 ?", "steps": [], "answer": "5"},
        "partner": {"question": "what is 5 + 4 - 2 ?", "steps": [], "answer": "7"},
        "change": "3 → 5 in step 1",
        "blocks": [1],
        "claimed": "<<3+4=7>>",
        "brought": "<<5+4=9>>",
        "expected": "7",
        "own": "5",
        "said": "7",
        "outcome": "expected",
        "came": True,
        "surgery": surgery(),
        "control": {"what": "block 3 taken from the partner instead", "said": "5", "outcome": "own"},
    }


def everywhere(data, text):
    """The same data with `text` in the place of every text that is no key, mark or number."""
    if isinstance(data, dict):
        kept = ("ops", "outcome", "name", "score_name", "quantity", "format", "actions", "position")
        return {key: value if key in kept else everywhere(value, text) for key, value in data.items()}
    if isinstance(data, list):
        return [everywhere(value, text) for value in data]
    return text if isinstance(data, str) else data


def words(html):
    """What a reader sees of HTML."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).replace("\u00a0", " ").split())


def acts(html):
    """What its buttons ask the page for."""
    return [json.loads(found) for found in re.findall(r"data-do='([^']*)'", html)]
