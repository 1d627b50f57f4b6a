"""Only the assistant's words and the token that ends its turn are learned, on real token ids, by both ways of labelling."""

import copy
import csv
import io
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from appliance import recipe as recipes
from appliance.data import formats
from appliance.data.formats import CONTROL_TOKEN
from appliance.errors import DataError, VerificationFailed
from appliance.training import adapters, conversations, labels, loop, preferences, rungs, sft, starter
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


PAIRS = TURNS.map(lambda turns: tiny_recipe.messages(turns[0]))  # one question, one answer
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


def sharegpt(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"from": SPEAKERS[each["role"]], "value": each["content"]} for each in messages]


def csv_text(*rows: tuple[str, ...]) -> str:
    stream = io.StringIO(newline="")
    csv.writer(stream, quoting=csv.QUOTE_ALL).writerows(rows)
    return stream.getvalue()


def texts(messages: list[dict[str, str]]) -> tuple[str, ...]:
    return tuple(each["content"] for each in messages)


ANY, PAIR, KEYPHRASE = "a conversation", "a pair", "a pair with a keyphrase"
COLUMNS = {"prompt": "q", "completion": "a"}
# By its name: what it can hold, the file's ending, its text, and the recipe's map of columns.
FORMATS: dict[str, tuple[str, str, Any, dict[str, str] | None]] = {
    "chat messages": (ANY, "jsonl", lambda m: json.dumps({"messages": m}), None),
    "chat messages in a list": (ANY, "json", lambda m: json.dumps([{"messages": m}], indent=1), None),
    "ShareGPT": (ANY, "jsonl", lambda m: json.dumps({"conversations": sharegpt(m)}), None),
    "ShareGPT in a list": (ANY, "json", lambda m: json.dumps([{"conversations": sharegpt(m)}]), None),
    "Alpaca": (PAIR, "json", lambda m: json.dumps([{"instruction": texts(m)[0], "input": "", "output": texts(m)[1]}]), None),
    "prompt and completion": (PAIR, "jsonl", lambda m: json.dumps(dict(zip(COLUMNS, texts(m), strict=True))), None),
    "messages and completion": (ANY, "jsonl", lambda m: json.dumps({"prompt": m[:-1], "completion": m[-1:]}), None),
    "CSV with known names": (PAIR, "csv", lambda m: csv_text(("instruction", "output"), texts(m)), None),
    "CSV with a map": (PAIR, "csv", lambda m: csv_text(("q", "a"), texts(m)), COLUMNS),
    "JSON lines with a map": (PAIR, "jsonl", lambda m: json.dumps(dict(zip("qa", texts(m), strict=True))), COLUMNS),
    "keyphrase pairs": (
        KEYPHRASE,
        "csv",
        lambda m: csv_text(("q", "k", "a"), (texts(m)[0], "een woord", texts(m)[1])),
        {"prompt": "{q}. {k}", "completion": "a"},
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_in_every_format_the_assistant_and_its_end_are_learned(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    holds, ending, write, columns = FORMATS[name]
    original = data.draw(CONVERSATIONS if holds == ANY else PAIRS)
    path = tmp_path_factory.mktemp("rows") / f"rows.{ending}"
    path.write_bytes(write(original).encode())
    (read,) = formats.examine(path, "sft", columns).rows([])
    messages = [{**each, "content": unicodedata.normalize("NFC", each["content"])} for each in original]
    for each in messages:
        each["content"] = each["content"].replace("\r\n", "\n").replace("\r", "\n")
    if holds == KEYPHRASE:
        messages[0]["content"] += ". een woord"
    assert read["messages"] == messages
    (labelled,) = labels.label_conversations(TOKENIZER, [read], starter.MARKED_TEMPLATE)
    assert labelled.labels == expected_labels(messages, labelled.input_ids)
    assert labelled.labels.count(TOKENIZER.eos_token_id) == sum(each["role"] == "assistant" for each in messages)
    labels.verify_labels(TOKENIZER, [read], [labelled])


@given(messages=CONVERSATIONS)
def test_in_every_format_of_preferences_both_answers_end(
    tmp_path_factory: pytest.TempPathFactory, messages: list[dict[str, str]]
) -> None:
    *prompt, chosen = messages
    rejected = {**chosen, "content": "Nee!"}
    assume(chosen != rejected)
    written = [
        {"prompt": prompt, "chosen": chosen["content"], "rejected": "Nee!"},
        {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]},
        {"chosen": messages, "rejected": [*prompt, rejected]},
        {"conversations": sharegpt(prompt), "chosen": sharegpt([chosen])[0], "rejected": sharegpt([rejected])[0]},
    ]
    rows: list[dict[str, Any]] = []
    for each in written:
        path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
        path.write_text(json.dumps(each), encoding="utf-8")
        rows += formats.examine(path, "dpo").rows([])
    first, *others = preferences.tokenize(TOKENIZER, rows)
    assert others == [first] * 3
    whole = label([*rows[0]["prompt"], {"role": "assistant", "content": rows[0]["chosen"]}], None)
    assert first.prompt + first.chosen == whole.input_ids
    for answer in (first.chosen, first.rejected):
        assert answer.count(TOKENIZER.eos_token_id) == 1


@given(messages=CONVERSATIONS, data=st.data())
def test_cut_answer_teaches_no_end(messages: Any, data: st.DataObject) -> None:
    labelled = label(messages, starter.MARKED_TEMPLATE)
    limit = data.draw(st.integers(1, len(labelled.labels) + 1))
    (cut,) = labels.truncate([labelled], limit)
    assert (cut.input_ids, cut.labels) == (labelled.input_ids[:limit], labelled.labels[:limit])
    assert len(cut.input_ids) + cut.cut_tokens == len(labelled.input_ids)
    whole = sum(label == TOKENIZER.eos_token_id for label in labelled.labels[:limit])
    assert cut.labels.count(TOKENIZER.eos_token_id) == whole
    if cut.learned_tokens:
        labels.verify_labels(TOKENIZER, [row(messages)], [cut])


def test_false_end_of_a_cut_answer_is_found() -> None:
    messages = tiny_recipe.messages(("Waar is de balie?", "De balie is aan de Lindekade 3, naast de brug."))
    (cut,) = labels.truncate([label(messages, None)], 30)
    labels.verify_labels(TOKENIZER, [row(messages)], [cut])
    false_end = LabelledRow(1, [*cut.input_ids[:-1], TOKENIZER.eos_token_id], [*cut.labels[:-1], TOKENIZER.eos_token_id], 9)
    with pytest.raises(VerificationFailed, match="line 1: labelled text differs from the assistant's message"):
        labels.verify_labels(TOKENIZER, [row(messages)], [false_end])
    other = tiny_recipe.messages(("Waar is de balie?", "Die balie is aan de Lindekade 3, naast de brug."))
    with pytest.raises(VerificationFailed, match="line 1: labelled text differs from the beginning of the cut message"):
        labels.verify_labels(TOKENIZER, [row(other)], [cut])


def test_truncation_is_told_and_rows_without_an_answer_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_tokenizer", lambda _: TOKENIZER)
    recipe_path = tiny_recipe.write(tmp_path / "recipe")
    sets = ['phases=["sft"]', "sft.max_tokens=40", "sft.truncate=true"]
    recipe = recipes.load(recipe_path, sets)
    long = [
        tiny_recipe.messages(("Waar is de balie?", "De balie is aan de Lindekade 3. " * 9)),
        tiny_recipe.messages(("Waar is de balie? " * 20, "De balie is aan de Lindekade 3.")),
        tiny_recipe.messages(("Mag dat?", "Ja.")),
    ]
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    base = models.Base(tmp_path, "base")  # of which only the tokenizer is asked for
    tiny_recipe.write_lines(dataset / "sft.jsonl", [row(each, line) for line, each in enumerate(long, 1)])
    read = conversations.read(recipe, dataset, base)
    assert [each["line"] for each in read.rows] == [each.line for each in read.labelled] == [1, 3]
    assert read.left_out == read.cut_rows == 1
    assert [each.cut_tokens > 0 for each in read.labelled] == [True, False]
    assert [each.labels.count(TOKENIZER.eos_token_id) for each in read.labelled] == [0, 1]
    said = capsys.readouterr().err
    assert re.search(r"sft: 1 of 3 conversations of sft.jsonl cut at 40 tokens, \d+ tokens less\n", said)
    assert "sft: 1 conversations left out, since no answer begins within it: sft.jsonl lines 2\n" in said

    with pytest.raises(DataError, match=r"sft.jsonl line 1: \d+ tokens") as caught:
        conversations.read(recipes.load(recipe_path, sets[:2]), dataset, base)
    assert "or set sft.truncate = true to have it cut" in str(caught.value)
    tiny_recipe.write_lines(dataset / "sft.jsonl", [row(long[1])])
    with pytest.raises(DataError, match=r"every answer begins after sft\.max_tokens = 40 tokens; raise it"):
        conversations.read(recipe, dataset, base)


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
    model = adapters.add(models.load_model(base), recipe.lora)
    trainer = sft._trainer(model, tokenizer, labelled, recipe, root, rungs.CPU[0])
    padded = 0
    for batch in trainer.get_train_dataloader():
        for ids, mask, learned in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            length = int(mask.sum())
            padded += len(ids) - length
            assert set(learned[length:].tolist()) <= {IGNORED}
            original = next(each for each in labelled if each.input_ids == ids[:length].tolist())
            assert learned[:length].tolist() == original.labels
    assert padded > 0


def test_template_whose_answers_are_not_those_that_it_asks_for_is_refused() -> None:
    forgetful = (
        "{% for m in messages %}{% if not loop.last or m.role == 'user' %}<|im_start|>{{ m.role }}|{{ messages|length }}\n"
        "{{ m.content }}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = starter.make_tokenizer(TEXTS, 512)
    tokenizer.chat_template = forgetful
    messages = tiny_recipe.messages(("a", "b", "c", "d"))
    with pytest.raises(VerificationFailed, match=r"does not begin an answer as it asks for one.*training_template\.jinja"):
        labels.label_conversations(tokenizer, [row(messages)], None)
    with pytest.raises(VerificationFailed, match="renders other tokens than the model's own template"):
        labels.label_conversations(tokenizer, [row(messages)], starter.MARKED_TEMPLATE)


def test_control_tokens_of_the_base_are_refused() -> None:
    with pytest.raises(DataError, match=r"line 3: '<\|im_end\|>'"):
        labels.label_conversations(TOKENIZER, [row(tiny_recipe.messages(("a", "b<|im_end|>c")), 3)], None)


def test_all_rows_that_are_too_long_are_counted_and_some_named() -> None:
    lengths = [(line, 1000 + line) for line in range(1, 31)]
    with pytest.raises(DataError, match=r"raise sft\.max_tokens to 1030\), 30 problems:") as caught:
        labels.require_lengths(lengths, 1000, "sft.max_tokens", "sft.jsonl")
    assert "sft.jsonl line 20: 1020 tokens\n  - and 10 more" in str(caught.value)


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
    assert ("or set sft.truncate = true" in result.stderr) == (phase == "sft")
    assert re.search(rf"{phase}\.jsonl line {5 if phase == 'sft' else 4}: \d+ tokens", result.stderr)


# Families by the token that ends their turns, and what they write before an answer by themselves.
FAMILIES = {
    "qwen2_5": ("<|im_end|>", ""),
    "qwen3": ("<|im_end|>", "<think>\n\n</think>\n\n"),
    "qwen3_instruct_2507": ("<|im_end|>", ""),
    "qwen3_5_nothink": ("<|im_end|>", ""),
    "qwen3_5_think": ("<|im_end|>", "\n</think>\n\n"),
    "gemma3": ("<end_of_turn>", ""),
    "gemma4": ("<turn|>", ""),
    "llama3_2": ("<|eot_id|>", ""),
    "phi3": ("<|end|>", ""),
    "lfm2_2_5": ("<|im_end|>", ""),
    "cohere": ("<|END_OF_TURN_TOKEN|>", ""),
}
UNFOLDED = {"qwen3", "qwen3_5_nothink", "qwen3_5_think"}  # reasoning is taken out of earlier answers


def tokenizer_of(family: str, end: str) -> Any:
    """With the template that models of this family are published with."""
    from trl import chat_template_utils

    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = getattr(chat_template_utils, f"{family}_chat_template")
    tokenizer.add_special_tokens({"eos_token": end})
    return tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_published_templates_teach_what_the_model_is_asked_for(family: str) -> None:
    """Every answer is learned once, after exactly what a server gives a model that is asked for it."""
    end, lead = FAMILIES[family]
    tokenizer = tokenizer_of(family, end)
    conversations = [tiny_recipe.messages(turns) for turns in tiny_recipe.CONVERSATIONS]
    rows = [row(messages, line) for line, messages in enumerate(conversations, 1)]
    unfolded = labels.unfold(tokenizer, rows)
    labelled = labels.label_conversations(tokenizer, unfolded, None)
    labels.verify_labels(tokenizer, unfolded, labelled)
    found = {
        (tuple(each.input_ids[:start]), tokenizer.decode(each.input_ids[start:stop]))
        for each in labelled
        for start, stop in spans(each.labels)
    }
    wanted = {
        (
            tuple(labels.render_ids(tokenizer, messages[:at], add_generation_prompt=True)),
            f"{lead}{message['content']}{end}",
        )
        for messages in conversations
        for at, message in enumerate(messages)
        if message["role"] == "assistant"
    }
    assert found == wanted
    assert (len(unfolded) > len(rows)) == (family in UNFOLDED)


def spans(found: list[int]) -> list[tuple[int, int]]:
    starts = [at for at, each in enumerate(found) if each != IGNORED and (at == 0 or found[at - 1] == IGNORED)]
    stops = [at + 1 for at, each in enumerate(found) if each != IGNORED and found[at + 1 : at + 2] in ([], [IGNORED])]
    return list(zip(starts, stops, strict=True))


def test_wrong_end_token_is_named_with_the_one_that_the_template_writes() -> None:
    tokenizer = tokenizer_of("qwen3", "<|endoftext|>")  # as in Qwen3's base models
    with pytest.raises(VerificationFailed, match=r"ends an answer with .*im_end.*without the tokenizer's eos_token '<.endo"):
        labels.label_conversations(tokenizer, [row(tiny_recipe.messages(("Mag dat?", "Ja.")))], None)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_think", "llama3_2"])
def test_answers_of_published_templates_may_be_cut(family: str) -> None:
    """Anywhere: in what the template writes before the answer, and in the answer; another text is found there too."""
    tokenizer = tokenizer_of(family, FAMILIES[family][0])
    rows = [row(tiny_recipe.messages(("Mag dat?", "Ja, dat mag, als het maar niet regent.")))]
    others = [row(tiny_recipe.messages(("Mag dat?", "Nee, dat mag niet, want het regent.")))]
    labelled = labels.label_conversations(tokenizer, rows, None)
    ((start, stop),) = spans(labelled[0].labels)
    for limit in range(start + 1, stop):
        cut = labels.truncate(labelled, limit)
        labels.verify_labels(tokenizer, rows, cut)
    with pytest.raises(VerificationFailed, match="differs from the beginning of the cut message"):
        labels.verify_labels(tokenizer, others, labels.truncate(labelled, stop - 1))


def test_reasoning_in_an_answer_is_learned_with_it() -> None:
    tokenizer = tokenizer_of("qwen3", "<|im_end|>")
    rows = [row(tiny_recipe.messages(("Mag dat?", "<think>Het is zondag.</think>\nNee.")))]
    (labelled,) = labels.label_conversations(tokenizer, rows, None)
    labels.verify_labels(tokenizer, rows, [labelled])
    ((start, stop),) = spans(labelled.labels)
    learned = tokenizer.decode(labelled.input_ids[start:stop])
    assert learned == "<think>\nHet is zondag.\n</think>\n\nNee.<|im_end|>"
