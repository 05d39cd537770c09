"""Layers that compute adapters beside the base model, for rows with different ones in one batch.

LoRA adds scale * (x @ A) @ B to what a layer gives. DoRA also scales each output: with W the layer's weights, by
m / |W + scale * A @ B|, which stays the same and is computed once. https://arxiv.org/abs/2106.09685,
https://arxiv.org/abs/2402.09353

A layer that some adapter changes gets a class before its own, as in early.py: its weights and names stay. Which row has
which adapter is said by a Mix that is in force while a forward pass is described; without one, layers are the base
model's. Where all rows have the same adapter its matrices are used as they are; else those of all adapters lie stacked,
padded to one rank, and each row takes its own. Slot 0 is zeros: no adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP

from mlxd_client.errors import InternalError

__all__ = ["BASE", "Delta", "Mix", "Slot", "adapt", "dimensions", "kind_of", "magnitude_scale", "release", "restore"]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one adapter does to one layer.

    Attributes:
        down: [in, rank], for experts [experts, in, rank].
        up: [rank, out], times the scale; for experts [experts, rank, out].
        columns: [out], what DoRA multiplies each output by; None for LoRA.
    """

    down: mx.array
    up: mx.array
    columns: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        return [self.down, self.up] + ([] if self.columns is None else [self.columns])

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


class Slot:
    """An adapter's place in the stacks of the layers, from 1."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class Mix:
    """Which adapter each row of a batch has. `with mix:` around a call of the model puts it in force."""

    __slots__ = ("_before", "numbers", "one", "present", "slots")

    def __init__(self, slots: Sequence[Slot | None]) -> None:
        self.numbers = [0 if slot is None else slot.number for slot in slots]
        self.present = frozenset(self.numbers)
        self.one = self.numbers[0] if len(self.present) == 1 else None
        self.slots = mx.array(self.numbers, dtype=mx.uint32)
        self._before: Mix | None = None

    @staticmethod
    def of(slots: Sequence[Slot | None]) -> Mix | None:
        """None where no row has an adapter."""
        return Mix(slots) if any(slot is not None for slot in slots) else None

    def __enter__(self) -> None:
        self._before, _force.mix = _force.mix, self

    def __exit__(self, *exception: object) -> None:
        _force.mix, self._before = self._before, None


# In force where no row has an adapter.
BASE = contextlib.nullcontext()


class _Force:
    mix: Mix | None = None
    experts: mx.array | None = None  # the slot of each line that reaches a layer of experts, where rows differ


_force = _Force()


class Deltas:
    """What all adapters do to one layer, by slot. The stacks are built when rows first differ."""

    def __init__(self, *, experts: int = 0) -> None:
        self._each: dict[int, Delta] = {}
        self._stack: Delta | None = None
        self._last = 0  # the last slot that the stack has
        self._experts = experts

    def __bool__(self) -> bool:
        return bool(self._each)

    def put(self, slot: int, delta: Delta) -> None:
        self._each[slot] = delta
        self._stack = None

    def drop(self, slot: int) -> None:
        self._each.pop(slot, None)
        self._stack = None

    def one(self, slot: int) -> Delta | None:
        return self._each.get(slot)

    def concern(self, mix: Mix) -> bool:
        """Whether any row of this mix has an adapter that changes this layer."""
        return not self._each.keys().isdisjoint(mix.present)

    def stack(self, mix: Mix) -> Delta:
        """All of them with the slot as the first axis; with experts, the slot's and the expert's as one."""
        last = max(*self._each, *mix.present)
        if self._stack is None or self._last < last:
            deltas = [self._each.get(slot) for slot in range(last + 1)]
            like = next(iter(self._each.values()))
            rank = max(delta.down.shape[-1] for delta in self._each.values())
            down = mx.stack([_padded(delta, like, "down", rank) for delta in deltas])
            up = mx.stack([_padded(delta, like, "up", rank) for delta in deltas])
            columns = None
            if any(delta.columns is not None for delta in self._each.values()):
                ones = mx.ones(like.up.shape[-1:])
                held = [delta.columns if delta is not None else None for delta in deltas]
                columns = mx.stack([ones if column is None else column for column in held])
            if self._experts:
                down, up = down.flatten(0, 1), up.flatten(0, 1)
            self._stack, self._last = Delta(down, up, columns), last
            mx.eval(self._stack.arrays)
        return self._stack


def _padded(delta: Delta | None, like: Delta, name: str, rank: int) -> mx.array:
    """A matrix of an adapter with its rank filled up by zeros; all zeros where there is none."""
    array: mx.array = getattr(delta or like, name)
    axis = -1 if name == "down" else -2
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, rank - array.shape[axis])
    padded = mx.pad(array, widths)
    return padded if delta is not None else mx.zeros_like(padded)


# --- layers -----------------------------------------------------------------------------------------------------------


class _Adapted(nn.Module):  # type: ignore[misc]
    """Comes before a layer's own class, which stays its class in every other respect."""

    deltas: Deltas

    def _plain(self, call: Any, *arguments: Any, bias: bool = True, **options: Any) -> mx.array:
        """What the layer itself gives, without its bias where that comes later."""
        held = None if bias else self.pop("bias", None)
        try:
            made: mx.array = call(*arguments, **options)
        finally:
            if held is not None:
                self["bias"] = held
        return made

    def _product(self, x: mx.array, call: Any) -> mx.array:
        """The layer as a matrix that x is multiplied by, with what the adapters make of it."""
        mix, deltas = _force.mix, self.deltas
        if mix is None or not deltas.concern(mix):
            return call(x)  # type: ignore[no-any-return]
        if mix.one is not None:
            delta = deltas.one(mix.one)
            assert delta is not None
            z = (x @ delta.down) @ delta.up
            columns = delta.columns
        else:
            delta = deltas.stack(mix)
            rows = len(mix.numbers)
            if x.size // x.shape[-1] % rows:
                raise InternalError("this layer cannot tell its rows apart: adapters cannot be mixed in this model")
            lines = x.reshape(rows, -1, x.shape[-1])
            z = mx.gather_mm(lines, delta.down, rhs_indices=mix.slots)
            z = mx.gather_mm(z, delta.up, rhs_indices=mix.slots)
            columns = delta.columns
            if columns is not None:
                columns = mx.broadcast_to(columns[mix.slots][:, None, :], z.shape).reshape(*x.shape[:-1], -1)
            z = z.reshape(*x.shape[:-1], -1)
        if columns is None:
            y = call(x)
            return y + z.astype(y.dtype)  # type: ignore[no-any-return]
        y = self._plain(call, x, bias=False)
        y = columns.astype(y.dtype) * (y + z.astype(y.dtype))
        return y + self["bias"] if "bias" in self else y


