"""The proof that documents may be read by themselves: computed by what serves, judged by limits, and obeyed by serving."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.recipe import Verify
from appliance.serving import served_model
from appliance.serving.llama import Model
from appliance.serving.prompt import PromptEncoder
from appliance.text.chat_template import ChatTemplate
from appliance.training import documents
from convert import answer_facts, checks, conversations, passages, pre_tokenizer
from convert.conversations import Asked, read, read_asked
from convert.divergence import log_softmax
from convert.gguf_model import GgufModel
from convert.stitched import CannotRead, Question, Reader
from tests import tiny_gguf
from tests.running import Trained, call
from tests.serving.serving_process import running_server

CONTEXT_TOKENS, ANSWER_TOKENS = 700, 12
DOCUMENTS = [
    {"id": "beds.md", "text": "Beds are given at six in the evening, one for each of those who wait at the door by then."},
    {"id": "food.md", "text": "Soup is at noon, bread in the morning; whoever helps in the kitchen eats first of all."},
    {"id": "desk.md", "text": "The desk is open from 8:00 to 10:00, and on Mondays in the afternoon until 17:00 as well."},
]
SYSTEM = {"role": "system", "content": "You answer from the documents."}


def question(text: str = "When?", count: int = 2) -> Question:
    return Question([SYSTEM, {"role": "user", "content": text}], DOCUMENTS[:count])


def asked(number: int, count: int = 2, answer: str = "At 18:00.") -> Asked:
    turns = [SYSTEM, {"role": "user", "content": f"When, {number}?"}, {"role": "assistant", "content": answer}]
    return Asked(turns, DOCUMENTS[:count])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def reader(model: Path) -> Iterator[Reader]:
    with Reader(model, CONTEXT_TOKENS, ANSWER_TOKENS) as reader:
        yield reader


def distance(one: Any, other: Any) -> float:
    return float(abs(log_softmax(one) - log_softmax(other)).max())


def test_reading_in_place_is_what_the_file_computes(model: Path, reader: Reader) -> None:
    """By another way through llama.cpp: one sequence, read in one go."""
    answer = reader.answer(question(), None)
    file = Model(model, is_mapped=True, is_repacked=False)
    encoder = PromptEncoder(file, ChatTemplate(file.chat_template or ""), CONTEXT_TOKENS)
    prompt = encoder.encode(question().prompt).tokens
    file.close()
    with GgufModel(model, CONTEXT_TOKENS) as gguf:
        assert answer.tokens == gguf.greedy(prompt, ANSWER_TOKENS)
        assert distance(answer.logits, gguf.logits([*prompt, *answer.tokens[:-1]], len(prompt) - 1)) < 0.02


def test_what_is_read_again_is_as_in_place(reader: Reader) -> None:
    """All of it gives full attention; none of it gives something else; and what follows goes along the first answer."""
    full = reader.answer(question(), None)
    apart = reader.answer(question(), 0, along=full.tokens)
    again = reader.answer(question(), 600, along=full.tokens)
    assert apart.tokens == again.tokens == full.tokens
    assert distance(again.logits, full.logits) < 0.02
    assert distance(apart.logits, full.logits) > 0.1
    some = reader.answer(question(), 40, along=full.tokens)
    assert distance(some.logits, full.logits) > 0.02


def test_answers_are_those_that_are_served(model: Path, reader: Reader, tmp_path: Path) -> None:
    environ = {"APPLIANCE_SERVE_DOCUMENTS": "stitched"}
    with running_server(model, "--context-tokens", str(CONTEXT_TOKENS), root=tmp_path, environ=environ) as server:
        for text in ("When?", "Where is the soup?"):
            turns = [SYSTEM, {"role": "user", "content": text}]
            asked = {"messages": turns, "documents": DOCUMENTS[:2], "max_tokens": ANSWER_TOKENS, "temperature": 0}
            response = server.chat(**asked, logprobs=True)
            served = [bytes(each["bytes"]) for each in response.json()["choices"][0]["logprobs"]["content"]]
            pieces = map(reader._model.piece, reader.answer(question(text), 0).tokens)
            assert [piece for piece in pieces if piece] == served != []  # the last ends the answer, and is no text


def test_proof_of_a_model_of_noise_allows_nothing(model: Path) -> None:
    rows = [dataclasses.replace(asked(number, count=1 + number % 2), is_held_out=number < 4) for number in range(40)]
    proof = passages.prove(model, rows, ["en"], Verify(), CONTEXT_TOKENS)
    assert (proof["questions"], proof["held_out"], proof["most_documents"]) == (30, 4, 2)
    assert proof["readings"].keys() == {"0", "8", "16"}
    assert {name: each["questions"] for name, each in proof["readings"]["0"].items()} == {"en one": 15, "en several": 15}
    several = proof["readings"]["0"]["en several"]
    assert several["kl_mean"] > 0
    assert several["expected_facts"] == 15
    assert proof["allowed_reread_tokens"] is None
    assert "facts are other ones" in proof["reason"]
    assert proof["changed"]


def test_questions_that_do_not_fit_are_left_out_and_counted(model: Path) -> None:
    long = Asked(asked(1).messages, [{"id": "long.md", "text": "so long " * 200}])
    proof = passages.prove(model, [long], ["en"], Verify(), CONTEXT_TOKENS)
    assert (proof["allowed_reread_tokens"], proof["left_out"]) == (None, 1)
    assert "none of 1 questions fits into 700 tokens" in proof["reason"]
    proof = passages.prove(model, [long, asked(1)], ["en"], Verify(), CONTEXT_TOKENS)
    assert (proof["questions"], proof["left_out"]) == (1, 1)
    assert "only 1 questions" in proof["reason"]


def test_model_whose_memory_cannot_shift_is_said_to_read_in_place(tmp_path: Path) -> None:
    sliding = tiny_gguf.write_sliding(tmp_path / "sliding.gguf", 64)
    with pytest.raises(CannotRead):
        Reader(sliding, CONTEXT_TOKENS, ANSWER_TOKENS)
    proof = passages.prove(sliding, [asked(1)], ["en"], Verify(), CONTEXT_TOKENS)
    assert (proof["allowed_reread_tokens"], proof["reason"]) == (None, "parts of its memory cannot be kept")


def test_template_without_a_place_for_documents_is_the_reason(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}{{ messages[0].content }}"
    file = tiny_gguf.write(tmp_path / "placeless.gguf", template=template)
    proof = passages.prove(file, [asked(1)], ["en"], Verify(), CONTEXT_TOKENS)
    assert proof["allowed_reread_tokens"] is None
    assert "documents have no place in it" in proof["reason"]


def group(**changes: Any) -> dict[str, Any]:
    counts = {"facts": 200, "facts_kept": 199, "facts_added": 0}
    right = {"expected_facts": 100, "right_facts": 80, "right_facts_full": 80}
    return {"questions": 30, "kl_mean": 0.01, **counts, **right, **changes}


LIMITS = {"kl": 0.05, "facts": 0.02}


@pytest.mark.parametrize(
    ("first", "second", "allowed", "said"),
    [
        (group(), group(), 0, "with 0 tokens of each document"),
        (group(kl_mean=0.06), group(), 8, "with 8 tokens of each document"),
        (group(kl_mean=float("nan")), group(), 8, "with 8"),
        (group(facts_kept=195), group(), 8, "with 8"),
        (group(facts_added=4), group(), 8, "with 8"),
        (group(right_facts=77), group(), 8, "with 8"),
        (group(facts_kept=195), group(kl_mean=1.0), None, "2.5% of 200 facts are other ones (at most 2.0%)"),
        (group(questions=19), group(questions=19), None, "only 19 questions"),
    ],
)
def test_fewest_tokens_that_keep_to_the_limits_are_allowed(
    first: dict[str, Any], second: dict[str, Any], allowed: int | None, said: str
) -> None:
    found, reason = passages.decide({"0": {"en several": first}, "8": {"en several": second}}, ["en"], LIMITS)
    assert found == allowed
    assert said in reason


def test_every_language_must_have_been_asked_over_several_documents() -> None:
    groups = {"nl several": group(), "pl one": group(), "pl several": group(questions=4)}
    found, reason = passages.decide({"0": groups}, ["nl", "pl", "ar"], LIMITS)
    assert found is None
    assert reason.endswith("in each language: pl 4, ar 0")


def test_one_bad_language_refuses_for_all() -> None:
    for changes, said in (({"kl_mean": 0.2}, "differs by 0.200"), ({"facts": 9, "facts_kept": 8}, "changes 11.1% of its 9")):
        groups = {"nl several": group(facts=2000, facts_kept=2000), "pl several": group(**changes)}
        found, reason = passages.decide({"0": groups}, ["nl", "pl"], LIMITS)
        assert found is None
        assert f"pl several {said}" in reason


@pytest.mark.parametrize(
    ("text", "other", "found"),
    [
        ("Open from 18:00 at Kerkstraat 12.", "At Kerkstraat 12, 18:00", (2, 2)),
        ("Open from 18:00.", "Open from 19:00.", (1, 0)),
        ("the blue house", "The blue  house.", (1, 1)),
        ("the blue house", "the red one", (1, 0)),
        ("Die Küche hilft dir gern weiter.", "Die Küche hilft dir weiter.", (1, 1)),
    ],
)
def test_facts_are_compared_and_not_their_wording(text: str, other: str, found: tuple[int, int]) -> None:
    assert answer_facts.found_in(text, other, "de") == found


def test_what_is_said_besides_counts_as_what_is_lost() -> None:
    sums = answer_facts.Sums()
    assert sums.add("At 18:00.", "At 18:00.", "At 18:00 or 19:00, Kerkstraat 9.", "en") == 2
    sums.add_tokens([0.1, 0.3], 1)
    result = sums.result()
    assert (result["facts"], result["facts_kept"], result["facts_added"], result["right_facts"]) == (1, 1, 2, 1)
    assert (result["kl_mean"], result["same_top_ratio"]) == (pytest.approx(0.2), 0.5)
    assert answer_facts.changed_share(result) == 2.0


def test_few_facts_are_little_certainty() -> None:
    """Against the bound of Clopper and Pearson, from which Wilson's differs by little: 1 - 0.05 ** (1 / n) for none lost."""
    for total in (30, 60, 300):
        bound = answer_facts.at_most({"facts": total, "facts_kept": total})
        assert bound == pytest.approx(1 - 0.05 ** (1 / total), rel=0.15)


