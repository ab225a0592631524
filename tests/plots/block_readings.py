"""A small reading of two steps and three blocks, for the pictures of blocks and of the trajectory."""

import copy


def decode(step, *nearest, accuracy=0.6):
    return {
        "step": step,
        "cell": "layer 5",
        "accuracy": accuracy,
        "match": None,
        "nearest": [{"step": text, "cosine": cosine, "gold": gold} for text, cosine, gold in nearest],
    }


def reading():
    """Block 1 holds step 1, block 2 step 1 where step 2 was asked for, block 3 nothing of the solution."""
    return copy.deepcopy(_READING)


_READING = {
    "format": "rim-probe-reading/1",
    "question": "Ann has 3 apples and buys 4. She eats 2. How many are left?",
    "tokens": [],
    "num_blocks": 3,
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
                {"block": 1, "memory": "7", "stage1": "<<7-2=5>>", "carried": None},
                {"block": 2, "memory": "5", "stage1": "5", "carried": None},
                {"block": 3, "memory": "5", "stage1": "5", "carried": None},
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
