"""Prints the figures of the model card: the shipped folder, mlx_lm, greedy, in batches.

Held-out text comes from the generator with other seeds, once with sentences and words that
training knew and once with a third that it never saw; real text is written by hand
(real.jsonl) and was never trained on.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from random import Random

import mlx.core as mx
from corrupt import example
from mlx_lm import batch_generate, load

from mlxd.fidelity import content, invented, missing

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "daemon/src/mlxd/models/cleanup"
Pair = tuple[str, str]


def distance(a: str, b: str) -> int:
    """Levenshtein distance in characters."""
    if a == b:
        return 0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


class Cleaner:
    """The model of a folder, answering many texts at once."""

    def __init__(self, folder: Path):
        self.model, self.tokenizer = load(str(folder))
        if not mx.metal.is_available():
            self.model.set_dtype(mx.float32)
        self.tokens, self.seconds = 0, 0.0

    def __call__(self, texts: list[str]) -> list[str]:
        """Clean text for each raw text, in order."""
        template = self.tokenizer.apply_chat_template
        prompts = [template([{"role": "user", "content": t}], add_generation_prompt=True) for t in texts]
        order = sorted(range(len(texts)), key=lambda i: len(prompts[i]))
        began = time.perf_counter()
        answers = batch_generate(
            self.model,
            self.tokenizer,
            [prompts[i] for i in order],
            max_tokens=[2 * len(prompts[i]) + 40 for i in order],
        ).texts
        self.seconds += time.perf_counter() - began
        out = [""] * len(texts)
        for i, answer in zip(order, answers, strict=True):
            out[i] = answer
            self.tokens += len(self.tokenizer.encode(answer))
        return out


def accuracy(outputs: list[str], pairs: list[Pair]) -> tuple[float, float]:
    """(character error rate, share of exact matches)."""
    edits = sum(distance(o, clean) for o, (_, clean) in zip(outputs, pairs, strict=True))
    exact = sum(o == clean for o, (_, clean) in zip(outputs, pairs, strict=True))
    return edits / sum(len(clean) for _, clean in pairs), exact / len(pairs)


def show(kind: str, count: int, outputs: list[str], pairs: list[Pair]) -> None:
    """Print the first ``count`` answers that differ."""
    wrong = [(o, *p) for o, p in zip(outputs, pairs, strict=True) if o != p[1]]
    for output, raw, clean in wrong[:count]:
        print(f"[{kind}]\n  raw  {raw}\n  want {clean}\n  got  {output}")


def line(name: str, value: float, target: str, good: bool) -> None:
    print(f"{name:52s} {100 * value:6.2f} %   target {target:8s} {'met' if good else 'missed'}")


def held_out(cleaner: Cleaner, count: int, seed: int, shown: int, unseen: bool) -> None:
    """Figures on generated text; ``unseen``: a third of sentences and words are none that training knew."""
    pairs = [example(Random(f"held out {seed} {i}"), test=unseen, copying=0.1) for i in range(count)]
    outputs = cleaner([raw for raw, _ in pairs])
    errors, exact = accuracy(outputs, pairs)
    kind = "other seeds, a third of sentences and words unseen" if unseen else "other seeds, known sentences"
    print(f"held-out: {count} examples, {kind}")
    line("character error rate", errors, "< 1 %", errors < 0.01)
    line("exact match", exact, "> 92 %", exact > 0.92)
    show("held-out", shown, outputs, pairs)


def real(cleaner: Cleaner, path: Path, shown: int) -> None:
    """Figures on text written by hand."""
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    pairs = [(row["raw"], row["clean"]) for row in rows]
    outputs = cleaner([raw for raw, _ in pairs])
    words = sum(len(content(clean)) for _, clean in pairs)
    lost = sum(len(missing(clean, o)) for o, (_, clean) in zip(outputs, pairs, strict=True))
    faithful = sum(not invented(raw, o) for o, (raw, _) in zip(outputs, pairs, strict=True)) / len(pairs)
    same = [(clean, clean) for _, clean in pairs]
    again = cleaner([clean for clean, _ in same])
    unchanged = accuracy(again, same)[1]
    errors, exact = accuracy(outputs, pairs)
    print(f"real: {len(pairs)} sentences")
    line("content words kept", 1 - lost / words, "> 99 %", lost / words < 0.01)
    line("sentences without an invented content word", faithful, ">= 97 %", faithful >= 0.97)
    line("clean text left unchanged", unchanged, ">= 90 %", unchanged >= 0.9)
    print(f"{'character error rate, marks included':52s} {100 * errors:6.2f} %")
    print(f"{'exact match, marks included':52s} {100 * exact:6.2f} %")
    show("real", shown, outputs, pairs)
    show("unchanged", shown, again, same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--count", type=int, default=500, help="held-out examples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", type=Path, default=HERE / "real.jsonl")
    parser.add_argument("--show", type=int, default=0, help="print this many differences of each kind")
    options = parser.parse_args()
    cleaner = Cleaner(options.folder)
    held_out(cleaner, options.count, options.seed, options.show, unseen=False)
    held_out(cleaner, options.count, options.seed, options.show, unseen=True)
    real(cleaner, options.real, options.show)
    print(f"{cleaner.tokens} tokens in {cleaner.seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
