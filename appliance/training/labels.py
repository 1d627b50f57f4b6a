"""Which tokens are learned from: the assistant's words and the token that ends its turn, nothing else.

Labels come from the chat template's `{% generation %}` markers where it has them, and from the difference between
renderings (prompt with generation prompt, prompt with answer) where it has none, and for conversations with documents, which
are no single string. What a template puts before every answer by
itself, as Qwen3 its empty reasoning, is learned as well: a model that is asked must write it. Whatever their source,
`verify_labels` holds labels against the messages on token ids before the first step.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from appliance.data.documents import DOCUMENTS, KEYS
from appliance.errors import DataError, VerificationFailed, several
from appliance.text.chat_template import TemplateFailed
from appliance.training import documents
from appliance.training.documents import Tokens

IGNORED = -100
MOST_SHOWN = 20
LAST_ONLY = "last_only"  # of a row that `unfold` made
REASONING = re.compile(r"\s*(</?think>)\s*")
PROBE = "Zx7Qp"  # an answer that no template has in its own text
HALF_CHARACTER = "\ufffd"  # what a decoder makes of the bytes that a cut left of a character


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """One conversation as token ids `(tokens,)` and labels `(tokens,)`, -100 where nothing is learned.

    `bounds` are positions: of each document's first token, and of what follows the last; none without documents.
    """

    line: int
    input_ids: list[int]
    labels: list[int]
    cut_tokens: int = 0  # left off at its end
    bounds: tuple[int, ...] = ()

    @property
    def learned_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels)


def unfold(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as they are, but for conversations whose earlier answers the template writes otherwise once a question follows.

    Qwen3 takes the reasoning out of them. Of such a conversation each answer gets a row that ends with it, and is learned
    there alone: as the model writes it when it is asked, after what it sees then.
    """
    found: list[dict[str, Any]] = []
    for row in rows:
        messages = row["messages"]
        until = [at + 1 for at, message in enumerate(messages) if message["role"] == "assistant"]
        parts = [_rendered(tokenizer, row, end, add_generation_prompt=False).input_ids for end in until]
        whole = parts[-1] if parts else []
        if all(whole[: len(part)] == part for part in map(_without_end, parts)):
            found.append(row)
        else:
            found += [{**row, "messages": messages[:end], LAST_ONLY: True} for end in until]
    return found


def label_conversations(tokenizer: Any, rows: Sequence[dict[str, Any]], marked_template: str | None) -> list[LabelledRow]:
    """Tokenizes and labels; `marked_template` is the tokenizer's own template with generation markers, if there is one."""
    require_plain_text(tokenizer, [(row["line"], _texts(row)) for row in rows])
    labelled = []
    for row in rows:
        tokens = _rendered(tokenizer, row, add_generation_prompt=False)
        mask = (
            _mask_by_markers(tokenizer, row["messages"], marked_template, tokens.input_ids)
            if marked_template and not row.get(DOCUMENTS)
            else _mask_by_difference(tokenizer, row, tokens.input_ids)
        )
        labels = [token if learned else IGNORED for token, learned in zip(tokens.input_ids, mask, strict=True)]
        labelled.append(LabelledRow(row["line"], tokens.input_ids, labels, bounds=tokens.bounds))
    return labelled


