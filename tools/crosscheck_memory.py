"""Accuracy, cuts and slot interchange of a memory checkpoint, by code that shares no line with the library's own.

Plain transformers, a dense mask and forward hooks; from the library only the world's problems and partners. What the
probes say of a checkpoint should agree with this within the intervals. Numbers of one digit, full checkpoints.

    python -m tools.crosscheck_memory checkpoints/rim-tiny --split test --seed 311 --problems 1500 --pairs 4000
"""

import argparse
import json
import random
from collections import defaultdict
from itertools import islice

import torch
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rim_probe.datasets.arithmetic import World, generate
from rim_probe.datasets.partners import Partners

WORLD = World(story=0.5, relation=0.3, shuffle=0.4, held_out_steps=2)  # as in the files of docs/results.md
BATCH = 128
NEVER = torch.finfo(torch.float32).min


class Memory:
    """A checkpoint, its layout, and forward passes with cuts and patches."""

    def __init__(self, folder: str):
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        with open(f"{folder}/memory_layout.json", encoding="utf-8") as file:
            layout = json.load(file)
        self.K, self.M = layout["num_blocks"], layout["slots_per_block"]
        begin, slot, end = self.tokenizer.convert_tokens_to_ids([layout["begin"], layout["slot"], layout["end"]])
        self.block = [begin, *[slot] * self.M, end]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, question: str, blocks: int) -> list[int]:
        return self.ids(question) + self.block * blocks

    def slots(self, length: int) -> torch.Tensor:
        """Places of the slots [K, M] in a prompt of K blocks."""
        first = length - self.K * len(self.block) + 1
        return first + len(self.block) * torch.arange(self.K)[:, None] + torch.arange(self.M)

    def mask(self, prompt: int, length: int, cut: str | None) -> torch.Tensor:
        """The causal mask [length, length] of a prompt with what follows it; `cut` says what is not seen by whom."""
        seen = torch.zeros(length, length).masked_fill(torch.ones(length, length).triu(1) > 0, NEVER)
        first = prompt - self.K * len(self.block)
        if cut == "slots hidden":  # from everything but the slots of the same block
            for block in self.slots(prompt):
                seen[block[-1] + 1 :, block] = NEVER
        elif cut == "memory cut":  # from the last block end and the answer
            seen[prompt - 1 :, first : prompt - 1] = NEVER
        elif cut == "question cut":
            seen[prompt - 1 :, :first] = NEVER
        return seen

    @torch.no_grad()
    def run(self, rows, prompt, cut=None, keep=None, places=None, states=None):
        """Logits [n, L, V] of rows of one length; residual streams at places `keep` after each layer [n, P, d]."""
        ids = torch.tensor(rows)
        kept, hooks = [], []

        def patch(index):
            def hook(_, __, out):
                hidden = out[0] if isinstance(out, tuple) else out
                if keep is not None:
                    kept.append(hidden[:, keep].clone())
                if places is not None:
                    hidden = hidden.clone()
                    hidden[torch.arange(len(rows))[:, None], places] = states[index]
                return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

            return hook

        for i, layer in enumerate(self.model.model.layers):
            hooks.append(layer.register_forward_hook(patch(i)))
        mask = self.mask(prompt, ids.shape[1], cut).expand(len(rows), 1, -1, -1)
        try:
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits, kept
        finally:
            for hook in hooks:
                hook.remove()

    def says(self, prompts: list[list[int]], targets: list[list[int]], cut: str | None = None) -> list[bool]:
        """Whether greedy decoding after each prompt gives its target and ends."""
        groups = defaultdict(list)
        for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            groups[len(prompt), len(target)].append(i)
        said = [False] * len(prompts)
        for (length, more), group in groups.items():
            for part in (group[a : a + BATCH] for a in range(0, len(group), BATCH)):
                logits, _ = self.run([prompts[i] + targets[i] for i in part], length, cut)
                best = logits[:, length - 1 : length + more].argmax(-1).tolist()
                for i, tokens in zip(part, best, strict=True):
                    said[i] = tokens == [*targets[i], self.tokenizer.eos_token_id]
        return said


def rate(hits: list[bool]) -> str:
    if not hits:
        return "n = 0"
    interval = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    return f"{100 * sum(hits) / len(hits):.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f}), n = {len(hits)}"


