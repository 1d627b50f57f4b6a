"""Renders a model's chat template: the one renderer that serving uses and that verification holds against training.

Templates are Jinja as transformers runs it (`utils/chat_template_utils.py`): sandboxed, immutable, trim_blocks and
lstrip_blocks, loop controls, generation blocks, `raise_exception`, `strftime_now`, and a `tojson` that does not escape
HTML. It does not import transformers, so that serving stays light. Knows nothing of tokens.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

Message = Mapping[str, Any]


class TemplateFailed(Exception):
    """The template has an error, or refuses these messages; the text is the template's own."""


class ChatTemplate:
    """A compiled chat template with the special tokens that it may print."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateFailed(f"The chat template does not compile: {error}") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, **variables: Any) -> str:
        """The prompt text; `variables` reach the template by name. Raises `TemplateFailed`.

        As in transformers, `tools` and `documents` are none when not given, and not undefined.
        """
        values = {"tools": None, "documents": None, **self._special_tokens, **variables}
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **values)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise TemplateFailed(f"The chat template refuses these messages: {error}") from error


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what is trained on: it renders what is inside, in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
