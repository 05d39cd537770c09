"""Gradients of one step by several processes of one thread each, without a barrier per operation.

On a shared machine a parallel matrix product is as slow as its slowest thread. Here each
process takes the next part of the batch when it is free, so a busy neighbour costs its
share and no more. Weights and gradient sums lie in shared memory.
"""

import multiprocessing as mp
from multiprocessing.connection import Connection

import torch
from model import Model

#: tokens, flat positions of the targets, targets
Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def parts(grid: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, size: int) -> list[Part]:
    """Split a batch into runs of whole lines of about ``size`` tokens."""
    height, width = grid.shape
    step = max(1, size // width)
    line = rows // width
    out = []
    for first in range(0, height, step):
        chosen = (line >= first) & (line < first + step)
        out.append((grid[first : first + step], rows[chosen] - first * width, targets[chosen]))
    return out


class Team:
    """The calling process and ``count - 1`` helpers; ``gradient`` leaves sums in ``.grad``."""

    def __init__(self, model: Model, count: int):
        torch.set_num_threads(1)
        self.model = model.share_memory()
        self.params = list(model.parameters())
        context = mp.get_context("fork")
        self.next = context.Value("l", 0)
        size = sum(p.numel() for p in self.params)
        self.helpers = []
        for _ in range(count - 1):
            ours, theirs = context.Pipe()
            buffer = torch.zeros(size).share_memory_()
            process = context.Process(target=self._help, args=(theirs, buffer), daemon=True)
            process.start()
            self.helpers.append((ours, buffer))

    def _claim(self, work: list[Part], total: int) -> tuple[float, int]:
        """Take parts until none is left: (sum of losses over ``total``, parts done)."""
        loss_sum, done = 0.0, 0
        while True:
            with self.next.get_lock():
                at = self.next.value
                self.next.value += 1
            if at >= len(work):
                return loss_sum, done
            loss = self.model.loss(*work[at]) * (len(work[at][2]) / total)
            loss.backward()
            loss_sum, done = loss_sum + loss.item(), done + 1

    def _help(self, pipe: Connection, buffer: torch.Tensor) -> None:
        torch.set_num_threads(1)
        while True:
            work = [tuple(map(torch.from_numpy, part)) for part in pipe.recv()]
            loss, done = self._claim(work, sum(len(part[2]) for part in work))
            if done:
                torch.cat([p.grad.flatten() for p in self.params], out=buffer)
                self.model.zero_grad(set_to_none=True)
            pipe.send((loss, done))

    def gradient(self, work: list[Part]) -> float:
        """Mean loss over all targets of ``work``; adds its gradient to the parameters."""
        self.next.value = 0
        plain = [tuple(t.numpy() for t in part) for part in work]
        for pipe, _ in self.helpers:
            pipe.send(plain)
        loss, _ = self._claim(work, sum(len(part[2]) for part in work))
        for pipe, buffer in self.helpers:
            other, done = pipe.recv()
            if not done:
                continue
            loss += other
            for p, more in zip(self.params, buffer.split([p.numel() for p in self.params]), strict=True):
                p.grad = more.view_as(p).clone() if p.grad is None else p.grad.add_(more.view_as(p))
        return loss
