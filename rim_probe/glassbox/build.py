"""Writes the glass box as a checkpoint folder, and what its matched models are trained from.

Method:
1. OUTPUT gets the memory model, `base/` (the same model before its memory tokens are written) and `examples.json`, the
   first problems of a draw from the report split;
2. WORK gets every problem of the three splits as a file each, and `start/`: a Llama that nothing was taught yet, with
   the box's tokenizer, from which the recipes glass-cot.yaml and glass-direct.yaml set out.

The card, its figures, `cot/`, `direct/` and `probes/` come from commands of their own; the card names them.
"""

import json
from pathlib import Path

import torch

from rim_probe.gallery import EXAMPLES_FILE
from rim_probe.glassbox.box import CONTEXT, VOCABULARY, glassbox
from rim_probe.glassbox.problems import all_problems, draw_problems
from rim_probe.problems import write_problems
from rim_probe.training.scratch import small_llama, word_tokenizer

EXAMPLES = 9
SEED = 7  # of the examples
SIZE = {"layers": 3, "width": 96, "heads": 4, "inner": 192}  # of the models to be trained


def build(output: str | Path, work: str | Path) -> None:
    """Writes the checkpoint to `output` and the training material to `work`; what stands there already is replaced.

    Raises:
        OSError: a folder that cannot be written to.
    """
    output, work = Path(output), Path(work)
    box = glassbox().rim
    box.model.to(torch.bfloat16)  # loses nothing, see `box`, and halves the file
    box.save_pretrained(output)
    glassbox(trained=False).rim.save_pretrained(output / "base")
    examples = [
        {"question": problem.question, "steps": list(problem.steps), "answer": problem.answer}
        for problem in draw_problems(SEED, EXAMPLES, "report")
    ]
    (output / EXAMPLES_FILE).write_text(json.dumps(examples, indent=2) + "\n", encoding="utf-8")

    work.mkdir(parents=True, exist_ok=True)
    for split, problems in all_problems().items():
        write_problems(work / f"{split}.txt", problems)
    tokenizer = word_tokenizer(VOCABULARY)
    small_llama(tokenizer, **SIZE, context=CONTEXT, seed=0).save_pretrained(work / "start")
    tokenizer.save_pretrained(work / "start")