class _AdaptedLinear(_Adapted):
    def __call__(self, x: mx.array) -> mx.array:
        return self._product(x, super().__call__)


class _AdaptedEmbedding(_Adapted):
    """An embedding is a matrix [tokens, width]: seen as a layer, its outputs are the tokens."""

    def __call__(self, tokens: mx.array) -> mx.array:
        mix, deltas = _force.mix, self.deltas
        y = super().__call__(tokens)
        if mix is None or not deltas.concern(mix):
            return y  # type: ignore[no-any-return]
        if mix.one is not None:
            delta = deltas.one(mix.one)
            assert delta is not None
            z = delta.up.T[tokens] @ delta.down.T
            columns = None if delta.columns is None else delta.columns[tokens]
        else:
            delta = deltas.stack(mix)
            lines = tokens.reshape(len(mix.numbers), -1)
            slots = mix.slots[:, None]
            z = mx.gather_mm(
                delta.up.swapaxes(-1, -2)[slots, lines], delta.down.swapaxes(-1, -2), rhs_indices=mix.slots
            )
            z = z.reshape(*tokens.shape, -1)
            columns = None if delta.columns is None else delta.columns[slots, lines].reshape(tokens.shape)
        y = y + z.astype(y.dtype)
        return y if columns is None else columns[..., None].astype(y.dtype) * y  # type: ignore[no-any-return]

    def as_linear(self, x: mx.array) -> mx.array:
        return self._product(x, super().as_linear)


class _AdaptedExperts(_Adapted):
    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        mix, deltas = _force.mix, self.deltas
        y = super().__call__(x, indices, sorted_indices=sorted_indices)
        if mix is None or not deltas.concern(mix):
            return y  # type: ignore[no-any-return]
        if mix.one is not None:
            delta = deltas.one(mix.one)
            assert delta is not None
        else:
            delta = deltas.stack(mix)
            if _force.experts is None:
                raise InternalError("adapters of these experts cannot be mixed in one batch")
            indices, sorted_indices = indices + _force.experts * self.num_experts, False
        z = mx.gather_mm(x, delta.down, rhs_indices=indices, sorted_indices=sorted_indices)
        z = mx.gather_mm(z, delta.up, rhs_indices=indices, sorted_indices=sorted_indices)
        return y + z.astype(y.dtype)  # type: ignore[no-any-return]


