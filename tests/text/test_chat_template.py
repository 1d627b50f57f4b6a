"""Our renderer gives what transformers gives, without transformers; and it runs nothing that a template smuggles in."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.text.chat_template import ChatTemplate, TemplateFailed

QWEN_LIKE = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}{{ tools | tojson }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('Unknown role ' ~ message.role) }}
    {%- endif %}
    {%- if loop.index0 > 40 %}{% break %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content.strip() + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
PLAIN = """{% for m in messages %}
    {{ m['role'] }}: {{ m['content'] }}{{ eos_token }}
{% endfor %}
<b>{{ messages | tojson }}"""
GENERATION = """{% set x = 1 %}{% for m in messages %}
    {% generation %}
    {% set x = m['content'] %}{{ x }}
    {% endgeneration %}
{% endfor %}
{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}
{{ tools is none }}{{ documents is none }}{{ unknown is defined }}"""
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=30)}),
    min_size=1,
    max_size=4,
)


def by_transformers(source: str, messages: list[dict[str, str]], prompt: bool, **variables: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=prompt, eos_token="<|im_end|>", **variables
    )
    return str(rendered[0])


@pytest.mark.parametrize("source", [QWEN_LIKE, PLAIN, GENERATION])
@given(messages=MESSAGES, prompt=st.booleans(), variables=st.sampled_from([{}, {"enable_thinking": False}]))
def test_same_text_as_transformers(source: str, messages: Any, prompt: bool, variables: dict[str, Any]) -> None:
    template = ChatTemplate(source, {"eos_token": "<|im_end|>"})
    ours = template.render(messages, add_generation_prompt=prompt, **variables)
    assert ours == by_transformers(source, messages, prompt, **variables)


def test_refusal_of_the_template_is_told() -> None:
    with pytest.raises(TemplateFailed, match="Unknown role tool"):
        ChatTemplate(QWEN_LIKE, {"eos_token": "x"}).render([{"role": "tool", "content": "x"}], add_generation_prompt=False)


@pytest.mark.parametrize("source", ["{% for %}", "{{ x | nofilter }}"])
def test_broken_template(source: str) -> None:
    with pytest.raises(TemplateFailed, match="does not compile"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0]['x']['y'] }}",
    ],
)
def test_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(TemplateFailed, match="refuses these messages"):
        ChatTemplate(source).render([{"role": "user", "content": "x"}], add_generation_prompt=False)
