"""Chat templates that build too much: refused before they do, and what ordinary ones do is as it was."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlxd.childwire import Generate
from mlxd.worker import prompt, templates
from mlxd.worker.engine import Engine
from mlxd.worker.load import load
from mlxd.worker.templates import BoundedEnvironment, rendering
from mlxd_client.errors import ModelInvalid, RpcError
from support import tiny_model, tool_templates

START = "{% set ns = namespace(s='xx') %}{% for i in range(99) %}"
# Each would take gigabytes, in one call or in few.
GREEDY = [
    "{{ 'x' * 10**10 }}",
    "{{ 10**10 * 'x' }}",
    "{{ [1] * 10**10 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    START + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    START + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    START + "{% set ns.s = ns.s|replace('x', ns.s) %}{% endfor %}",
    START + "{% set ns.s = ns.s.replace('x', ns.s) %}{% endfor %}",
    START + "{% set ns.s = ([ns.s] * 9)|join %}{% endfor %}",
    START + "{% set ns.s = ns.s.join([ns.s] * 9) %}{% endfor %}",
    START + "{% set ns.s = ns.s.join(ns.s) %}{% endfor %}",
    START + "{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}",
    START + "{% set ns.s = '{0}{0}'.format(ns.s) %}{% endfor %}",
    START + "{% set ns.s = '%s%s'|format(ns.s, ns.s) %}{% endfor %}",
    START + "{% set ns.s = [ns.s, ns.s]|tojson %}{% endfor %}",
    START + "{% set ns.s = [ns.s, ns.s]|string %}{% endfor %}",
    START + "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    START + "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s|tojson }}",
    START + "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    START + "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s ~ 1 }}",
    "{% set s = 'x' * 10**6 %}{% for i in range(90000) %}{{ s }}{% endfor %}",
    "{% set ns = namespace(l=[]) %}{% set s = 'x' * 10**7 %}"
    "{% for i in range(90000) %}{% set ns.l = ns.l + [s ~ i] %}{% endfor %}",
    "{{ 'x'|center(10**10) }}",
    "{{ 'x'.center(10**10) }}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ 'x'.zfill(10**10) }}",
    "{{ '\t'.expandtabs(10**10) }}",
    "{{ 'x'|indent(10**10, first=true) }}",
    "{{ ('x\n' * 10**5)|indent(10**6) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**10) }}",
    "{{ '{a:{w}}'.format_map({'a': 1, 'w': 10**10}) }}",
    "{{ '%10000000000d'|format(1) }}",
    "{{ [1]|tojson(indent=10**10) }}",
    "{{ [1]|batch(10**10, 'x')|list }}",
    "{{ lipsum(n=10**10) }}",
    "{{ ('x' * 1000).translate({120: 'y' * 10**6}) }}",
    "{{ ['x' * 10**6]|map('replace', 'x', 'y' * 10**6)|list }}",
    "{{ (('x' * 10**6 ~ ' ') * 30)|wordwrap(1, wrapstring='y' * 10**6) }}",
]
# What templates do all day.
HARMLESS = [
    "{{ 'ab' * 3 }}{{ 2 * 3 }}{{ 2 ** 5 }}{{ 7 % 4 }}{{ 'a' + 'b' }}{{ [1] + [2] }}{{ 'a' ~ 1 ~ none }}{{ 1.5 * 2 }}",
    "{{ '%s is %d' % ('a', 3) }}{{ '%(x)s' % {'x': 1} }}{{ '{} {a}'.format(1, a=2) }}{{ '%05d'|format(3) }}",
    "{{ ['a', 'b']|join(', ') }}{{ ', '.join(['a', 'b']) }}{{ 'aba'|replace('a', 'x') }}{{ 'aba'.replace('b', '') }}",
    "{{ {'a': [1, {'b': 'ü'}]}|tojson }}{{ {'a': 1}|tojson(indent=2) }}{{ 'a\nb'|indent(4) }}{{ 'a'.center(5) }}",
    "{{ [1, 2, 3]|sum }}{{ [3, 1]|sort|first }}{{ 'a b'|title }}{{ [{'a': 1}]|map(attribute='a') | list }}",
    "{{ 'a,b'.split(',') }}{{ 'abc'[::-1] }}{{ 'x'|upper }}{{ range(3)|list }}{{ [1, 2]|length }}{{ 'x' in 'xy' }}",
    "{% macro m(a) %}[{{ a }}]{% endmacro %}{{ m('x') }}{% set y %}{{ m(1) }}{% endset %}{{ y }}{{ y|length }}",
    "{% for part in ['a', 'b'] %}{{ loop.index ~ part }}{% endfor %}{{ [1, 2, 3]|batch(2)|list }}{{ {}|items|list }}",
    "{{ 'a\tb'.expandtabs(4) }}{{ 'aa bb cc'|wordwrap(3) }}{{ 'x'|string|list }}{{ ['b', 'a']|sort(reverse=true) }}",
]  # fmt: skip


@pytest.mark.parametrize("text", HARMLESS)
def test_what_templates_do_comes_to_the_same(text: str) -> None:
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}
    wanted = ImmutableSandboxedEnvironment(**options).from_string(text).render()
    with rendering():
        assert BoundedEnvironment(**options).from_string(text).render() == wanted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.build(tmp_path_factory.mktemp("models") / "m")


@pytest.mark.model
def test_a_template_that_builds_too_much_is_refused_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the tokenizer, as any template is: were the sandbox not in place, the first would take 10 GB."""
    monkeypatch.setattr(prompt, "TEMPLATE_LIMIT_S", 0.5)
    monkeypatch.setattr(templates, "MAX_TEXT", 1 << 22)
    monkeypatch.setattr(templates, "MAX_BUILT", 1 << 26)
    loaded = load(str(folder), lambda fraction: None)
    engine = Engine(loaded, max_batch=2, prefill_step=64)
    for number, text in enumerate(GREEDY):
        loaded.tokenizer._tokenizer.chat_template = text
        began = time.perf_counter()
        with pytest.raises(ModelInvalid) as refused:
            engine.submit(number, Generate(kind="chat", messages=[{"role": "user", "content": "x"}]))
        assert "more than" in refused.value.message or "longer than" in refused.value.message, (text, refused.value)
        assert time.perf_counter() - began < 5, text
        assert not engine.busy
    loaded.tokenizer._tokenizer.chat_template = tiny_model.CHAT_TEMPLATE
    engine.submit(99, Generate(kind="chat", messages=[{"role": "user", "content": "x"}], options={"max_tokens": 2}))
    while engine.busy:
        ended = engine.step().ended
    assert not isinstance(ended[0][1], RpcError)


def test_each_rendering_may_build_as_much_as_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_TEXT", 1000)
    monkeypatch.setattr(templates, "MAX_BUILT", 1500)
    template = BoundedEnvironment().from_string("{{ 'x' * n }}")
    for _ in range(3):
        with rendering():
            assert len(template.render(n=700)) == 700
    with pytest.raises(ModelInvalid), rendering():
        template.render(n=1001)
    with pytest.raises(ModelInvalid), rendering():
        template.render(n=760)


def test_templates_of_families_are_compiled_in_it(tmp_path: Path) -> None:
    """All that is tested with real templates elsewhere went through this sandbox."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    made = _compile_jinja_template(tool_templates.HERMES)
    assert isinstance(made.environment, BoundedEnvironment)
