"""A strict reader of Prometheus's text exposition format, version 0.0.4, written from its specification.

https://prometheus.io/docs/instrumenting/exposition_formats/. What the page allows and nobody should write (samples
without a type, groups that are torn apart, a last line without its end) is refused, too.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"')
_SAMPLE = re.compile(rf"({_NAME})(?:\{{(.*)\}})? (\S+)")
_ESCAPE = re.compile(r"\\(.)")

Labels = tuple[tuple[str, str], ...]


@dataclass
class Family:
    kind: str
    help: str
    samples: dict[tuple[str, Labels], float] = field(default_factory=dict)

    def value(self, **labels: str) -> float:
        """Of the sample with exactly these labels; of a family that is no histogram."""
        ((_, value),) = [(key, value) for key, value in self.samples.items() if dict(key[1]) == labels]
        return value


def read(text: str) -> dict[str, Family]:
    """All families by name. AssertionError where a line is not as it must be."""
    assert text.endswith("\n")
    families: dict[str, Family] = {}
    name = help_text = ""
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            name, _, help_text = line[7:].partition(" ")
            assert re.fullmatch(_NAME, name), line
            assert name not in families, f"{name} comes twice"
            assert help_text, line
            assert set(re.findall(r"\\(.?)", help_text)) <= {"\\", "n"}, line
        elif line.startswith("# TYPE "):
            typed, _, kind = line[7:].partition(" ")
            assert typed == name, f"TYPE of {typed} follows HELP of {name}"
            assert name not in families
            assert kind in ("counter", "gauge", "histogram", "summary", "untyped"), line
            families[name] = Family(kind, help_text)
        else:
            _take(line, name, families)
    for known, family in families.items():
        assert family.samples, f"{known} has no sample"
        assert family.kind != "counter" or known.endswith("_total"), known
        if family.kind in ("counter", "histogram"):
            assert all(value >= 0 for value in family.samples.values()), known
        if family.kind == "histogram":
            _check_histogram(known, family)
    return families


def _take(line: str, name: str, families: dict[str, Family]) -> None:
    found = _SAMPLE.fullmatch(line)
    assert found, f"no sample: {line!r}"
    sample, inside, value = found.groups()
    family = families[name]
    endings = ("_bucket", "_sum", "_count") if family.kind == "histogram" else ("",)
    assert sample in [name + ending for ending in endings], f"{sample} stands among {name}"
    labels = _labels(inside, line)
    assert (sample, labels) not in family.samples, f"twice: {line}"
    assert re.fullmatch(r"[+-]?(\d+(\.\d+)?(e[+-]?\d+)?|Inf)|NaN", value), line
    family.samples[sample, labels] = float(value)


def _labels(inside: str | None, line: str) -> Labels:
    if inside is None:
        return ()
    labels, at = [], 0
    while at < len(inside):
        found = _LABEL.match(inside, at)
        assert found, f"no label at {inside[at:]!r}: {line}"
        labels.append((found[1], _ESCAPE.sub(lambda part: {"n": "\n"}.get(part[1], part[1]), found[2])))
        at = found.end()
        assert at == len(inside) or inside[at] == ",", line
        at += 1
    assert len({label for label, _ in labels}) == len(labels), f"a label comes twice: {line}"
    assert all(not label.startswith("__") for label, _ in labels), line
    return tuple(sorted(labels))


def _check_histogram(name: str, family: Family) -> None:
    """Of each series: buckets in rising order with rising counts, the last one +Inf and equal to the count."""
    series: dict[Labels, list[tuple[float, float]]] = {}
    for (sample, labels), value in family.samples.items():
        if sample == f"{name}_bucket":
            le = dict(labels)["le"]
            rest = tuple(pair for pair in labels if pair[0] != "le")
            series.setdefault(rest, []).append((float(le), value))
        else:
            assert "le" not in dict(labels)
    assert series
    for labels, buckets in series.items():
        bounds, counts = zip(*buckets, strict=True)
        assert list(bounds) == sorted(set(bounds))
        assert list(counts) == sorted(counts)
        assert bounds[-1] == math.inf
        assert counts[-1] == family.samples[f"{name}_count", labels]
        assert family.samples[f"{name}_sum", labels] >= 0
    expected = {(f"{name}{ending}", labels) for labels in series for ending in ("_sum", "_count")}
    assert expected == {key for key in family.samples if key[0] != f"{name}_bucket"}
