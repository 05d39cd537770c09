"""Trains the model from nothing: data, tokenizer, weights, model folder, in one command.

The learning rate follows the share of the budget that is used up: of time (--minutes,
--until) or of steps (--steps). A run resumes from its last checkpoint.
"""

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from random import Random

import numpy as np
import tokenizer as tokens
import torch
from corrupt import example
from export import export
from model import Model, Shape
from optimizer import Optimizer
from parallel import Team, parts
from tokenizers import Tokenizer

POOL = 6144
LONGEST = 320


def copying(progress: float) -> float:
    """Share of word salad: copying is learnt first, the task later."""
    return 0.7 if progress < 0.04 else 0.35 if progress < 0.1 else 0.14 if progress < 0.4 else 0.1


def conversations(tok: Tokenizer, seed: int, progress: float) -> list[tuple[list[int], list[bool]]]:
    """A pool of token rows with a mask of answer tokens; short rows join as several turns."""
    rng = Random(f"pool {seed}")
    pairs = [example(Random(f"train {seed} {i}"), copying=copying(progress)) for i in range(POOL)]
    raw, clean = (tok.encode_batch([p[side] for p in pairs]) for side in (0, 1))
    user, answer, end = (tok.token_to_id(t) for t in (tokens.USER, tokens.ASSISTANT, tokens.END))
    rows: list[tuple[list[int], list[bool]]] = []
    for r, c in zip(raw, clean, strict=True):
        ids = [user, *r.ids, answer, *c.ids, end]
        mask = [False] * (len(r.ids) + 2) + [True] * (len(c.ids) + 1)
        if len(ids) > LONGEST:
            continue
        if rows and len(rows[-1][0]) + len(ids) < 120 and rng.random() < 0.15:
            rows[-1] = (rows[-1][0] + ids, rows[-1][1] + mask)
        else:
            rows.append((ids, mask))
    return rows


def batches(rows: list[tuple[list[int], list[bool]]], size: int, seed: int):
    """Batches of about ``size`` tokens of rows of like length, in random order."""
    rows.sort(key=lambda row: len(row[0]))
    groups: list[list[tuple[list[int], list[bool]]]] = [[]]
    for row in rows:
        if (len(groups[-1]) + 1) * len(row[0]) > size:
            groups.append([])
        groups[-1].append(row)
    Random(seed).shuffle(groups)
    for group in groups:
        width = max(len(ids) for ids, _ in group)
        grid = np.zeros((len(group), width), np.int64)
        mask = np.zeros((len(group), width), bool)
        for i, (ids, marks) in enumerate(group):
            grid[i, : len(ids)], mask[i, : len(ids)] = ids, marks
        where = np.flatnonzero(mask[:, 1:].ravel())
        line, column = np.divmod(where, width - 1)
        yield (
            torch.from_numpy(grid[:, :-1].copy()),
            torch.from_numpy(line * (width - 1) + column),
            torch.from_numpy(grid[line, column + 1]),
        )


def rate(progress: float, warm: float = 0.01, hold: float = 0.45) -> float:
    """Warm-up, plateau, then linear to zero."""
    if progress < warm:
        return max(progress / warm, 0.02)
    return 1.0 if progress < hold else max(0.0, (1 - progress) / (1 - hold))


class Run:
    """Model, optimiser, averaged weights and counters of one training run."""

    def __init__(self, shape: Shape, options: argparse.Namespace):
        torch.manual_seed(options.seed)
        self.options, self.shape = options, shape
        self.model = Model(shape)
        self.optimizer = Optimizer(self.model, options.muon, options.adam)
        self.average = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.counts = {"steps": 0, "tokens": 0, "targets": 0, "examples": 0, "pool": 0, "seconds": 0.0}
        self.file = options.work / "checkpoint.pt"

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "shape": asdict(self.shape),
            "optimizer": self.optimizer.state(),
            "counts": self.counts,
        }
        torch.save(state, self.file.with_suffix(".new"))
        os.replace(self.file.with_suffix(".new"), self.file)

    def load(self) -> None:
        state = torch.load(self.file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average, self.counts = state["average"], state["counts"]
        self.optimizer.load(state["optimizer"])

    def average_in(self) -> None:
        """Exponential average of the weights, started short and lengthened."""
        keep = min(0.995, 1 - 10 / (self.counts["steps"] + 10))
        with torch.no_grad():
            for k, v in self.model.state_dict().items():
                self.average[k].lerp_(v, 1 - keep)

    def progress(self) -> float:
        o, used = self.options, self.counts["seconds"]
        if o.steps:
            return self.counts["steps"] / o.steps
        if o.until:
            return used / max(1.0, used + o.until - time.time())
        return used / (o.minutes * 60)


def train(run: Run, tok: Tokenizer) -> None:
    """Pool by pool until the budget is used up."""
    o, counts = run.options, run.counts
    team = Team(run.model, o.workers)
    last = saved = time.time()
    losses: list[float] = []
    while run.progress() < 1:
        rows = conversations(tok, o.seed * 1_000_000 + counts["pool"], run.progress())
        counts["pool"] += 1
        counts["examples"] += POOL
        for grid, where, targets in batches(rows, o.batch, counts["pool"]):
            progress = run.progress()
            if progress >= 1:
                break
            loss = team.gradient(parts(grid, where, targets, o.part))
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            run.optimizer.step(rate(progress))
            run.model.zero_grad(set_to_none=True)
            counts["steps"] += 1
            counts["tokens"] += grid.numel()
            counts["targets"] += len(targets)
            run.average_in()
            losses.append(loss)
            now = time.time()
            counts["seconds"] += now - last
            last = now
            if counts["steps"] % 25 == 0:
                print(
                    f"{counts['steps']:6d} {progress:6.3f} loss {np.mean(losses[-25:]):.4f} "
                    f"tokens/s {counts['tokens'] / counts['seconds']:.0f}",
                    time.strftime("%H:%M:%S"),
                    flush=True,
                )
            if now - saved > o.every:
                run.save()
                saved = now
    run.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/cleanup"), help="model folder to write")
    parser.add_argument("--work", type=Path, default=Path("build/cleanup-work"), help="checkpoints")
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--until", type=float, default=0, help="budget ends at this Unix time")
    parser.add_argument("--steps", type=int, default=0, help="budget in steps instead of time")
    parser.add_argument("--batch", type=int, default=5120, help="tokens a step, padding included")
    parser.add_argument("--muon", type=float, default=0.02)
    parser.add_argument("--adam", type=float, default=3e-3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread")
    parser.add_argument("--part", type=int, default=900, help="tokens that a process takes at a time")
    parser.add_argument("--every", type=float, default=180, help="seconds between checkpoints")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--export-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    shape = Shape()
    if not (options.out / "tokenizer.json").exists():
        tokens.save(tokens.train(shape.vocab_size), options.out)
    tok = Tokenizer.from_file(str(options.out / "tokenizer.json"))
    run = Run(shape, options)
    if run.file.exists():
        run.load()
    if not options.export_only:
        train(run, tok)
    export(run.average, shape, options.out, torch.float16)
    print(json.dumps(run.counts))


if __name__ == "__main__":
    main()