class _AdaptedBlock(nn.Module):  # type: ignore[misc]
    """A block of experts. It may sort its lines by expert, so that they say no more whose they are: it is said here."""

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        mix = _force.mix
        if mix is None or mix.one is not None:
            return super().__call__(x, indices)  # type: ignore[no-any-return]
        each = indices.size // len(mix.numbers)
        slots = mx.repeat(mix.slots, each)
        # As switch_layers._gather_sort does, at the same length.
        slots = slots[mx.argsort(indices.flatten())] if indices.size >= 64 else slots.reshape(indices.shape)
        _force.experts = slots
        try:
            return super().__call__(x, indices)  # type: ignore[no-any-return]
        finally:
            _force.experts = None


_KINDS: dict[Any, type] = {
    nn.Linear: _AdaptedLinear,
    nn.QuantizedLinear: _AdaptedLinear,
    nn.Embedding: _AdaptedEmbedding,
    nn.QuantizedEmbedding: _AdaptedEmbedding,
    SwitchLinear: _AdaptedExperts,
    QuantizedSwitchLinear: _AdaptedExperts,
    SwitchGLU: _AdaptedBlock,
    SwitchMLP: _AdaptedBlock,
}


def kind_of(layer: Any, block: Any) -> str | None:
    """What a layer within `block` is to an adapter: `linear`, `embedding` or `experts`; None for what cannot have one.

    Experts can in a block that is known to sort its lines in one way only.
    """
    if _KINDS.get(_own(layer)) is _AdaptedExperts and _own(block) not in (SwitchGLU, SwitchMLP):
        return None
    kind: Any = _KINDS.get(_own(layer))
    names: dict[Any, str] = {_AdaptedLinear: "linear", _AdaptedEmbedding: "embedding", _AdaptedExperts: "experts"}
    return names.get(kind) if kind is not None else None


def _own(layer: Any) -> type:
    """The layer's class before it was adapted."""
    kind = type(layer)
    return kind.__bases__[1] if issubclass(kind, (_Adapted, _AdaptedBlock)) else kind


def dimensions(layer: Any) -> tuple[int, int, int]:
    """(in, out, experts) of a layer that can have an adapter; an embedding's outputs are its tokens."""
    *experts, outputs, inputs = layer.weight.shape
    if "scales" in layer:
        inputs = layer.scales.shape[-1] * layer.group_size
    return inputs, outputs, experts[0] if experts else 0


def magnitude_scale(layer: Any, down: mx.array, up: mx.array, magnitude: mx.array | None) -> mx.array:
    """DoRA's m / |W + scale * A @ B| for each output; without a magnitude m is |W|."""
    weight = layer.weight
    if "scales" in layer:
        weight = mx.dequantize(
            weight, layer.scales, layer.get("biases"), group_size=layer.group_size, bits=layer.bits, mode=layer.mode
        )
    weight = weight.astype(mx.float32)
    if magnitude is None:
        magnitude = mx.linalg.norm(weight, axis=1)
    adapted = weight + (down.astype(mx.float32) @ up.astype(mx.float32)).T
    return magnitude.astype(mx.float32) / mx.linalg.norm(adapted, axis=1)


def adapt(model: Any, slot: int, deltas: Mapping[str, Delta]) -> None:
    """Have the layers at these paths compute their deltas for rows of this slot."""
    modules = dict(model.named_modules())
    for path, delta in deltas.items():
        layer = modules[path]
        if not isinstance(layer, _Adapted):
            layer.deltas = Deltas(experts=dimensions(layer)[2])
            _become(layer)
            block = modules.get(path.rpartition(".")[0])
            if type(block) in (SwitchGLU, SwitchMLP):
                _become(block)
        layer.deltas.put(slot, delta)


def _become(layer: Any) -> None:
    kind = type(layer)
    layer.__class__ = type(kind.__name__, (_KINDS[kind], kind), {})


def release(model: Any, slot: int) -> None:
    """Have all layers forget what this slot's adapter does to them."""
    for layer in _adapted(model):
        layer.deltas.drop(slot)


def restore(model: Any) -> None:
    """Make layers that no adapter changes the model's own again."""
    layers = _adapted(model)
    for layer in layers:
        if not layer.deltas:
            layer.__class__ = _own(layer)
            del layer.deltas
    if not any(isinstance(layer, _Adapted) for layer in layers):
        for _, module in model.named_modules():
            if isinstance(module, _AdaptedBlock):
                module.__class__ = _own(module)


def _adapted(model: Any) -> list[Any]:
    return [module for _, module in model.named_modules() if isinstance(module, _Adapted)]
