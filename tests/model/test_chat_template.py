"""Chat templates are rendered as transformers does, but within bounds."""

import itertools
import tracemalloc

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from layerskip.model import chat_template
from layerskip.model.chat_template import render_chat, template_arguments

CHAT = [{"role": "system", "content": "brief"}, {"role": "user", "content": "a b\nc"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"x": [1, 2.5, None, "é"]}}}
NESTED = "{% set a = [1] * 1000 %}{% set b = [a] * 1000 %}{% set c = [b] * 1000 %}"


def render(template, **arguments):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    tokenizer.chat_template = template
    return render_chat(tokenizer, CHAT, **arguments)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ '<|' ~ m.role + '|>\\n' ~ m['content'] | trim }}{% endfor %}",
        "{{ tools | tojson }}{{ tools | tojson(indent=4) }}{{ tools[0].function | string }}",
        "{{ messages | map(attribute='role') | join(', ') }}{{ ' '.join(messages[0].keys()) }}",
        "{{ 'x%3d|%s' % (7, 'y') }}{{ '{:>4}{n}'.format(1, n=2) }}{{ 'a%s' | format('b') }}",
        "{{ messages[1].content | replace('b', 'cd') | indent(2) | upper }}{{ 'a'.center(5) }}",
        "{% set ns = namespace(n=[]) %}{% for m in messages %}{% set ns.n = ns.n + [m] %}"
        "{% endfor %}{{ ns.n }}{{ 2 ** 10 * 3 % 7 }}{{ none }}{{ missing }}{{ 1 ~ true }}",
        "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a') * 3 }}{{ [1, 2] | sum }}{{ '-' * 9 }}",
    ],
)
def test_a_text_is_that_of_transformers(template):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    arguments = {"chat_template": f"{{# transformers #}}{template}", "tools": [TOOL]}
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False, **arguments)
    assert render(template, tools=[TOOL]) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1/0 }}", "division by zero"),
        ("{{ messages[7].x }}", "has no element 7"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "macros call each other without end"),
        ("{% for i in range(10**8) %}{% endfor %}", "Range too big"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "loops"),
        ("{{ 2 ** 10000000 }}", "a number of more than 4,096 bits"),
        ("{{ lipsum(n=10**9) }}", "'lipsum' is undefined"),
    ],
)
def test_templates_that_fail(template, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        render(template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "expression",
    [
        *("'a' * 30000000", "30000000 * 'a'", "[1] * 30000000", "'%30000000d' % 1", "a + a * 3"),
        *("'%*d' % (30000000, 1)", "'{:30000000}'.format(1)", "'{:{}}'.format(1, 30000000)"),
        *("'a' | center(30000000)", "'a' | indent(30000000)", "'%30000000d' | format(1)"),
        *("'a'.ljust(30000000)", "'\t'.expandtabs(30000000)", "1 .to_bytes(30000000)"),
        *("a ~ a ~ a ~ a", "[a, a, a, a] | join", "range(3000) | join(a[:10000])"),
        *("a.join('aaaaa')", "a | replace('a', 'aaaa')", "a.replace('', 'aaa')"),
        *("a.translate({97: 'aaaa'})", "[1] | tojson(indent=30000000)"),
    ],
)
def test_a_text_that_is_too_large_is_refused_before_it_is_made(expression):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than 16,777,216 characters"):
            render("{% set a = 'a' * 5000000 %}{{ (" + expression + ") | length }}")
        assert tracemalloc.get_traced_memory()[1] < 24_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}",
        "{% for i in range(300) %}{% set a = 'a' * 1000000 %}{% endfor %}",
        *(f"{NESTED}{{{{ {part} }}}}" for part in ("c", "c | string", "'%s' % c", "c ~ 1")),
        f"{NESTED}{{{{ c | tojson }}}}",
        f"{NESTED}{{% set n = namespace(c=c) %}}{{{{ n }}}}",
        "{{ ([[1]] * 100000) | sum(start=[]) }}",
    ],
)
def test_many_small_parts_are_refused_too(template):
    with pytest.raises(ValueError, match=r"more than [0-9,]+ characters"):
        render(template)


def test_a_chat_template_that_fills_the_memory_is_stopped(monkeypatch):
    template = "{% set a = 1 %}\n{% set b = 2 %}\n{{ messages[0].content }}"
    assert render(template) == "brief"
    sizes = itertools.count(0, 2**28)
    monkeypatch.setattr(chat_template, "max_resident_bytes", lambda: next(sizes))
    with pytest.raises(ValueError, match="too much memory"):
        render(template)


def test_arguments_of_templates_that_cannot_be_used():
    for row, reason in (
        ({"tools": "[" * 100_000}, "tools is no JSON: it is nested too deeply"),
        ({"tools": "{"}, "tools is no JSON"),
        ({"chat_template_kwargs": [1]}, "is to have names and values"),
        ({"chat_template_kwargs": {"tokenize": True}}, "names tokenize, no variable"),
    ):
        with pytest.raises(ValueError, match=reason):
            template_arguments(row)
