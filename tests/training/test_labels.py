"""Only the assistant's words and the token that ends its turn are learned, on real token ids, by both ways of labelling."""

import re
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from appliance import recipe as recipes
from appliance.data.formats import CONTROL_TOKEN
from appliance.errors import DataError, VerificationFailed
from appliance.training import labels, loop, sft, starter
from appliance.training import model as models
from appliance.training.labels import IGNORED, LabelledRow
from tests import tiny_recipe
from tests.running import Trained, call

TEXTS = [" ".join(turns) for turns in tiny_recipe.CONVERSATIONS]
TOKENIZER = starter.make_tokenizer(TEXTS, 512)
# What `data check` lets through: stripped, not empty, no control token.
CONTENT = st.text(max_size=40).map(str.strip).filter(lambda text: bool(text) and not CONTROL_TOKEN.search(text))
TURNS = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3)
CONVERSATIONS = st.builds(
    lambda system, turns: [
        *([{"role": "system", "content": system}] if system else []),
        *(message for pair in turns for message in tiny_recipe.messages(pair)),
    ],
    st.none() | CONTENT,
    TURNS,
)


def row(messages: list[dict[str, str]], line: int = 1) -> dict[str, Any]:
    return {"messages": messages, "line": line}


def label(messages: list[dict[str, str]], template: str | None) -> LabelledRow:
    (labelled,) = labels.label_conversations(TOKENIZER, [row(messages)], template)
    return labelled


def expected_labels(messages: list[dict[str, str]], input_ids: list[int]) -> list[int]:
    """Counted from the token ids alone: a turn is from its start token to the next one's, its header ends at a newline."""
    start, end = TOKENIZER.convert_tokens_to_ids([starter.TURN_START, starter.TURN_END])
    expected, turn = [], -1
    for position, token in enumerate(input_ids):
        if token == start:
            turn += 1
            header = TOKENIZER(messages[turn]["role"] + "\n")["input_ids"]
            body = position + 1 + len(header)
            assert input_ids[position + 1 : body] == header
            last = body + input_ids[body:].index(end)
        is_learned = messages[turn]["role"] == "assistant" and body <= position <= last
        expected.append(token if is_learned else IGNORED)
    assert turn == len(messages) - 1
    return expected


@pytest.mark.parametrize("template", [starter.MARKED_TEMPLATE, None], ids=["by markers", "by difference"])
@given(messages=CONVERSATIONS)
def test_assistant_turns_and_their_end_are_learned_and_nothing_else(messages: Any, template: str | None) -> None:
    labelled = label(messages, template)
    assert labelled.labels == expected_labels(messages, labelled.input_ids)
    assert labelled.labels.count(TOKENIZER.eos_token_id) == sum(each["role"] == "assistant" for each in messages)
    labels.verify_labels(TOKENIZER, [row(messages)], [labelled])


@given(messages=CONVERSATIONS)
def test_both_ways_agree(messages: Any) -> None:
    assert label(messages, starter.MARKED_TEMPLATE) == label(messages, None)


@given(messages=CONVERSATIONS, data=st.data())
def test_a_tampered_mask_is_found(messages: Any, data: st.DataObject) -> None:
    labelled = label(messages, None)
    position = data.draw(st.integers(0, len(labelled.labels) - 1))
    is_learned = labelled.labels[position] != IGNORED
    # The newline before an answer belongs to nobody's words; some templates put such white space inside the markers.
    assume(is_learned or labelled.labels[position + 1 : position + 2] in ([], [IGNORED]))
    changed = [*labelled.labels]
    changed[position] = IGNORED if is_learned else labelled.input_ids[position]
    with pytest.raises(VerificationFailed, match="The label check failed"):
        labels.verify_labels(TOKENIZER, [row(messages)], [LabelledRow(1, labelled.input_ids, changed)])


def test_reasons_name_the_line() -> None:
    messages = tiny_recipe.messages(("vraag", "antwoord", "en?", "ja"))
    labelled = label(messages, None)
    everything = LabelledRow(7, labelled.input_ids, labelled.input_ids)
    with pytest.raises(VerificationFailed, match="line 7: 2 assistant turns, 1 labelled spans"):
        labels.verify_labels(TOKENIZER, [row(messages, 7)], [everything])
    ends = [value if value != TOKENIZER.eos_token_id else IGNORED for value in labelled.labels]
    with pytest.raises(
        VerificationFailed, match="line 7: the end-of-turn token '<|im_end|>' is not learned".replace("|", r"\|")
    ):
        labels.verify_labels(TOKENIZER, [row(messages, 7)], [LabelledRow(7, labelled.input_ids, ends)])


def test_padding_of_a_real_batch_has_no_label(trained: Trained, root: Any) -> None:
    recipe = recipes.load(trained.recipe)
    base = trained.made["base"]
    tokenizer = models.load_tokenizer(base)
    rows = [row(tiny_recipe.messages(turns), line) for line, turns in enumerate(tiny_recipe.CONVERSATIONS, 1)]
    labelled = labels.label_conversations(tokenizer, rows, models.marked_template(base, tokenizer))
    loop.prepare()
    model = sft.add_adapter(models.load_model(base), recipe)
    trainer = sft._trainer(model, tokenizer, labelled, recipe, root)
    padded = 0
    for batch in trainer.get_train_dataloader():
        for ids, mask, learned in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            length = int(mask.sum())
            padded += len(ids) - length
            assert set(learned[length:].tolist()) <= {IGNORED}
            original = next(each for each in labelled if each.input_ids == ids[:length].tolist())
            assert learned[:length].tolist() == original.labels
    assert padded > 0


def test_template_that_rewrites_earlier_turns_is_refused() -> None:
    forgetful = (
        "{% for m in messages %}{% if not loop.last or m.role == 'user' %}<|im_start|>{{ m.role }}|{{ messages|length }}\n"
        "{{ m.content }}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = starter.make_tokenizer(TEXTS, 512)
    tokenizer.chat_template = forgetful
    messages = tiny_recipe.messages(("a", "b", "c", "d"))
    with pytest.raises(VerificationFailed, match=r"renders earlier turns differently.*training_template\.jinja"):
        labels.label_conversations(tokenizer, [row(messages)], None)
    with pytest.raises(VerificationFailed, match="renders other tokens than the model's own template"):
        labels.label_conversations(tokenizer, [row(messages)], starter.MARKED_TEMPLATE)


def test_control_tokens_of_the_base_are_refused() -> None:
    with pytest.raises(DataError, match=r"line 3: '<\|im_end\|>'"):
        labels.label_conversations(TOKENIZER, [row(tiny_recipe.messages(("a", "b<|im_end|>c")), 3)], None)


@pytest.mark.parametrize("phase", ["sft", "dpo"])
def test_too_long_is_reported_with_its_length_before_weights_load(
    trained: Trained, root: Any, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.copy(root, "data", "base", "sft")
    monkeypatch.setattr(models, "load_model", lambda _: pytest.fail("weights were loaded"))
    limit = {"sft": "sft.max_tokens=40", "dpo": "dpo.max_tokens=30"}[phase]
    result = call("train", trained.recipe, "--phase", phase, "--set", limit)
    assert result.exit_code == 1
    assert f"Longer than {limit.replace('=', ' = ')} (shorten the row, or raise" in result.stderr
    assert re.search(rf"{phase}\.jsonl line {5 if phase == 'sft' else 4}: \d+ tokens", result.stderr)