def test_rows_with_documents_are_tokens_as_serving_makes_them(trained: Trained, tmp_path: Path) -> None:
    """With a system message and without, which is made then; and as training makes them."""
    path = tmp_path / "sft.jsonl"
    rows = [{"messages": list(asked(1).messages), "documents": DOCUMENTS[:2]}, {"messages": list(asked(2).messages[1:])}]
    rows.append({"messages": rows[1]["messages"], "documents": DOCUMENTS[:1]})
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [len(each.documents) for each in read_asked(path)] == [2, 0, 1]
    tokenizer = pre_tokenizer.load(trained.made["merge"])
    file = Model(trained.full, is_mapped=True, is_repacked=False)
    encoder = PromptEncoder(file, ChatTemplate(file.chat_template or "", file.special_tokens), 2048)
    for messages, row in zip(read(path), rows, strict=True):
        ids = conversations.token_ids(tokenizer, messages[:-1], "a row", add_generation_prompt=True)
        assert tuple(ids) == encoder.encode(Question(row["messages"][:-1], row.get("documents", [])).prompt).tokens
        trained_on = documents.render(tokenizer, row["messages"][:-1], row.get("documents", []), add_generation_prompt=True)
        assert ids == trained_on.input_ids
    file.close()
    with GgufModel(trained.full, 64) as gguf:
        assert checks.compare_tokens(gguf, checks.renderings(tokenizer, read(path))) == []


