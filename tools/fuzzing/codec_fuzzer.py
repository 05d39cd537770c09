"""The codec's fuzzer: streams are judged by the codec's law, and kept where they reach what none reached before.

Every execution feeds one stream to a Decoder, whole and in a random split. A finding is an exception that is not
ProtocolError, a message that is neither a dict nor Invalid, an answer that depends on the split, a message that breaks
a limit, or a verdict in which the quick way and the full walk of a frame differ.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Hashable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from mlxd_client.errors import ProtocolError
from mlxd_client.types import MAX_DEPTH, MAX_INTEGER

from .codec_inputs import Stream, changed, invented
from .corpus import Corpus
from .covering import copied

__all__ = ["Law", "Report", "fuzz"]

_BLOCKS = 256
# How often a block ran, as powers of two: 1, 2, 4, 8…
_CLASSES = bytes(count.bit_length() for count in range(256))
_VARIABLE = re.compile(r"0x\w+|[^A-Za-z ]")
# So many states of the counters are remembered, in order not to look at one twice.
_REMEMBERED = 500_000
# How often a stream is made up, rather than changed from one that is kept.
_INVENTED = 0.3


class Report(msgspec.Struct):
    """What so many executions came to; `blocks` of `all_blocks` of the codec ran at least once."""

    executions: int = 0
    seconds: float = 0.0
    messages: int = 0
    invalid: int = 0
    errors: int = 0
    blocks: int = 0
    all_blocks: int = 0
    kept: int = 0
    findings: list[str] = []


class Law:
    """Judges what a codec makes of streams.

    Args:
        codec: the module, or a copy of it.
    """

    def __init__(self, codec: ModuleType) -> None:
        self.codec = codec
        self.told: list[str] = []  # what the codec said about the last stream, in words without its bytes

    def judge(self, body: bytes, *, walk: bool) -> Any:
        """The verdict on one msgpack body, walked in Python first or not; comparable."""
        small = self.codec._SMALL
        try:
            self.codec._SMALL = -1 if walk else small
            made = self.codec._decode_msgpack(body, MAX_DEPTH)
        except ProtocolError:
            return "ProtocolError"
        finally:
            self.codec._SMALL = small
        # Of several faults either way may name another first.
        return ("Invalid", made.id) if isinstance(made, self.codec.Invalid) else repr(made)

    def check(self, stream: Stream, draw: random.Random, report: Report) -> None:
        """Feed one stream, and count or report what comes of it."""
        codec = self.codec
        data = b"".join(stream.parts())
        encoding = codec.Encoding.JSON if stream.line else codec.Encoding.MSGPACK
        self.told = []
        try:
            for _, body in () if stream.line else stream.bodies:
                if self.judge(body, walk=False) != self.judge(body, walk=True):
                    report.findings.append(f"the quick way and the walk differ: {body!r}")
            whole = self._read([data], encoding)
            edges = sorted(draw.randrange(len(data) + 1) for _ in range(draw.randrange(4)))
            pieces = [data[a:b] for a, b in zip([0, *edges], [*edges, len(data)], strict=True)]
            if repr(self._read(pieces, encoding)) != repr(whole):
                report.findings.append(f"the split {edges} matters: {data!r}")
        except Exception as error:  # whatever it is, it is what the fuzzer looks for
            report.findings.append(f"{type(error).__name__}: {error}: {data!r}")
            return
        for message in whole:
            if message is ProtocolError:
                report.errors += 1
            elif isinstance(message, codec.Invalid):
                report.invalid += 1
                self.told.append(message.reason)
            elif isinstance(message, dict) and _sound(message, 1):
                report.messages += 1
                if self._read([codec.encode(message, encoding)], encoding) != [message]:
                    report.findings.append(f"does not come back: {message!r}")
            else:
                report.findings.append(f"is no message: {message!r}")

    def _read(self, chunks: list[bytes], encoding: Any) -> list[Any]:
        decoder, made = self.codec.Decoder(encoding), []
        try:
            for chunk in chunks:
                decoder.feed(chunk)
                for message in decoder:
                    made.append(message)  # one by one: those before an error count
        except ProtocolError as error:
            self.told.append(_VARIABLE.sub("", str(error)))
            made.append(ProtocolError)
        return made


def _sound(value: Any, depth: int) -> bool:
    """The limits of a message, said again in the plainest way."""
    if isinstance(value, dict):
        return depth <= MAX_DEPTH and all(type(k) is str and _sound(v, depth + 1) for k, v in value.items())
    if isinstance(value, list):
        return depth <= MAX_DEPTH and all(_sound(v, depth + 1) for v in value)
    if type(value) is int:
        return -MAX_INTEGER <= value <= MAX_INTEGER
    if type(value) is float:
        return value - value == 0.0
    return value is None or type(value) in (str, bool, bytes)


def fuzz(executions: int | None, seed: int = 0, *, seconds: float | None = None, folder: Path | None = None) -> Report:
    """Run so many executions, or so long, whatever ends first. Deterministic by `seed`, but for `seconds`.

    Args:
        folder: where streams that were kept lie between runs.
    """
    hits = bytearray(_BLOCKS)
    module, blocks = copied("mlxd_client.codec", hits)
    law, draw, report = Law(module), random.Random(seed), Report(all_blocks=blocks)
    corpus: Corpus[Stream] = Corpus(folder)
    clean, seen = bytes(_BLOCKS), set[int]()
    began = time.perf_counter()

    def run(stream: Stream) -> None:
        hits[:] = clean
        law.check(stream, draw, report)
        report.executions += 1
        shown = bytes(hits).translate(_CLASSES)
        state = hash((shown, tuple(law.told)))
        if state not in seen:
            if len(seen) > _REMEMBERED:
                seen.clear()
            seen.add(state)
            features: list[Hashable] = [(number, count) for number, count in enumerate(shown) if count]
            corpus.learn(stream, features + law.told)

    for stream in corpus.kept(Stream):
        run(stream)
    while executions is None or report.executions < executions:
        if report.executions % 256 == 0 and seconds is not None and time.perf_counter() - began > seconds:
            break
        if not corpus.inputs or draw.random() < _INVENTED:
            run(invented(draw))
        else:
            run(changed(draw, corpus.pick(draw), corpus.pick(draw)))
    report.seconds = time.perf_counter() - began
    report.blocks = len({feature[0] for feature in corpus.features if isinstance(feature, tuple)})
    report.kept = len(corpus.inputs)
    return report
