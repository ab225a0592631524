"""Training in bfloat16 beside float32 on this machine: speed as ratios within one run, and the losses of equal steps.

    python -m benchmarks.training RECIPE [--steps 30] [--output FILE.json]

Both precisions train the same batches of the recipe's first stage from the same weights. Their steps take turns, so a
machine that gets slower in between is the same for both. The share of the matrix rate counts as `training.speed` does.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from rim_probe.precision import matrix_rate
from rim_probe.training.recipe import load_recipe
from rim_probe.training.run import make_trainers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    plan = load_recipe(arguments.recipe)
    sides = {}
    for precision in ("float32", "bfloat16"):
        attention = "auto" if precision == "bfloat16" else "sdpa"
        chosen = dataclasses.replace(plan, precision=precision, attention=attention, stages=plan.stages[:1])
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainers(chosen, Path(folder), lambda line: None)[0]
        trainer.create_optimizer()
        trainer.state.max_steps = trainer.args.max_steps
        model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        for group in optimizer.param_groups:
            group["lr"] = plan.stages[0].learning_rate
        sides[precision] = {
            "trainer": trainer,
            "model": model,
            "optimizer": optimizer,
            "seconds": [],
            "loss": [],
            "matrix_rates": [],
        }
        sides[precision]["dtype"] = getattr(torch, precision)
    rows = tokens = 0
    work = 0.0
    for number in range(arguments.steps):
        batch = sides["float32"]["trainer"].train_dataset[number]
        for side in sides.values():
            start = time.perf_counter()
            side["loss"].append(step(side["trainer"], side["model"], side["optimizer"], batch))
            side["seconds"].append(time.perf_counter() - start)
            matrix_rate.cache_clear()  # beside every step, for the speed of a shared machine changes
            side["matrix_rates"].append(matrix_rate("cpu", side["dtype"]))
        lengths = [len(row) for row in batch]
        labels = sum(label >= 0 for row in batch for label in row.labels)
        rows, tokens = rows + len(batch), tokens + sum(lengths)
        work += sides["float32"]["trainer"].meter._work.flops(sum(lengths), labels, sum(n * n for n in lengths))
        told = ", ".join(f"{name} {side['loss'][-1]:.4f} {side['seconds'][-1]:.1f} s" for name, side in sides.items())
        print(f"step {number + 1}: {told}", flush=True)
    ratios = [a / b for a, b in zip(sides["float32"]["seconds"], sides["bfloat16"]["seconds"], strict=True)]
    found = {
        "recipe": arguments.recipe,
        "threads": torch.get_num_threads(),
        "steps": arguments.steps,
        "rows": rows,
        "tokens": tokens,
        "float32_over_bfloat16_seconds": {
            "median": statistics.median(ratios),
            "quartiles": statistics.quantiles(ratios, n=4)[::2],
        },
        "sides": {
            name: {
                "rows_per_second": rows / sum(side["seconds"]),
                "matrix_flops_per_second": statistics.median(side["matrix_rates"]),
                "share_of_matrix_rate": work
                / sum(rate * seconds for rate, seconds in zip(side["matrix_rates"], side["seconds"], strict=True)),
                "loss": side["loss"],
            }
            for name, side in sides.items()
        },
    }
    gaps = [abs(a - b) for a, b in zip(*(side["loss"] for side in sides.values()), strict=True)]
    found["largest_loss_gap"], found["mean_loss_gap"] = max(gaps), statistics.mean(gaps)
    print(json.dumps(found, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def step(trainer, model, optimizer, batch) -> float:
    model.train()
    loss = trainer.compute_loss(model, trainer.data_collator([batch]))
    trainer.accelerator.backward(loss)
    trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    optimizer.step()
    model.zero_grad()
    return loss.item()


if __name__ == "__main__":
    main()
