"""Which explicit step is each memory block nearest to?  python -m examples.nearest_step [PROBLEMS FIGURE.html]"""

import sys

import numpy as np
import pandas
import plotly.express as px
from sklearn.linear_model import Ridge

from rim_probe.datasets.arithmetic import World, generate
from rim_probe.model import RiM
from rim_probe.probing.bank import Reading, read_steps
from rim_probe.probing.study import Study

(n, page), world = sys.argv[1:] or (1500, "nearest-step.html"), World(min_steps=3, max_steps=3)
rim = RiM.from_pretrained("checkpoints/rim-tiny")
# Probes are fitted on "fit", what can be chosen is chosen on "choose", and only "report" (unseen phrasings) is told.
drawn = {"fit": ("train", int(n)), "choose": ("valid", int(n) // 3), "report": ("test", int(n) // 3)}
problems = {name: list(generate(world, split, rows, unique=True)) for name, (split, rows) in drawn.items()}
with Study({"memory": rim}, problems) as study:
    # How the model itself reads the steps when they are written out: states at their last tokens, [n, step, layer, d].
    read = {s: read_steps(rim, [Reading(p.question, p.steps) for p in study.problems(s)], study.layers) for s in drawn}
    texts = {s: np.array([p.steps for p in study.problems(s)]) for s in drawn}

    def found(split: str, layer: int, block: int | None, t: int) -> float:
        """Share of problems whose own step t is, of everybody's, the nearest to what a linear map makes of a block."""
        held = {s: study.capture("memory", s) for s in ("fit", split)}  # one forward pass per question, made once
        states = {s: held[s].cell(layer, block, "slots") if block else held[s].question_cell(layer) for s in held}
        steps = {s: np.array([problem[t][0, layer] for problem in read[s]]) for s in held}
        mean = steps["fit"].mean(0)  # what all steps share must not count as likeness
        guess = Ridge(alpha=10.0).fit(states["fit"], steps["fit"] - mean).predict(states[split])
        unit = (steps[split] - mean) / np.linalg.norm(steps[split] - mean, axis=1, keepdims=True)
        return float((texts[split][(guess @ unit.T).argmax(1), t] == texts[split][:, t]).mean())

    blocks = [*range(1, study.K + 1), None]  # None is the control: could the step be read before any memory block?
    layer = max(study.layers[1:], key=lambda layer: sum(found("choose", layer, b, t) for b in blocks for t in range(3)))
    shares = np.array([[found("report", layer, block, t) for t in range(3)] for block in blocks])
names = [f"block {block}" if block else "last question token" for block in blocks]
table = pandas.DataFrame(shares, names, ["step 1", "step 2", "step 3"])
title = f"Layer {layer}, n = {len(texts['report'])}, ± {98 / len(texts['report']) ** 0.5:.0f} points at most"
print(title, table.map("{:.0%}".format), sep="\n")
px.imshow(table, text_auto=".0%", title=title).write_html(page)
