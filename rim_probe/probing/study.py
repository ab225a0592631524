"""A study: the models of a checkpoint and three splits of problems, each observed once and read by every probe.

Knows what was asked of which model and where it is kept. Knows nothing of what a probe makes of it.

Splits: a probe is fitted on `fit`, everything that can be chosen (layer, slot, threshold) is chosen on `choose`, and
only `report` is reported.
Roles: `memory` is the checkpoint itself; `cot` and `direct` are its matched models; `base` is the model before RiM
training, its memory tokens present and untrained; `stage1` is the model after grounding.
"""

import json
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rim_probe.decoding import Answer, answer, answer_batch
from rim_probe.errors import QuestionError, RiMError
from rim_probe.memory import LAYOUT_FILE
from rim_probe.model import ADAPTER_FILE, RiM, load_base, load_methods, placement
from rim_probe.probing.capture import Capture, CaptureSet, capture, capture_to
from rim_probe.probing.hooks import num_layers
from rim_probe.problems import Problem, is_correct

SPLITS = ("fit", "choose", "report")
SHARES = (0.5, 0.2, 0.3)  # of one file that has to serve as all three splits
METHOD_OF_ROLE = {"memory": "memory", "base": "memory", "stage1": "memory", "direct": "direct", "cot": "cot"}
ANSWER_BATCH = 64


def load_models(checkpoint: str | Path, device: str | None = None, base: str | Path | None = None) -> dict[str, RiM]:
    """The models of a checkpoint folder by role, as far as there are any.

    A matched model that is missing is left out rather than replaced by the memory model: it would be no control.

    Args:
        base: a RiM checkpoint or plain base model (folder, Hub id or GGUF file) to serve as `base`; by default the
            folder's own `base/`, or the base that an adapter names, with untrained memory tokens.

    Raises:
        CheckpointError, LayoutError: as `RiM.from_pretrained`, for any of them.
    """
    methods = load_methods(checkpoint, device)
    memory = methods["memory"]
    models = {"memory": memory}
    models |= {name: methods[name] for name in ("cot", "direct") if methods[name] is not memory}
    folder = Path(checkpoint)
    if (folder / "stage1").is_dir():
        models["stage1"] = RiM.from_pretrained(folder / "stage1", memory.device, memory.dtype)
    if base is None and (folder / "base").is_dir():
        base = folder / "base"
    if base is None and (folder / ADAPTER_FILE).exists():
        base = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
    if base is not None:
        models["base"] = _load_base(base, memory)
    return models


def _load_base(path: str | Path, memory: RiM) -> RiM:
    if (Path(path) / LAYOUT_FILE).exists():
        return RiM.from_pretrained(path, memory.device, memory.dtype)
    place, dtype = placement(memory.device, memory.dtype)
    model, tokenizer = load_base(path, dtype)
    return RiM.attach(model.to(place).eval(), tokenizer, memory.layout, name=str(path))


def split_problems(problems: Sequence[Problem], seed: int = 0) -> dict[str, list[Problem]]:
    """One file as three splits (half, a fifth, the rest) at random; a question that occurs twice stays in one split."""
    unique = list({problem.question: problem for problem in problems}.values())
    order = np.random.default_rng(seed).permutation(len(unique))
    ends = np.cumsum([round(share * len(unique)) for share in SHARES[:2]])
    return {name: [unique[i] for i in part] for name, part in zip(SPLITS, np.split(order, ends), strict=True)}


