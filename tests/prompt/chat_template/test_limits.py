"""Programs of strangers end soon, small, and with one line."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from pocketvlm.errors import BundleError, InputError, PocketVLMError
from pocketvlm.prompt.chat_template import ChatTemplate, budget

HOSTILE = {
    "loops without calls": "{% set l = range(9999)|list %}{% for a in l %}{% for b in l %}{% for c in l %}{% endfor %}{% endfor %}{% endfor %}",
    "tests without calls": "{% set l = range(9999)|list %}{% for a in l if 1 %}{% for b in l if 1 %}{% for c in l if false %}{% endfor %}{% endfor %}{% endfor %}",
    "nested ranges": "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}x{% endfor %}{% endfor %}{% endfor %}",
    "const mult": "{{ 'x' * 10000000000 }}",
    "set mult": "{% set a = 'x' * 10000000000 %}",
    "doubling": "{% set ns = namespace(a='x'*1000) %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a|length }}",
    "plus doubling": "{% set ns = namespace(a='x'*1000) %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a|length }}",
    "indent": "{{ 'x'|indent(10000000000, true) }}",
    "center filter": "{{ 'x'|center(10000000000) }}",
    "center autoescape": "{% autoescape 'x'|center(10000000000) %}a{% endautoescape %}",
    "center method": "{{ 'x'.center(10000000000) }}",
    "join": "{{ (range(100000)|list)|join('x'*1000000) }}",
    "join method": "{{ ('x'*1000000).join(range(100000)|map('string')) }}",
    "replace": "{{ ('x'*1000000)|replace('x', 'y'*1000000) }}",
    "replace method": "{{ ('x'*1000000).replace('x', 'y'*1000000) }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "percent filter": "{{ '%999999999d'|format(1) }}",
    "format": "{{ '{:>9999999999}'.format('a') }}",
    "format nested": "{{ '{:>{w}}'.format('a', w=9999999999) }}",
    "format_map": "{{ '{a:>9999999999}'.format_map({'a': 1}) }}",
    "zfill": "{{ '1'.zfill(10000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(10000000000) }}",
    "pow": "{{ 10 ** 10 ** 8 }}",
    "pow2": "{% set x = 2 %}{% set y = x ** 100000000000 %}",
    "mults": "{% set ns = namespace(a=7) %}{% for i in range(100000) %}{% set ns.a = ns.a * ns.a %}{% endfor %}",
    "round": "{{ 5|round(-1000000000) }}",
    "round ceil": "{{ 5|round(1000000000, 'ceil') }}",
    "macro recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "list laughs": "{% set ns = namespace(a=['x']) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
    "ns laughs": "{% set ns = namespace(a=namespace(b='x')) %}{% for i in range(60) %}{% set ns.a = namespace(l=ns.a, r=ns.a) %}{% endfor %}{{ ns.a }}",
    "ns cycle": "{% set ns = namespace() %}{% set ns.me = ns %}{{ ns }}",
    "dict laughs eq": "{% set ns = namespace(a={}, b={}) %}{% for i in range(60) %}{% set ns.a = {'l': ns.a, 'r': ns.a} %}{% set ns.b = {'l': ns.b, 'r': ns.b} %}{% endfor %}{{ ns.a == ns.b }}",
    "batch": "{{ [1]|batch(10000000000, 'x')|list }}",
    "slice": "{{ [1]|slice(10000000000)|list }}",
    "lipsum": "{{ lipsum(1000000000) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "extends": "{% extends 'x' %}",
    "tojson indent": "{{ [[[[1]]]]|tojson(indent=1000000000) }}",
    "tojson separators": "{{ range(10000)|list|tojson(separators=('x'*1000000, ':')) }}",
    "sum": "{{ [[1]*1000]*1000|sum(start=[]) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "block recursion": "{% block a %}{{ self.a() }}{% endblock %}",
    "big literal loop": "{% for i in range(100000) %}{% for j in range(100) %}"
    + "y" * 100000
    + "{% endfor %}{% endfor %}",
    "set block": "{% set z %}{% for i in range(100000) %}"
    + "y" * 100000
    + "{% endfor %}{% endset %}{{ z|length }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "to_bytes": "{{ (1).to_bytes(10000000000, 'big') }}",
    "filtered for": "{% for a in range(100000) %}{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
    "in": "{% set b = 'x'*4000000 %}{% for i in range(100000) %}{% if 'y' in b %}{% endif %}{% endfor %}",
    "slices": "{% set b = 'x'*4000000 %}{% for i in range(100000) %}{% set c = b[1:] %}{% endfor %}",
    "upper": "{% set b = 'x'*4000000 %}{% for i in range(100000) %}{% set c = b|upper %}{% endfor %}",
    "keep": "{% set ns = namespace(l=[]) %}{% for i in range(1000) %}{% set ns.l = ns.l + [('x'*400000)~i] %}{% endfor %}",
    "wide keep": "{% set ns = namespace(l=[]) %}{% for i in range(1000) %}{% set ns.l = ns.l + [('\U0001f600'*100000)~i] %}{% endfor %}",
    "lists keep": "{% for i in range(1000) %}{% set l = range(100000)|list %}{% endfor %}",
    "hex": "{% set a = 0x" + "f" * 100000 + " %}{{ a * a }}",
    "digits": "{{ " + "9" * 100000 + " }}",
    "parens": "{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}",
    "lists": "{{ " + "[" * 50000 + "]" * 50000 + " }}",
    "nots": "{{ " + "not " * 30000 + "1 }}",
    "adds": "{{ " + "1+" * 60000 + "1 }}",
    "tildes": "{{ " + "1~" * 60000 + "1 }}",
    "ifs": "{% if a %}" * 10000 + "{% endif %}" * 10000,
    "fors": "{% for a in b %}" * 1000 + "{% endfor %}" * 1000,
    "fors21": "{% for a in b %}" * 21 + "{% endfor %}" * 21,
    "sib fors": "{% for a in b %}{{ a }}{% endfor %}" * 3500,
    "outputs": "{{ a }}" * 18000,
    "names": "".join("{%% set a%d = 1 %%}" % i for i in range(6000)),
    "names fors": "".join(
        "{%% set a%d = 1 %%}{%% for x in b %%}{%% endfor %%}" % i for i in range(2500)
    ),
    "elifs": "{% if a %}" + "{% elif a %}" * 9000 + "{% endif %}",
    "minus": "{%-" * 40000,
    "spaces": " " * 130000 + "{{",
    "braces": "{" * 131000,
    "comment": "{#" * 60000,
    "nested fors names": "".join("{%% set a%d = 1 %%}" % i for i in range(2000))
    + "{% for q in b %}" * 18
    + "".join("{{ a%d }}" % i for i in range(2000))
    + "{% endfor %}" * 18,
    "dict bomb": "{{ " + "{1:" * 30000 + "1" + "}" * 30000 + "}}",
    "raise big": "{{ raise_exception('x'*4000000) }}",
    "strftime": "{{ strftime_now('%999999999d') }}",
    "strftime2": "{{ strftime_now('%c'*2000) }}",
    "cycler": "{% set c = cycler('a') %}{% for i in range(100000) %}{% for j in range(1000) %}{{ c.next() }}{% endfor %}{% endfor %}",
    "joiner": "{% set c = joiner('x'*4000000) %}{% for i in range(100000) %}{{ c() }}{% endfor %}",
    "sort": "{% for i in range(1000) %}{% set x = range(100000)|list|sort %}{% endfor %}",
    "hash": "{% set ns = namespace(t=(1,)) %}{% for i in range(60) %}{% set ns.t = (ns.t, ns.t) %}{% endfor %}{{ {ns.t: 1} }}",
    "unique": "{% for i in range(1000) %}{% set x = range(100000)|unique|list %}{% endfor %}",
    "split": "{% for i in range(1000) %}{% set x = (','*4000000).split(',') %}{% endfor %}",
    "map center": "{{ ['a']|map('center', 10000000000)|list }}",
    "title": "{% for i in range(10000) %}{% set x = ('a '*2000000)|title %}{% endfor %}",
    "truncate": "{{ 'a'|truncate(10000000000) }}",
    "wordcount": "{% for i in range(10000) %}{% set x = ('a '*2000000)|wordcount %}{% endfor %}",
    "call block": "{% macro f() %}{{ caller() }}{% endmacro %}{% call f() %}{% for i in range(100000) %}"
    + "z" * 100000
    + "{% endfor %}{% endcall %}",
    "filter block": "{% filter center(10000000000) %}a{% endfilter %}",
    "caller rec": "{% macro f() %}{{ caller() }}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}{% call f() %}a{% endcall %}",
    "mul list": "{{ [1] * 10000000000 }}",
    "mul tuple": "{% set a = 10000000000 * (1,) %}",
    "mul float": "{{ 1e308 * 10 }}",
    "div": "{{ 1 // 0 }}",
    "exit": "{{ raise_exception(1) }}",
    "attr": "{{ 'a'|attr('center')(10000000000) }}",
    "dict loop": "{{ dict.fromkeys(range(100000), 'x'*4000000) }}",
    "range attr": "{{ range.__globals__ }}",
    "ctx": "{{ self._TemplateReference__context }}",
    "urlencode": "{% for i in range(10000) %}{% set x = ('é'*1000000)|urlencode %}{% endfor %}",
}

HARMLESS = {"strftime", "strftime2", "truncate", "range attr", "ctx", "mul float"}
"""What sounds worse than it is, and ends with a short text."""


def render(source):
    template = ChatTemplate(source, Path("x.jinja"))
    template.check(error=BundleError)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}
    return template.render([message], {"b": [1, 2], "bos_token": "<s>"})


@pytest.mark.parametrize("name", HOSTILE)
def test_it_ends_soon_and_small(name, monkeypatch):
    # A thirty-second of the real budget, for the same mechanism in less time.
    monkeypatch.setattr(budget, "_UNITS", 2**19)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    if name in HARMLESS:
        assert len(render(HOSTILE[name])) < 100_000
    else:
        with pytest.raises(PocketVLMError) as caught:
            render(HOSTILE[name])
        assert len(str(caught.value)) < 300
        assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


def test_the_real_budget_ends_the_work_too():
    start = time.monotonic()
    with pytest.raises(InputError, match="computes too much|more than 5 seconds"):
        render(HOSTILE["nested ranges"])
    assert time.monotonic() - start < 15


def test_the_clock_ends_what_the_units_misjudge(monkeypatch):
    monkeypatch.setattr(budget, "_UNITS", 2**60)
    monkeypatch.setattr(budget, "_SECONDS", 0.2)
    with pytest.raises(InputError, match="runs for more than"):
        render(HOSTILE["nested ranges"])


def test_waiting_for_a_busy_machine_is_not_the_templates_work(monkeypatch):
    monkeypatch.setattr(budget, "_SECONDS", 0.2)
    work = budget.Budget()
    time.sleep(0.3)
    work.step()


def test_more_input_may_cost_more():
    words = "word " * 1_000_000
    template = ChatTemplate("{{ messages[0].content | upper }}", Path("x"))
    assert template.render([{"role": "user", "content": words}], {}) == words.upper()


def test_a_rendering_that_was_ended_leaves_the_next_one_alone():
    with pytest.raises(InputError):
        render(HOSTILE["doubling"])
    assert render("{{ 'a' * 3 }}") == "aaa"
