"""Greedy answers of the base beside those of the adapter, so that a person sees what training changed."""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance.data import personal
from appliance.data.questions import Question, training_questions
from appliance.recipe import Recipe
from appliance.training import documents, processes
from appliance.training.labels import IGNORED, LabelledRow

SAMPLES, LEARNED = "samples.json", "learned.json"
ANSWER_TOKENS = 120
HEAD_PARTS = 16
CANDIDATES = 8  # questions of a language, of which the first is asked that holds no personal data


def write(model: Any, tokenizer: Any, rows: list[dict[str, Any]], recipe: Recipe, folder: Path) -> None:
    """`samples.json`: one training question in each language, the answer trained for, the base's and the adapter's.

    Others may read it, so that a row with personal data is not taken; a language with nothing else has no sample. Every
    process must call it, since a sharded model answers only through all; the first one writes.
    """
    samples = []
    model.eval()
    for question in _questions(rows, recipe.languages):
        prompt = [{"role": "user", "content": question.question}]
        with model.disable_adapter():
            base = answer(model, tokenizer, prompt, question.documents)
        samples.append(
            {
                "language": question.language,
                "question": question.question,
                "trained_for": question.answer,
                "base": base,
                "adapter": answer(model, tokenizer, prompt, question.documents),
                **({"documents": [each["id"] for each in question.documents]} if question.documents else {}),
            }
        )
    if processes.is_first():
        text = json.dumps(samples, indent=2, ensure_ascii=False) + "\n"
        (folder / SAMPLES).write_text(text, encoding="utf-8")


def write_learned(tokenizer: Any, labelled: Sequence[LabelledRow], recipe: Recipe, folder: Path) -> None:
    """`learned.json`: one row as the model sees it, in pieces that are learned and that are not; from the first process.

    The middle one of those without personal data; none where all have some.
    """
    if not processes.is_first():
        return
    for row in labelled[len(labelled) // 2 :]:
        spans = itertools.groupby(zip(row.input_ids, row.labels, strict=True), lambda pair: pair[1] != IGNORED)
        texts = [(is_learned, tokenizer.decode([token for token, _ in pairs])) for is_learned, pairs in spans]
        pieces = [{"is_learned": is_learned, "text": text} for is_learned, text in texts]
        if not _holds_personal("".join(str(each["text"]) for each in pieces), recipe.languages):
            text = json.dumps({"line": row.line, "pieces": pieces}, indent=2, ensure_ascii=False) + "\n"
            (folder / LEARNED).write_text(text, encoding="utf-8")
            return


def _questions(rows: list[dict[str, Any]], languages: Sequence[str]) -> list[Question]:
    """The middle one of each language, or the next to it."""
    chosen = []
    candidates = training_questions(rows, languages, CANDIDATES)
    for language in languages:
        found = [each for each in candidates if each.language == language]
        from_the_middle = sorted(range(len(found)), key=lambda at: abs(2 * at + 1 - len(found)))
        fitting = (found[at] for at in from_the_middle if not _is_personal(found[at], languages))
        chosen += [each for each in (next(fitting, None),) if each is not None]
    return chosen


def _is_personal(question: Question, languages: Sequence[str]) -> bool:
    """Whether anything in it looks like personal data; an organisation's own number counts too."""
    told = "\n".join(each["text"] for each in question.documents)
    return _holds_personal(f"{question.question}\n{question.answer}\n{told}", languages)


def _holds_personal(text: str, languages: Sequence[str]) -> bool:
    regions = personal.regions_of(languages)
    return any(any(True for _ in kind.values(text, regions)) for kind in personal.KINDS)


def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]], told: Sequence[Mapping[str, str]] = ()) -> str:
    """The model's greedy answer to a conversation with documents, which it reads in their place."""
    import torch

    rendered = documents.render(tokenizer, messages, told, add_generation_prompt=True)
    ids = torch.tensor([rendered.input_ids], device=model.device)
    with torch.inference_mode(), _head_in_parts(model):
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    text: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


@contextlib.contextmanager
def _head_in_parts(model: Any) -> Iterator[None]:
    """On a CPU, what oneDNN lays out anew of 16-bit weights is as large as they are, and it keeps the place."""
    import torch

    head = model.get_output_embeddings()
    if head.weight.device.type != "cpu":
        yield
        return

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.device.type != "cpu":  # a head that stays in memory, and comes to the card in parts of its own
            return whole(hidden)
        weights = head.weight.chunk(HEAD_PARTS)
        biases = [None] * len(weights) if head.bias is None else head.bias.chunk(HEAD_PARTS)
        parts = [torch.nn.functional.linear(hidden, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        return torch.cat(parts, -1)

    whole, head.forward = head.forward, forward
    try:
        yield
    finally:
        head.forward = whole
