"""Documents in training have the very token ids that serving gives a model, and answers over them are labelled as others."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.data.formats import CONTROL_TOKEN
from appliance.errors import DataError
from appliance.serving.prompt import PromptEncoder
from appliance.serving.requests import ChatPrompt, Document
from appliance.text import passages
from appliance.text.chat_template import ChatTemplate
from appliance.training import documents, labels, starter
from convert.gguf_model import GgufVocabulary
from tests import tiny_recipe
from tests.running import Trained
from tests.training.test_labels import CONTENT, CONVERSATIONS, TEXTS

TOKENIZER = starter.make_tokenizer(TEXTS, 512)
DOCUMENTS = st.lists(
    st.fixed_dictionaries({"id": CONTENT, "text": CONTENT}),
    max_size=4,
    unique_by=(lambda each: each["id"], lambda each: each["text"]),
)
STERN = starter.CHAT_TEMPLATE.replace(
    "{% for message in messages %}",
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for message in messages %}",
    1,
)
TWO = [{"id": "desk", "text": "De balie is aan de Lindekade 3."}, {"id": "dog", "text": "Eén hond mag mee."}]


class OfTransformers:
    """A tokenizer as serving knows one."""

    longest_token_bytes = 64

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.control_texts = tokenizer.all_special_tokens

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=not parse_special)[
            "input_ids"
        ]
        return found


def tokenizer_with(template: str) -> Any:
    made = starter.make_tokenizer(TEXTS, 512)
    made.chat_template = template
    return made


def served(vocabulary: Any, template: str, messages: Sequence[dict[str, str]], told: Sequence[dict[str, str]]) -> Any:
    prompt = ChatPrompt(
        messages=tuple(messages), documents=tuple(Document(id=each["id"], text=each["text"]) for each in told)
    )
    return PromptEncoder(vocabulary, ChatTemplate(template), 1 << 20).encode(prompt)


def assert_same(tokenizer: Any, vocabulary: Any, messages: list[dict[str, str]], told: list[dict[str, str]]) -> None:
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    expected = served(vocabulary, tokenizer.chat_template, asked, told)
    found = documents.render(tokenizer, asked, told, add_generation_prompt=True)
    assert found.input_ids == list(expected.tokens)
    assert found.bounds == (expected.passages.bounds if told else ())


@given(CONVERSATIONS, DOCUMENTS)
def test_training_gives_the_tokens_of_serving(messages: list[dict[str, str]], told: list[dict[str, str]]) -> None:
    assert_same(TOKENIZER, OfTransformers(TOKENIZER), messages, told)


@pytest.mark.parametrize("system", [(), ({"role": "system", "content": "Wees kort."},)], ids=["without", "with"])
def test_a_template_without_system_turns_shows_documents_before_the_first_question(system: Sequence[dict[str, str]]) -> None:
    stern = tokenizer_with(STERN)
    messages = [*system, *tiny_recipe.messages(("Waar is de balie?", "Hier."))]
    if system:
        row = {"messages": messages, "documents": TWO, "line": 7}
        with pytest.raises(DataError, match=r"line 7 has documents: The chat template refuses these messages: no system"):
            labels.label_conversations(stern, [row], None)
        return
    assert_same(stern, OfTransformers(stern), messages, TWO)
    shown = "".join(passages.shown(each["id"], each["text"]) for each in TWO)
    found = documents.render(stern, messages[:1], TWO, add_generation_prompt=True)
    assert f"<|im_start|>user\n{shown}\n\nWaar is de balie?" in stern.decode(found.input_ids)


def test_a_template_that_shows_the_first_message_twice_has_no_place_for_documents() -> None:
    twice = tokenizer_with("{{ messages[0].content }}" + starter.CHAT_TEMPLATE)
    row = {"messages": tiny_recipe.messages(("Waar?", "Hier.")), "documents": TWO, "line": 3}
    with pytest.raises(DataError, match=r"line 3 has documents: .* just once, so documents have no place in it"):
        labels.label_conversations(twice, [row], None)


def test_training_gives_the_tokens_of_the_file_that_is_served(trained: Trained) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained.made["base"])
    told = [{"id": f'naar "{each[0]}"', "text": " ".join(each)} for each in tiny_recipe.CONVERSATIONS]
    with GgufVocabulary(trained.full) as gguf:

        class OfFile:
            control_texts = tokenizer.all_special_tokens
            longest_token_bytes = 64

            def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
                assert parse_special  # nobody wrote a control token
                return list(gguf.tokenize(text))

        for turns in tiny_recipe.CONVERSATIONS:
            assert_same(tokenizer, OfFile(), tiny_recipe.messages(turns), told)


@given(CONVERSATIONS, DOCUMENTS.filter(bool))
@pytest.mark.parametrize("template", [None, starter.MARKED_TEMPLATE], ids=["by difference", "with markers"])
def test_answers_over_documents_are_what_is_learned(
    template: str | None, messages: list[dict[str, str]], told: list[dict[str, str]]
) -> None:
    plain, row = ({"messages": messages, "line": 1, **more} for more in ({}, {"documents": told}))
    (labelled,) = labels.label_conversations(TOKENIZER, [row], template)
    labels.verify_labels(TOKENIZER, [row], [labelled])
    (without,) = labels.label_conversations(TOKENIZER, [plain], template)
    learned, expected = ([token for token in each.labels if token != labels.IGNORED] for each in (labelled, without))
    assert learned == expected
    assert not any(label != labels.IGNORED for label in labelled.labels[: labelled.bounds[-1]])
    shown = [
        TOKENIZER.decode(labelled.input_ids[start:end])
        for start, end in zip(labelled.bounds, labelled.bounds[1:], strict=False)
    ]
    assert shown == [passages.shown(each["id"], each["text"]) for each in told]


@pytest.mark.parametrize("key", ["id", "text"])
def test_a_control_token_of_the_base_in_a_document_is_refused(key: str) -> None:
    told = [{"id": "a", "text": "b", key: "x<|endoftext|>"}]
    row = {"messages": tiny_recipe.messages(("Waar?", "Hier.")), "documents": told, "line": 5}
    assert CONTROL_TOKEN.search("<|endoftext|>")
    with pytest.raises(DataError, match=re.escape("line 5: '<|endoftext|>'")):
        labels.label_conversations(TOKENIZER, [row], None)