class Study:
    """What probes are fitted and scored on; captures and answers are made when first asked for and kept.

    Args:
        models: by role, `memory` at least.
        splits: `fit`, `choose`, `report`; problems that the memory model cannot read are left out (see `left_out`).
        num_blocks: K; None for the layout's own.
        folder: where captures and answers are kept, so that an interrupted study goes on; by default a temporary
            folder that goes with the study.

    Attributes:
        left_out: problems left out by split.
        K, M, layers: memory blocks, slots per block, residual layers (0..L) of the memory model.
    """

    def __init__(
        self,
        models: Mapping[str, RiM],
        splits: Mapping[str, Sequence[Problem]],
        *,
        num_blocks: int | None = None,
        seed: int = 0,
        folder: str | Path | None = None,
        progress: bool = True,
    ):
        self.models, self.seed = dict(models), seed
        self._show = progress
        memory = self.models["memory"]
        self.K, self.M = memory.layout.check_blocks(num_blocks), memory.layout.slots_per_block
        if self.K == 0:
            raise RiMError("There is nothing to probe without memory blocks; choose at least one.")
        self.layers = tuple(range(num_layers(memory) + 1))
        readable = {name: [p for p in splits[name] if self._readable(p.question)] for name in SPLITS}
        self.splits: dict[str, list[Problem]] = readable
        self.left_out = {name: len(splits[name]) - len(readable[name]) for name in SPLITS}
        for name, problems in readable.items():
            if not problems:
                raise RiMError(
                    f"No problem is left for the split “{name}”; give more problems that the model can read."
                )
        self._temporary = None if folder else tempfile.mkdtemp(prefix="rim-probe-")
        self.folder = Path(folder or self._temporary)
        self._captures: dict[tuple[str, str], CaptureSet] = {}
        self._answers: dict[tuple[str, str], list[Answer]] = {}

    def close(self) -> None:
        """Removes the temporary folder, where there is one."""
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def __enter__(self) -> "Study":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def problems(self, split: str) -> list[Problem]:
        """The problems of a split, in the order of every capture and answer."""
        return self.splits[split]

    def capture(self, role: str, split: str) -> CaptureSet:
        """Residual states (no attention) of a role's own prompts on a split."""
        if (role, split) not in self._captures:
            method = METHOD_OF_ROLE[role]
            self._captures[role, split] = capture_to(
                self.folder / f"{role}-{split}",
                self.models[role],
                [problem.question for problem in self.splits[split]],
                method=method,
                num_blocks=self.K if method == "memory" else None,
                progress=self._show,
            )
        return self._captures[role, split]

    def answers(self, method: str, split: str) -> list[Answer]:
        """Answers by a method (`memory` with all K readouts, `cot`, `direct`) on a split; without times."""
        if (method, split) not in self._answers:
            rim, problems = self.models[method], self.splits[split]
            # Like lengths together pad least.
            order = sorted(range(len(problems)), key=lambda i: len(problems[i].question))
            given: dict[int, Answer] = {}
            batches = [order[start : start + ANSWER_BATCH] for start in range(0, len(order), ANSWER_BATCH)]
            for batch in self.progress(batches, f"answers {method}-{split}"):
                questions = [problems[i].question for i in batch]
                num_blocks = self.K if method == "memory" else None
                given |= zip(batch, answer_batch(rim, questions, method, num_blocks=num_blocks), strict=True)
            self._answers[method, split] = [given[i] for i in range(len(problems))]
        return self._answers[method, split]

    def right(self, split: str) -> np.ndarray:
        """Whether readout k of the memory model is right, bool [n, K]; the last column is the final answer."""
        problems, answers = self.splits[split], self.answers("memory", split)
        return np.array(
            [
                [is_correct(readout.value, problem.answer) for readout in given.readouts]
                for problem, given in zip(problems, answers, strict=True)
            ]
        )

    def rng(self, name: str) -> np.random.Generator:
        """A generator of its own for every purpose, so that one probe's draws do not shift another's."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def progress(self, items: Iterable, label: str) -> Iterable:
        """`items` with a progress bar, where the study shows progress."""
        return tqdm(items, desc=label, disable=not self._show)

    def _readable(self, question: str) -> bool:
        try:
            for role, rim in self.models.items():
                method = METHOD_OF_ROLE[role]
                rim.prompt_ids(question, method, self.K if method == "memory" else None)
        except QuestionError:
            return False
        return True


@dataclass(frozen=True)
class Observation:
    """One question as a probe explains it.

    Attributes:
        tokens: the question's tokens as text, one per column of `capture.to_question`.
        capture: of this question alone, attention included.
        answer: by memory, with all K readouts.
    """

    question: str
    tokens: list[str]
    capture: Capture
    answer: Answer


def observe(rim: RiM, question: str, num_blocks: int | None = None) -> Observation:
    """Asks one question and keeps what the probes need.

    Raises:
        RiMError: a question that cannot be asked.
    """
    held = capture(rim, question, num_blocks=num_blocks)
    tokens = [rim.tokenizer.decode([token]) for token in held.question_ids[0]]
    return Observation(question, tokens, held, answer(rim, question, "memory", num_blocks=num_blocks))
