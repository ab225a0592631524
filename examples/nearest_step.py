"""Which explicit step is each memory block nearest to?  python -m examples.nearest_step [PROBLEMS FIGURE.html]"""

import sys

import numpy as np
import pandas
import plotly.express as px
from sklearn.linear_model import Ridge

from rim_probe.datasets.arithmetic import World, generate
from rim_probe.model import RiM
from rim_probe.probing.nearest_step.formula import read_steps
from rim_probe.probing.study import SPLITS, Study, split_problems

n, page = sys.argv[1:] or (4000, "nearest-step.html")
rim = RiM.from_pretrained("checkpoints/rim-tiny")
# Problems of three steps. A probe is fitted on one half, its layer is chosen on a fifth, only the rest is reported.
with Study({"memory": rim}, split_problems(list(generate(World(3, 3), "test", int(n), unique=True)))) as study:
    asked = {s: [(p.question, p.steps[:t], [p.steps[t]]) for p in study.problems(s) for t in range(3)] for s in SPLITS}
    read = {s: np.stack(read_steps(rim, asked[s], study.layers)) for s in SPLITS}  # as the model reads them

    def found(split: str, layer: int, block: int | None, t: int) -> float:
        """Share of problems whose own step t is, of everybody's, the nearest to what a linear map makes of a block."""
        held = {s: study.capture("memory", s) for s in ("fit", split)}  # one forward pass per question, made once
        states = [x.cell(layer, block, "slots") if block else x.question_cell(layer) for x in held.values()]
        steps = {s: read[s][t::3, 0, layer] for s in held}
        mean = steps["fit"].mean(0)  # what all steps share must not count as likeness
        guess = Ridge(alpha=10.0).fit(states[0], steps["fit"] - mean).predict(states[1])
        unit = (steps[split] - mean) / np.linalg.norm(steps[split] - mean, axis=1, keepdims=True)
        texts = np.array([problem.steps[t] for problem in study.problems(split)])
        return float((texts[(guess @ unit.T).argmax(1)] == texts).mean())

    # The last question token is the control: could the step be read before any memory block?
    places = {f"block {k}": k for k in range(1, study.K + 1)} | {"last question token": None}
    layer = max(study.layers, key=lambda x: sum(found("choose", x, b, t) for b in places.values() for t in range(3)))
    shares = {f"step {t + 1}": {name: found("report", layer, b, t) for name, b in places.items()} for t in range(3)}
title = f"Layer {layer}, n = {(n := len(study.problems('report')))}, ± {98 / n**0.5:.0f} points at most"
print(title, pandas.DataFrame(shares).map("{:.0%}".format), sep="\n")
px.imshow(pandas.DataFrame(shares), text_auto=".0%", title=title).write_html(page)
