"""`python -m rim_probe probe`: every probe on one checkpoint, fitted once, kept beside it, told in one report.

Method:
1. the checkpoint's models are loaded by role, the problems split into fit, choose and report (`study`);
2. each probe of `probes.PROBES` that was asked for is fitted and scored, and saved at once with its report; one that
   lies there already, made from the same weights, data and seed, is not made again;
3. after every probe report.json is written anew from all that is done; `plots.report.draw_page` makes the page of it.

Knows the order of work, files and resuming. Knows nothing of what a probe does.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rim_probe.errors import RiMError
from rim_probe.files import claim, hold, one_sentence_if_full
from rim_probe.probing.artifacts import (
    FOLDER,
    describe_study,
    fingerprint,
    is_done,
    is_report,
    load_provenance,
    load_report,
    load_results,
    resume_key,
    save_artifact,
    save_report,
)
from rim_probe.probing.probes import PROBES, Fitted, Workbench
from rim_probe.probing.results import Report
from rim_probe.probing.study import HELD_OUT, SPLITS, Study, split_problems
from rim_probe.probing.tables import format_headline, format_targets
from rim_probe.problems import Problem
from rim_probe.report import format_machine

ORDER = ("fit", "choose", *HELD_OUT, "report")


@dataclass(frozen=True)
class Source:
    """Problems and the file they were read from."""

    path: str
    problems: Sequence[Problem]


@dataclass(frozen=True)
class NotRun:
    """A probe that could not be run, and the sentence that says why."""

    name: str
    reason: str


def splits_of(given: Mapping[str, Source], seed: int) -> tuple[dict[str, Source], int]:
    """The splits of a study from files: `report` alone, which is then cut in three, or each split its own.

    Returns:
        the splits, and how many problems were left out because their question is in a split that comes before in
        fit, choose, fit-heldout, choose-heldout, report: a probe must not be reported on what it was fitted on.

    Raises:
        RiMError: one split of a pair without the other, or a split of which nothing is left.
    """
    for first, second in (("fit", "choose"), ("fit-heldout", "choose-heldout")):
        if (first in given) != (second in given):
            raise RiMError(f"Give both --{first} and --{second}, or neither.")
    seen: set[str] = set()
    kept: dict[str, Source] = {}
    for name in sorted(given, key=ORDER.index):
        source = given[name]
        problems = [problem for problem in source.problems if problem.question not in seen]
        if not problems:
            raise RiMError(f"Every question of {source.path} is in a file to fit or choose on; give other problems.")
        seen |= {problem.question for problem in problems}
        kept[name] = Source(source.path, problems)
    left_out = sum(len(given[name].problems) - len(kept[name].problems) for name in given)
    if "fit" not in kept:
        whole = kept["report"]
        parts = split_problems(whole.problems, seed)
        kept |= {name: Source(whole.path, parts[name]) for name in SPLITS}
    return kept, left_out


def run_probes(
    models: Mapping[str, Any],
    sources: Mapping[str, Source],
    *,
    folder: str | Path,
    command: str,
    only: Sequence[str] = (),
    num_blocks: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[Report | NotRun]:
    """Runs the probes asked for and yields each one's report as soon as it is saved, or why it was not run.

    Args:
        models: by role, as `study.load_models` gives them.
        sources: by split, as `splits_of` gives them.
        folder: where artifacts and the report go; captures lie in `<folder>.captures` until all asked for is done.
        only: names of probes; all where empty. What these build on is run too.

    Raises:
        RiMError: an unknown probe, no problem that can be read, files that cannot be used, a folder that `probe` did
            not make or in which another process is at work, a full disk.
    """
    folder = Path(folder)
    wanted = _with_needs(only)
    memory = models["memory"]
    data = {name: (source.path, len(source.problems)) for name, source in sources.items()}
    provenance = describe_study(memory, data, command=command, seed=seed)
    prints = {role: fingerprint(rim) for role, rim in models.items()}
    choices = {"num_blocks": num_blocks, "models": prints}
    forms = {name: {} if probe.form == 1 else {"form": probe.form} for name, probe in PROBES.items()}
    keys = {name: resume_key(name, provenance, choices | forms[name]) for name in PROBES}
    claim(folder, "probe", is_report)
    work = folder.absolute().with_name(folder.absolute().name + ".captures")
    problems = {name: source.problems for name, source in sources.items()}
    with (
        one_sentence_if_full(folder),
        hold(work, "probe"),
        Study(models, problems, num_blocks=num_blocks, seed=seed, folder=work, progress=progress) as study,
    ):
        workbench = Workbench(study, folder, keys)
        failed: dict[str, str] = {}
        for name in wanted:
            if not is_done(folder, name, keys[name]):
                try:
                    result = _run(name, workbench, failed)
                except RiMError as error:  # such as no cot model, or no problem with steps: the others can still run
                    failed[name] = str(error)
                    yield NotRun(name, failed[name])
                    continue
                save_artifact(
                    folder,
                    name,
                    result.tensors,
                    result.settings,
                    provenance,
                    key=keys[name],
                    report=result.report,
                )
            _report(folder, keys, provenance | {"not_run": failed})
            yield load_results(folder, name)
    shutil.rmtree(work, ignore_errors=True)
    if len(failed) == len(wanted):
        raise RiMError("No probe could be run on these problems and this checkpoint; the reasons stand above.")


def _run(name: str, workbench: Workbench, failed: Mapping[str, str]) -> Fitted:
    for need in PROBES[name].needs:
        if need in failed:
            raise RiMError(f"It builds on the probe {need}, which was not run.")
    return PROBES[name].run(workbench)


def default_folder(checkpoint: str | Path) -> Path:
    """`<checkpoint>/probes`.

    Raises:
        RiMError: a checkpoint on the Hub, beside which nothing can be written.
    """
    if not Path(checkpoint).is_dir():
        raise RiMError(f"{checkpoint} is no folder here; say with --output where its probes shall go.")
    return Path(checkpoint) / FOLDER


def _with_needs(only: Sequence[str]) -> list[str]:
    """The probes asked for and what they build on, in the order of PROBES."""
    if unknown := [name for name in only if name not in PROBES]:
        raise RiMError(f"There is no probe {unknown[0]!r}; choose from {', '.join(PROBES)}.")
    wanted = set(only or PROBES)
    while missing := {need for name in wanted for need in PROBES[name].needs} - wanted:
        wanted |= missing
    return [name for name in PROBES if name in wanted]


def _report(folder: Path, keys: Mapping[str, str], provenance: Mapping[str, Any]) -> None:
    """Writes the report of every probe that is done and belongs to this run's models and data."""
    done = [name for name in PROBES if is_done(folder, name, keys[name])]
    reports = [load_results(folder, name) for name in done]
    provenance = provenance | {"probes": {name: load_provenance(folder, name) for name in done}}
    save_report(folder, reports, provenance)


def summarise(folder: str | Path) -> str:
    """What a model card tells of the report in `folder`: the command, the targets, and each probe's sentence."""
    reports, provenance = load_report(folder)
    lines = [f"- **{PROBES[report.name].title}.** {format_headline(report)}" for report in reports]
    data = ", ".join(
        f"{split} {part['problems']:,} (`{Path(part['file']).name}`, sha256 {part['sha256'][:12]}…)"
        for split, part in provenance["data"].items()
    )
    head = [
        f"`{provenance['checkpoint']}`, {provenance['date'][:10]}, seed {provenance['seed']}; problems: {data}.",
        format_machine(provenance["machine"]) + ".",
        f"`{provenance['command']}`",
    ]
    return "\n\n".join(["\n".join(head), format_targets(reports), "\n".join(lines)]) + "\n"
