"""Writes the glass box as a checkpoint folder, and what its matched models are trained from.

Method:
1. OUTPUT gets the memory model, `base/` (the same model before its memory tokens are written) and `examples.json`, the
   first problems of a draw from the report split on which a counterfactual can be tried for every block: no number
   repeats, so that it is certain what follows from a change. They are chosen by what can be asked, not by what comes
   out;
2. WORK gets every problem of the three splits as a file each, and `start/`: a Llama that nothing was taught yet, with
   the box's tokenizer, from which the recipes glass-cot.yaml and glass-direct.yaml set out.

The card, its figures, `cot/`, `direct/` and `probes/` come from commands of their own; the card names them.
"""

import itertools
import json
from pathlib import Path

import torch

from rim_probe.errors import RiMError
from rim_probe.gallery import EXAMPLES_FILE
from rim_probe.glassbox.box import CONTEXT, LAYOUT, VOCABULARY, glassbox
from rim_probe.glassbox.problems import all_problems, draw_problems, parts
from rim_probe.model import RiM
from rim_probe.probing.trial import try_counterfactual
from rim_probe.problems import Problem, write_problems
from rim_probe.trained_on import TrainedOn
from rim_probe.training.scratch import small_llama, word_tokenizer

EXAMPLES = 9
SEED = 7  # of the examples
DRAWN = 300  # problems that the examples are looked for in
SIZE = {"layers": 3, "width": 96, "heads": 4, "inner": 192}  # of the models to be trained


def build(output: str | Path, work: str | Path) -> None:
    """Writes the checkpoint to `output` and the training material to `work`; what stands there already is replaced.

    Raises:
        OSError: a folder that cannot be written to.
    """
    output, work = Path(output), Path(work)
    box = glassbox().rim
    box.model.to(torch.bfloat16)  # loses nothing, see `box`, and halves the file
    problems = all_problems()
    box.trained_on = TrainedOn.of(list(itertools.chain.from_iterable(problems.values())), closed=True)
    box.save_pretrained(output)
    glassbox(trained=False).rim.save_pretrained(output / "base")
    examples = [
        {"question": problem.question, "steps": list(problem.steps), "answer": problem.answer}
        for problem in _examples(box)
    ]
    (output / EXAMPLES_FILE).write_text(json.dumps(examples, indent=2) + "\n", encoding="utf-8")

    work.mkdir(parents=True, exist_ok=True)
    for split, held in problems.items():
        write_problems(work / f"{split}.txt", held)
    tokenizer = word_tokenizer(VOCABULARY)
    small_llama(tokenizer, **SIZE, context=CONTEXT, seed=0).save_pretrained(work / "start")
    tokenizer.save_pretrained(work / "start")


def _examples(rim: RiM) -> list[Problem]:
    drawn = (problem for problem in draw_problems(SEED, DRAWN, "report") if _all_different(problem))
    return list(itertools.islice((problem for problem in drawn if _can_be_tried(rim, problem)), EXAMPLES))


def _all_different(problem: Problem) -> bool:
    """Whether the start, the numbers and the results are seven different ones, none of them 0."""
    steps = [parts(step) for step in problem.steps]
    numbers = {steps[0][0]} | {right for _, _, right, _ in steps} | {result for *_, result in steps}
    return len(numbers) == 1 + 2 * len(steps) and 0 not in numbers


def _can_be_tried(rim: RiM, problem: Problem) -> bool:
    """Whether every block's step has a partner question that differs in one number of it; whatever the model says."""
    try:
        for block in range(1, LAYOUT.num_blocks + 1):
            try_counterfactual(rim, problem, None, block=block)
    except RiMError:
        return False
    return True
