"""Prints the largest difference between the trainer's logits and mlx_lm's on real text."""

import argparse
from pathlib import Path
from random import Random

import mlx.core as mx
import numpy as np
import torch
from corrupt import example
from mlx_lm import load
from model import Model, Shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint.pt of the run")
    options = parser.parse_args()
    saved = torch.load(options.checkpoint, weights_only=True)
    model = Model(Shape(**saved["shape"]))
    model.load_state_dict(saved["average"])
    shipped, tok = load(str(options.folder))
    shipped.set_dtype(mx.float32)
    worst, same, total = 0.0, 0, 0
    for seed in range(20):
        raw, clean = example(Random(seed))
        messages = [{"role": "user", "content": raw}, {"role": "assistant", "content": clean}]
        ids = tok.apply_chat_template(messages)
        theirs = np.array(shipped(mx.array([ids]))[0])
        with torch.no_grad():
            ours = model(torch.tensor([ids]))[0].numpy()
        worst = max(worst, float(np.abs(ours - theirs).max()))
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        total += len(ids)
    print(f"largest difference of a logit {worst:.5f}; same top token at {same} of {total} positions")


if __name__ == "__main__":
    main()