def accuracy(memory: Memory, problems: list) -> dict[str, list[bool]]:
    prompts = [memory.prompt(problem.question, memory.K) for problem in problems]
    answers = [memory.ids(problem.answer) for problem in problems]
    right = memory.says(prompts, answers)
    found = {"final readout right": right}
    for steps in sorted({len(problem.steps) for problem in problems}):
        found[f"  {steps} steps"] = [
            r for r, problem in zip(right, problems, strict=True) if len(problem.steps) == steps
        ]
    for cut in ("slots hidden", "memory cut", "question cut"):
        found[f"{cut}: right"] = memory.says(prompts, answers, cut)
    told = [(p, t, r) for p, r in zip(problems, right, strict=True) for t in range(1, len(p.steps))]
    own = memory.says([memory.prompt(p.question, t) for p, t, _ in told], [memory.ids(p.steps[t]) for p, t, _ in told])
    found["own words: readout t states step t + 1"] = own
    found["  where the problem is answered right"] = [hit for hit, (*_, r) in zip(own, told, strict=True) if r]
    return found


def draw_pairs(split: str, seed: int, number: int) -> list[tuple]:
    """(kind, base, source, counterfactual, t): pairs that differ in one number, and strict ones by turns.

    Strict: a second, later number differs, so that neither answer is the predicted one.
    """
    partners, rng, pairs = Partners(WORLD, split, seed), random.Random(seed), []
    bases = list(generate(WORLD, split, number, seed))
    for index, draw in partners.each(set(range(number))):
        base, one = bases[index], index % 2 == 0
        t = rng.randint(1, len(base.steps))
        for source in islice(draw(rng, one), 30):
            told = partners.interchanged(base, source, t)
            if told is not None and told.answer != base.answer and (one or told.answer != source.answer):
                pairs.append(("one number" if one else "strict", base, source, told, t))
                break
    return pairs


def interchange(memory: Memory, pairs: list[tuple], rng: random.Random) -> dict[str, list[bool]]:
    """Slots of block t from the source at all layers; of the pairs answered right both times."""
    groups, found = defaultdict(list), defaultdict(list)
    for pair in pairs:
        groups[len(memory.prompt(pair[1].question, memory.K))].append(pair)
    for length, group in groups.items():
        every = memory.slots(length)
        for part in (group[a : a + BATCH] for a in range(0, len(group), BATCH)):
            bases, sources = ([memory.prompt(pair[side].question, memory.K) for pair in part] for side in (1, 2))
            own = memory.run(bases, length)[0][:, -1].argmax(-1).tolist()
            logits, kept = memory.run(sources, length, keep=every.flatten())
            other = logits[:, -1].argmax(-1).tolist()
            answers = [[memory.ids(pair[side].answer)[0] for pair in part] for side in (1, 2, 3)]
            right = [t - 1 for *_, t in part]
            wrong = [rng.choice([k for k in range(memory.K) if k != t]) for t in right]
            said = {}
            for name, blocks, cut in (
                ("predicted answer", right, None),
                ("wrong block", wrong, None),
                ("predicted answer, question cut", right, "question cut"),
            ):
                states = [
                    layer.view(len(part), memory.K, memory.M, -1)[torch.arange(len(part)), blocks] for layer in kept
                ]
                logits, _ = memory.run(bases, length, cut, places=every[blocks], states=states)
                said[name] = logits[:, -1].argmax(-1).tolist()
            for i, (kind, base, _, _, t) in enumerate(part):
                if (own[i], other[i]) != (answers[0][i], answers[1][i]):
                    continue
                for name, tokens in said.items():
                    found[f"{kind}: {name}"].append(tokens[i] == answers[2][i])
                found[f"{kind}: t = {t} of {len(base.steps)}"].append(said["predicted answer"][i] == answers[2][i])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--split", default="test", choices=("valid", "test"))
    parser.add_argument("--seed", type=int, default=311)
    parser.add_argument("--problems", type=int, default=1500)
    parser.add_argument("--pairs", type=int, default=4000, help="problems for which a partner is sought")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    memory = Memory(arguments.checkpoint)
    problems = list(generate(WORLD, arguments.split, arguments.problems, arguments.seed, unique=True))
    pairs = draw_pairs(arguments.split, arguments.seed, arguments.pairs)
    found = accuracy(memory, problems) | dict(sorted(interchange(memory, pairs, random.Random(0)).items()))
    print(f"{arguments.checkpoint}, {arguments.split}, seed {arguments.seed}: % (95 % Wilson interval)")
    for name, hits in found.items():
        print(f"{name:44} {rate(hits)}")


if __name__ == "__main__":
    main()
