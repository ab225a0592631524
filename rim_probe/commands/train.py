"""`train`: what a recipe says, for real, as a trial, or profiled."""

import argparse
from typing import Any

from rim_probe.errors import RiMError
from rim_probe.options import OK, TIME_OVER, add_command, add_number, silence_transformers


def add_train(commands: Any) -> None:
    """Adds `train` to the command line."""
    parser = add_command(
        commands,
        _train,
        summary="train what a recipe says",
        description="Train a model by a YAML recipe, which names its base, its data and its stages (stage1, stage2,\n"
        "interchange, cot, direct); ready ones lie in rim_probe/training/recipes. The run's own files (checkpoints,\n"
        "TensorBoard logs) go to a folder FOLDER.run beside the finished checkpoint.",
        example="  python -m rim_probe train my-recipe.yaml --profile\n"
        "  python -m rim_probe train my-recipe.yaml --trial --output /tmp/trial\n"
        "  python -m rim_probe train my-recipe.yaml --max-minutes 60\n"
        "  python -m rim_probe train my-recipe.yaml --resume\n"
        "  accelerate launch -m rim_probe train my-recipe.yaml     (several GPUs)",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file")
    parser.add_argument("--output", metavar="FOLDER", help="the finished checkpoint; as the recipe says if left out")
    parser.add_argument("--resume", action="store_true", help="go on where an earlier run stopped or was killed")
    parser.add_argument(
        "--max-minutes",
        type=_minutes,
        metavar="M",
        help="save and stop before M minutes are over, with exit code 75; --resume goes on from there",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--trial", action="store_true", help="30 steps of a few rows for every stage, to check a recipe on any computer"
    )
    instead.add_argument(
        "--profile", action="store_true", help="how long it would take with each back end, in a minute; writes nothing"
    )
    instead.add_argument(
        "--describe",
        metavar="CHECKPOINT",
        help="write into CHECKPOINT what the recipe trains on (trained_on.json), as a training does by itself",
    )
    add_number(
        parser, "--batch-size", "rows in a step of --trial (4 if left out) or --profile (as the recipe says)", low=1
    )


def _minutes(typed: str) -> float:
    try:
        minutes = float(typed)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{typed!r} is not a number of minutes above 0")
    return minutes


def _train(arguments: argparse.Namespace) -> int:
    if arguments.profile and (arguments.resume or arguments.output or arguments.max_minutes):
        raise RiMError("--profile writes nothing and ends by itself; leave out --output, --resume and --max-minutes.")
    if arguments.batch_size and not (arguments.profile or arguments.trial):
        raise RiMError("--batch-size is for --profile and --trial; a training takes the recipe's own.")
    silence_transformers()
    if arguments.describe:
        from rim_probe.training.run import describe

        told = describe(arguments.recipe, arguments.describe)
        print(f"{arguments.describe}: {told.problems:,} problems described.")
        return OK
    if arguments.profile:
        from rim_probe.training.profiling import profile

        profile(arguments.recipe, batch_size=arguments.batch_size)
        return OK

    from rim_probe.training import train
    from rim_probe.training.trial import Trial

    finished = train(
        arguments.recipe,
        output=arguments.output,
        resume=arguments.resume,
        max_minutes=arguments.max_minutes,
        trial=Trial(batch=arguments.batch_size or Trial.batch) if arguments.trial else None,
    )
    return OK if finished else TIME_OVER
