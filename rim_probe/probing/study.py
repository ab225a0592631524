"""A study: the models of a checkpoint and three splits of problems, each observed once and read by every probe.

Knows what was asked of which model and where it is kept. Knows nothing of what a probe makes of it.

Splits: a probe is fitted on `fit`, everything that can be chosen (layer, slot, threshold) is chosen on `choose`, and
only `report` is reported. A model errs rarely on problems like those it was trained on, so what tells right from wrong
may be fitted and chosen on two further splits, `fit-heldout` and `choose-heldout`: problems of the report split's kind.
Roles: `memory` is the checkpoint itself; `cot` and `direct` are its matched models; `base` is the model before RiM
training, its memory tokens present and untrained; `stage1` is the model after grounding; `paper` is a memory model of
the paper's two stages beside one that was trained by interchange.
"""

import json
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rim_probe.adapters import ADAPTER_FILE, base_name, source_of
from rim_probe.bases import Progress
from rim_probe.decoding import Answer, Readout, answer, answer_batch
from rim_probe.errors import RiMError
from rim_probe.evaluation import can_ask
from rim_probe.files import write_atomic
from rim_probe.memory import LAYOUT_FILE
from rim_probe.model import RiM, load_base, load_methods, placement
from rim_probe.probing.capture import Capture, CaptureSet, capture, capture_to, request_key
from rim_probe.probing.hooks import num_layers
from rim_probe.problems import Problem, is_correct

SPLITS = ("fit", "choose", "report")
HELD_OUT = ("fit-heldout", "choose-heldout")  # optional: of the report split's kind, for probes of right and wrong
SHARES = (0.5, 0.2, 0.3)  # of one file that has to serve as all three splits
CONTROLS = ("stage1", "base", "paper")  # roles beside the three methods
METHOD_OF_ROLE = dict.fromkeys(("memory", *CONTROLS), "memory") | {"direct": "direct", "cot": "cot"}
ANSWER_BATCH = 64


def load_models(
    checkpoint: str | Path,
    device: str | None = None,
    base: str | Path | None = None,
    progress: Progress | None = None,
    layout: str | Path | None = None,
) -> dict[str, RiM]:
    """The models of a checkpoint folder by role, as far as there are any.

    A matched model that is missing is left out rather than replaced by the memory model: it would be no control.

    Args:
        base: a RiM checkpoint or plain base model (folder, Hub id or GGUF file) to serve as `base`; by default the
            folder's own `base/`, or the base that an adapter records, with untrained memory tokens.
        progress: is told of a known base that has to be fetched.
        layout: see `RiM.from_pretrained`.

    Raises:
        CheckpointError, LayoutError: as `RiM.from_pretrained`, for any of them.
    """
    models = own_models(load_methods(checkpoint, device, progress=progress, layout=layout))
    for role in CONTROLS:
        control = load_control(role, checkpoint, models["memory"], base)
        if control is not None:
            models[role] = control
    return models


def own_models(methods: Mapping[str, RiM]) -> dict[str, RiM]:
    """Those of `load_methods` that have weights of their own, by role."""
    memory = methods["memory"]
    return {name: rim for name, rim in methods.items() if name == "memory" or rim is not memory}


def load_control(role: str, checkpoint: str | Path, memory: RiM, base: str | Path | None = None) -> RiM | None:
    """A model of `CONTROLS` of a checkpoint folder, where its memory model is; None where there is none.

    Args:
        base: as for `load_models`.

    Raises:
        CheckpointError, LayoutError: as `RiM.from_pretrained`.
    """
    folder = Path(checkpoint)
    if role != "base":
        return RiM.from_pretrained(folder / role, memory.device, memory.dtype) if (folder / role).is_dir() else None
    if base is None and (folder / role).is_dir():
        base = folder / role
    if base is not None:
        return _load_base(base, None, memory)
    if (folder / ADAPTER_FILE).exists():
        return _load_base(base_name(folder), source_of(folder), memory)
    return None