def verified(trained: Trained, rows: Path, *more: str) -> Any:
    (eight,) = trained.made["Q8_0"].glob("*.gguf")
    where = ("--merged", trained.made["merge"], "--conversations", rows, "--quantized", eight, "--gate", "Q8_0")
    few = ("--prompts", "2", "--answer-tokens", "8", "--kl-limit", "10", "--serve", '{"context_tokens": 512}')
    return call("convert", "verify", trained.full, *where, *few, "--passages", *more, "--json")


def test_report_decides_how_the_model_is_served(trained: Trained, root: Path, tmp_path: Path) -> None:
    trained.copy(root, "gguf", "Q8_0", "merge")
    path = tmp_path / "data" / "sft.jsonl"
    path.parent.mkdir()
    documents = [{"id": "a", "text": "De balie is om 9:00 open."}, {"id": "b", "text": "Soep om 12:00."}]
    answer = {"role": "assistant", "content": "Om 9:00."}
    turns = [[{"role": "user", "content": f"Hoe laat {number}?"}, answer] for number in range(20)]
    path.write_text("\n".join(json.dumps({"messages": each, "documents": documents}) for each in turns))
    name = trained.made["Q8_0"].name

    strict = verified(trained, path, "--passages-kl-limit", "0", "--passages-lost-limit", "0")
    assert strict.exit_code == 0, strict.stderr
    assert json.loads(strict.stdout)["results"]["passages"]["allowed_reread_tokens"] is None
    assert served_model.find(name, root).proven_reread_tokens is None

    loose = verified(trained, path, "--passages-kl-limit", "100", "--passages-lost-limit", "1")
    assert loose.exit_code == 0, loose.stderr
    proof = json.loads(loose.stdout)["results"]["passages"]
    assert (proof["type"], proof["model"], proof["allowed_reread_tokens"]) == ("Q8_0", f"gguf/{name}", 0)
    page = next(root.glob("report/*/certificate.md"))
    pages = [each.read_text() for each in page.parent.parent.glob("*/certificate.md")]
    assert any('With `serve.documents = "auto"` they are read by themselves, 0 tokens' in each for each in pages)
    assert any("are read in their place" in each for each in pages)
    model = served_model.find(name, root)
    assert model.proven_reread_tokens == 0
    assert served_model.find(str(model.path), root).proven_reread_tokens == 0

    with running_server(model.path, "--context-tokens", "512", root=root) as server:
        assert any("as proven for this model" in line for line in server.errors)
        usage = server.chat("Hoe laat?", max_tokens=2, documents=documents).json()["usage"]
        assert usage["prompt_tokens_details"]["reading"] == "stitched"


@pytest.mark.usefixtures("root")
def test_rows_without_documents_prove_nothing(trained: Trained) -> None:
    result = verified(trained, trained.made["data"] / "sft.jsonl")
    assert result.exit_code != 0
    assert "has documents" in result.stderr
