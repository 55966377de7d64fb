"""What a chat template may make: any text that it could in Jinja's own sandbox, but no more than memory holds."""

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.api.generate import template_sandbox
from server.api.generate.chat_template import ChatTemplate, TemplateError

# With room for 10,000 characters; without a limit each would make a million or so.
PADDING = {
    "a filter": "{{ 'x' | center(500000) }}",
    "a method": "{{ 'x'.ljust(500000) }}",
    "by a name": "{% set f = 'x'['rjust'] %}{{ f(500000) }}",
    "mapped": "{{ ['x'] | map('center', 500000) | list }}",
    "tabs": "{{ '\\t\\t'.expandtabs(500000) }}",
    "indented": "{{ ('a\\n' * 500) | indent(1000) }}",
    "indented by a text": "{{ ('a\\n' * 500) | indent('x' * 1000) }}",
    "replaced": "{{ ('a' * 1000) | replace('a', 'b' * 1000) }}",
    "replaced by a method": "{{ ('a' * 1000).replace('a', 'b' * 1000) }}",
    "nothing replaced": "{{ ('a' * 1000).replace('', 'b' * 1000) }}",
    "joined": "{{ range(500) | join('x' * 1000) }}",
    "joined by a method": "{{ ('x' * 1000).join(range(500) | map('string')) }}",
    "percent": "{{ '%500000d' % 1 }}",
    "percent, many times": "{{ '%(a)s' * 1000 % {'a': 'x' * 1000} }}",
    "a width from the arguments": "{{ '%*d' % (500000, 1) }}",
    "format": "{{ '%.500000f' | format(1.0) }}",
    "braces": "{{ '{:500000}'.format(1) }}",
    "braces, many times": "{{ ('{0}' * 1000).format('x' * 1000) }}",
    "a width in braces": "{{ '{:{w}}'.format(1, w=500000) }}",
    "a map of values": "{{ '{a:{w}}'.format_map({'a': 1, 'w': 500000}) }}",
    "translated": "{{ ('a' * 1000).translate({97: 'b' * 1000}) }}",
    "JSON": "{{ range(100) | list | tojson(indent=5000) }}",
    "JSON, wide": "{{ range(100) | list | tojson(separators=('x' * 5000, ':')) }}",
    "batches": "{{ [1] | batch(500000, 'x') | list }}",
    "slices": "{{ [1] | slice(500000) | list }}",
    "rounding": "{{ 1 | round(500000, 'ceil') }}",
    "bytes": "{{ (1).to_bytes(500000, 'big') | length }}",
    "keywords": "{{ (1).to_bytes(length=500000, byteorder='big') | length }}",
    "growing": "{% set n = namespace(x='x') %}{% for _ in range(20) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "adding": "{% set n = namespace(x='x') %}{% for _ in range(20) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "lists in lists": "{% set n = namespace(x=['x']) %}{% for _ in range(20) %}{% set n.x = [n.x, n.x] %}{% endfor %}",
    "mappings": "{% set n = namespace(x=1) %}{% for _ in range(20) %}{% set n.x = {1: n.x, 2: n.x} %}{% endfor %}",
    "arguments": "{% set n = namespace(x='x') %}{% macro f() %}{% set n.x = varargs %}{% endmacro %}"
    "{% for _ in range(20) %}{{ f(n.x, n.x) }}{% endfor %}{{ n.x }}",
    "parts": "{% set n = namespace(x=[]) %}{% set t = 'x' * 1000 %}"
    "{% for _ in range(1000) %}{% set n.x = [n.x, t[1:]] %}{% endfor %}",
    "printing": "{% set t = 'x' * 1000 %}{% for _ in range(1000) %}{{ t }}{% endfor %}",
    "a block": "{% set b %}{% for _ in range(1000) %}{{ [1] * 100 }}{% endfor %}{% endset %}",
    "numbers": "{% set n = namespace(x=3) %}{% for _ in range(20) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a sum of lists": "{{ [[1], [2]] | sum(start=[]) }}",
    "a long text for a slow filter": "{{ ('<' * 9000) | wordwrap(1, wrapstring='xxxx') }}",
    "time": "{% set t = 'x' * 9000 %}{% for _ in range(100000) %}{% if 'y' in t %}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("name", PADDING)
def test_a_template_that_pads_fails_before_memory_is_short(name, monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_CHARACTERS", 10_000)
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.002)
    with pytest.raises(TemplateError, match=r"makes more|unfolds|bits|digits|numbers only|takes more"):
        ChatTemplate(PADDING[name], {}).render([])


SOURCES = [
    "{{ 'a' | center(9) }}{{ 'x' ~ 1 ~ none ~ [1, 'a'] ~ missing }}{{ ', '.join(m | map(attribute='role')) }}",
    "{{ m | map(attribute='role') | join('; ') }}{{ m | join('|', attribute='content') }}{{ '%5.1f|%s' % (2, 'b') }}",
    "{{ '{:>5}{a[k]}{{'.format(3, a={'k': 1}) }}{{ '%s-%s' | format('a', [1]) }}{{ 'abc'[1:] + 'd' }}",
    "{{ (m | map('length') | list) + [1] }}{{ m[::-1][0] }}{{ 'a\nb' | indent }}{{ 'aXbX'.replace('X', '--', 1) }}",
    "{{ [3, 1] | sort | batch(1) | list }}{{ [1, 2] | sum }}{{ 2.567 | round(1) }}{{ {'a': (1, 2)} }}",
    "{{ 'é'.encode() }}{{ 'a' | replace('a', 'b') }}{{ 'a' | e }}{{ '<' | e }}{{ '<b>' | safe ~ '<' }}{{ 17 % 5 }}",
    "{% set n = namespace(x=1) %}{% set n.x = n.x + 1 %}{{ n.x }}{% for k, v in {'b': 1} | dictsort %}{{ k }}{{ v }}"
    "{% endfor %}{% set b %}in{{ 1 }}{% endset %}{{ b | upper }}{% filter upper %}x{{ b }}{% endfilter %}",
    "{% macro f(x, y=2) %}{{ x }}{{ y }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 3, 4, z=5) }}",
    "{{ m | selectattr('role', 'equalto', 'tool') | list }}{{ m | groupby('role') | map('first') | list }}",
    "{% for a, b in [(1, 2)] %}{{ a, b }}{% endfor %}{{ (1, 2) | first }}{{ [] or 'none' }}{{ m[-1:] | length }}",
]


@pytest.mark.parametrize("source", SOURCES)
def test_a_template_says_what_it_says_in_jinjas_sandbox(source):
    messages = [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]
    plain = ImmutableSandboxedEnvironment().from_string(source).render(m=messages)
    assert ChatTemplate(source, {}).render(messages, variables={"m": messages}) == plain


def test_a_long_conversation_may_be_gone_over_several_times(monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_CHARACTERS", 1000)
    source = "{% for m in messages %}{{ m.content.strip().split('x')[0] | replace('a', 'b') | trim ~ '' }}{% endfor %}"
    messages = [{"role": "user", "content": "a" * 1000}] * 50
    assert ChatTemplate(source, {}).render(messages) == "b" * 50_000