def _load_base(path: str | Path, source: str | None, memory: RiM) -> RiM:
    if (Path(path) / LAYOUT_FILE).exists():
        return RiM.from_pretrained(path, memory.device, memory.dtype)
    place, dtype = placement(memory.device, memory.dtype)
    model, tokenizer = load_base(path, dtype, source=source)
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
        folder: where captures and answers are kept, so that an interrupted study goes on (what was made from another
            model or other questions is made again); by default a temporary folder that goes with the study.

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
        if "memory" not in models:
            raise RiMError("A study needs a memory model; give it under the name “memory”.")
        self.models, self.seed = dict(models), seed
        self._show = progress
        memory = self.models["memory"]
        self.K, self.M = memory.layout.check_blocks(num_blocks), memory.layout.slots_per_block
        if self.K == 0:
            raise RiMError("There is nothing to probe without memory blocks; choose at least one.")
        self.layers = tuple(range(num_layers(memory) + 1))
        given = {name: splits.get(name, ()) for name in (*SPLITS, *(name for name in HELD_OUT if name in splits))}
        askers = self._askers()
        readable = {name: [p for p in given[name] if _readable(p, askers)] for name in given}
        self.splits: dict[str, list[Problem]] = readable
        self.left_out = {name: len(given[name]) - len(readable[name]) for name in given}
        for name, problems in readable.items():
            if not problems:
                raise RiMError(
                    f"No problem is left for the split “{name}”; give more problems that the model can read."
                )
        self._temporary = None
        if folder is None:  # goes with the object even where nobody closes it
            self._temporary = tempfile.TemporaryDirectory(prefix="rim-probe-", ignore_cleanup_errors=True)
        self.folder = Path(folder if folder is not None else self._temporary.name)
        self._captures: dict[tuple[str, str], CaptureSet] = {}
        self._answers: dict[tuple[str, str], list[Answer]] = {}

    def close(self) -> None:
        """Removes the temporary folder, where there is one."""
        if self._temporary:
            self._temporary.cleanup()

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

    def answers(self, role: str, split: str) -> list[Answer]:
        """Answers of a role on a split (memory models with all K readouts); without times."""
        if (role, split) not in self._answers:
            rim, questions = self.models[role], [problem.question for problem in self.splits[split]]
            method = METHOD_OF_ROLE[role]
            num_blocks = self.K if method == "memory" else None
            path, key = self.folder / f"answers-{role}-{split}.json", request_key(rim, questions, method, num_blocks)
            given = _load_answers(path, key)
            if given is None:
                given = self._ask(rim, questions, method, num_blocks, f"answers {role}-{split}")
                stored = {"key": key, "answers": [answer.to_dict() for answer in given]}
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomic(path, json.dumps(stored).encode())
            self._answers[role, split] = given
        return self._answers[role, split]

    def _ask(self, rim: RiM, questions: list[str], method: str, num_blocks: int | None, label: str) -> list[Answer]:
        order = sorted(range(len(questions)), key=lambda i: len(questions[i]))  # like lengths together pad least
        given: dict[int, Answer] = {}
        for batch in self.progress([order[i : i + ANSWER_BATCH] for i in range(0, len(order), ANSWER_BATCH)], label):
            answers = answer_batch(rim, [questions[i] for i in batch], method, num_blocks=num_blocks)
            given |= zip(batch, answers, strict=True)
        return [given[i] for i in range(len(questions))]

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

    def _askers(self) -> list[tuple[RiM, str, int | None]]:
        """The different ways in which the models are asked: one of several models that read alike will do."""
        askers = {}
        for role, rim in self.models.items():
            method = METHOD_OF_ROLE[role]
            way = (rim.tokenizer.backend_tokenizer.to_str(), rim.layout, rim.max_length, method)
            askers[way] = (rim, method, self.K if method == "memory" else None)
        return list(askers.values())


def _readable(problem: Problem, askers: Iterable[tuple[RiM, str, int | None]]) -> bool:
    """Whether every model can be asked, and can read the question with its gold chain, as some probes let it."""
    return all(
        can_ask(rim, problem.question, method, num_blocks)
        and len(rim.encode_question(problem.question)) + len(rim.encoder.chain_ids(problem)) <= rim.max_length
        for rim, method, num_blocks in askers
    )


def _load_answers(path: Path, key: str) -> list[Answer] | None:
    """Stored answers; None where there are none, they are damaged, or they were given to another request."""
    try:
        stored = json.loads(path.read_bytes())
        return [_answer(data) for data in stored["answers"]] if stored["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _answer(data: dict) -> Answer:
    """The answer a dict of `Answer.to_dict` came from."""
    readouts = tuple(Readout(**{**readout, "token_ids": tuple(readout["token_ids"])}) for readout in data["readouts"])
    return Answer(**{**data, "token_ids": tuple(data["token_ids"]), "readouts": readouts})


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