def render_ids(tokenizer: Any, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
    """Token ids of the rendered conversation, with the tokenizer's plain template."""
    rendered = tokenizer.apply_chat_template(
        list(messages), tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=True
    )
    return list(rendered["input_ids"])


def truncate(labelled: Sequence[LabelledRow], limit_tokens: int) -> list[LabelledRow]:
    """Each row without what exceeds the limit at its end; of a long prompt nothing to learn may be left.

    The end-of-turn token goes with the rest of an answer: where an answer is cut, no end is learned.
    """
    return [
        replace(
            row,
            input_ids=row.input_ids[:limit_tokens],
            labels=row.labels[:limit_tokens],
            cut_tokens=max(0, len(row.input_ids) - limit_tokens),
        )
        for row in labelled
    ]


def verify_labels(tokenizer: Any, rows: Sequence[dict[str, Any]], labelled: Sequence[LabelledRow]) -> None:
    """Decodes what is labelled and compares it with the assistant's messages, turn by turn.

    Raises `VerificationFailed` when a user, system or padding token has a label, an assistant token has none, or the
    end-of-turn token is not learned. Where a row was cut, the answer at its end must be the beginning of the message.
    """
    problems = []
    lead = _lead(tokenizer)
    for row, result in zip(rows, labelled, strict=True):
        answers = [_plain(message["content"]) for message in row["messages"] if message["role"] == "assistant"]
        if LAST_ONLY in row:
            answers = answers[-1:]
        spans = _labelled_spans(result.labels)
        if result.cut_tokens:
            answers = answers[: len(spans)]
        if len(spans) != len(answers) or not spans:
            problems.append(f"line {row['line']}: {len(answers)} assistant turns, {len(spans)} labelled spans")
            continue
        if result.cut_tokens and result.labels[-1] != IGNORED and spans[-1][-1] != tokenizer.eos_token_id:
            begin = _plain(_decode(tokenizer, spans.pop()).rstrip(HALF_CHARACTER))
            answer = answers.pop()
            if not (answer.startswith(begin) or _plain(lead + answer).startswith(begin)):
                problems.append(f"line {row['line']}: labelled text differs from the beginning of the cut message")
        for answer, span in zip(answers, spans, strict=True):
            if span[-1] != tokenizer.eos_token_id:
                problems.append(f"line {row['line']}: the end-of-turn token {tokenizer.eos_token!r} is not learned")
            elif _plain(_decode(tokenizer, span[:-1])) not in (answer, _plain(lead + answer)):
                problems.append(f"line {row['line']}: labelled text differs from the assistant's message")
    if problems:
        shown = [*problems[:MOST_SHOWN], *([f"and {len(problems) - MOST_SHOWN} more"] if len(problems) > MOST_SHOWN else [])]
        raise VerificationFailed(several(shown, "The label check failed, so training would learn the wrong tokens"))


def require_plain_text(tokenizer: Any, texts: Sequence[tuple[int, Sequence[str]]]) -> None:
    """Raises `DataError` for rows, given as (line, texts), that hold the text of one of this tokenizer's control tokens."""
    tokens = [token for token in tokenizer.all_special_tokens if token]
    found = [f"line {line}: {token!r}" for line, row in texts for token in tokens if any(token in each for each in row)]
    if found:
        raise DataError(several(found[:MOST_SHOWN], "Text that this base model would read as a control token; take it out"))


def require_lengths(
    lengths: Sequence[tuple[int, int]], limit_tokens: int, setting: str, file: str, otherwise: str = ""
) -> None:
    """Raises `DataError` naming every row longer than the limit; `lengths` holds (line, tokens)."""
    long = [f"{file} line {line}: {tokens} tokens" for line, tokens in lengths if tokens > limit_tokens]
    if long:
        longest = max(tokens for _, tokens in lengths)
        heading = f"Longer than {setting} = {limit_tokens} (shorten the row, or raise {setting} to {longest}{otherwise})"
        raise DataError(several(long, heading, MOST_SHOWN))


def _rendered(tokenizer: Any, row: dict[str, Any], end: int | None = None, *, add_generation_prompt: bool) -> Tokens:
    """The first messages of a row, up to `end`, with its documents; raises `DataError` where these have no place."""
    messages = row["messages"][:end]
    if not row.get(DOCUMENTS):
        return Tokens(render_ids(tokenizer, messages, add_generation_prompt=add_generation_prompt))
    try:
        return documents.render(tokenizer, messages, row[DOCUMENTS], add_generation_prompt=add_generation_prompt)
    except TemplateFailed as error:
        raise DataError(f"line {row['line']} has documents: {error}") from error


def _texts(row: dict[str, Any]) -> list[str]:
    """All texts of a row that reach the tokenizer."""
    told = [document[key] for document in row.get(DOCUMENTS, ()) for key in KEYS]
    return [*(message["content"] for message in row["messages"]), *told]


def _mask_by_markers(
    tokenizer: Any, messages: Sequence[dict[str, str]], marked_template: str, input_ids: Sequence[int]
) -> list[bool]:
    rendered = tokenizer.apply_chat_template(
        list(messages),
        chat_template=marked_template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    if list(rendered["input_ids"]) != list(input_ids):
        raise VerificationFailed("The template with generation markers renders other tokens than the model's own template.")
    return [bool(value) for value in rendered["assistant_masks"]]


def _mask_by_difference(tokenizer: Any, row: dict[str, Any], input_ids: Sequence[int]) -> list[bool]:
    mask = [False] * len(input_ids)
    positions = [position for position, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    for position in positions[-1:] if LAST_ONLY in row else positions:
        prompt = _rendered(tokenizer, row, position, add_generation_prompt=True).input_ids
        start = len(prompt)
        with_answer = _rendered(tokenizer, row, position + 1, add_generation_prompt=False).input_ids
        if with_answer[:start] != prompt:
            raise VerificationFailed(
                f"The chat template does not begin an answer as it asks for one, so the assistant's tokens {_untold(row)}"
            )
        if tokenizer.eos_token_id not in with_answer[start:]:
            raise VerificationFailed(
                f"The chat template ends an answer with {_decode(tokenizer, with_answer[-4:])!r}, without the tokenizer's"
                f" eos_token {tokenizer.eos_token!r}, at which a model stops; take the instruction-tuned model, or set"
                " eos_token in its tokenizer_config.json to the token that the template ends a turn with."
            )
        end = start + with_answer[start:].index(tokenizer.eos_token_id) + 1
        if with_answer[:end] != list(input_ids[:end]):
            raise VerificationFailed(
                "The chat template renders earlier turns differently once an answer follows, so the assistant's tokens"
                f" {_untold(row)}"
            )
        mask[start:end] = [True] * (end - start)
    return mask


def _untold(row: dict[str, Any]) -> str:
    """With documents a row is no single string, in which markers would tell."""
    if row.get(DOCUMENTS):
        return f"of line {row['line']}, which has documents, cannot be told apart; take a base with another chat template."
    return "cannot be told apart; give the base a training_template.jinja with {% generation %} markers."


def _lead(tokenizer: Any) -> str:
    """What the template writes before an answer that has no such thing itself: Qwen3 an empty reasoning."""
    asked: list[dict[str, str]] = [{"role": "user", "content": PROBE.lower()}]
    prompt = render_ids(tokenizer, asked, add_generation_prompt=True)
    answered = render_ids(tokenizer, [*asked, {"role": "assistant", "content": PROBE}], add_generation_prompt=False)
    if answered[: len(prompt)] != prompt:
        return ""
    before, found, _ = _decode(tokenizer, answered[len(prompt) :]).partition(PROBE)
    return before if found else ""


def _plain(text: str) -> str:
    """Without white space at its ends, and around reasoning, which templates set themselves."""
    return REASONING.sub(r"\1", text.strip())


def _without_end(part: Sequence[int]) -> Sequence[int]:
    """All but the last token: some templates end the last turn without the newline that they have between turns."""
    return part[:-1]


def _decode(tokenizer: Any, span: Sequence[int]) -> str:
    text: str = tokenizer.decode(span, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _labelled_spans(labels: Sequence[int]) -> list[list[int]]:
    """Maximal runs of labelled tokens."""
    spans: list[list[int]] = []
    inside = False
    for label in labels:
        if label == IGNORED:
            inside = False
        elif inside:
            spans[-1].append(label)
        else:
            spans.append([label])
            inside = True
    return spans
