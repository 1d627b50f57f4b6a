"""What quantization cost, by language: a quantized file beside the 16-bit one, token by token over answers.

At each position of an assistant's turn both files give a distribution over the next token. Their Kullback-Leibler divergence
(in nats, 16 bits against quantized), whether the top tokens agree, and the perplexity of the text that stands there are
summed as they come; logits of a few dozen positions are in memory at a time, and none on disk.
"""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from convert.conversations import Messages
from convert.gguf_model import GgufModel

WORST_SHOWN = 10
CONTEXT_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Answer:
    """Token ids up to the end of an assistant's turn, and where the turn begins."""

    tokens: Sequence[int]
    start: int


@dataclass(slots=True)
class Sums:
    """Of one language."""

    divergences: list[float] = field(default_factory=list)
    agreed: int = 0
    surprise: float = 0.0  # nats, of the 16-bit file
    surprise_quantized: float = 0.0

    def result(self) -> dict[str, Any]:
        tokens = len(self.divergences)
        ordered = sorted(self.divergences)
        return {
            "tokens": tokens,
            "kl_mean": sum(ordered) / tokens,
            "kl_p99": ordered[min(tokens - 1, math.ceil(0.99 * tokens) - 1)],
            "kl_error": _standard_error(ordered),
            "same_top_ratio": self.agreed / tokens,
            "perplexity_f16": math.exp(self.surprise / tokens),
            "perplexity": math.exp(self.surprise_quantized / tokens),
        }


def answers(tokenizer: Any, rows: Sequence[Messages], most_tokens: int) -> list[Answer]:
    """Every assistant's turn of the rows, as training renders it; one that does not fit is left out."""
    found = []
    for messages in rows:
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = _ids(tokenizer, messages[:index], add_generation_prompt=True)
            whole = _ids(tokenizer, messages[: index + 1], add_generation_prompt=False)
            if tokenizer.eos_token_id in whole[len(prompt) :]:  # what a template writes behind it is never generated
                whole = whole[: whole.index(tokenizer.eos_token_id, len(prompt)) + 1]
            if whole[: len(prompt)] == prompt and len(prompt) < len(whole) <= most_tokens:
                found.append(Answer(whole, len(prompt)))
    return found


def measure(
    full: GgufModel, quantized: GgufModel, groups: Mapping[str, Sequence[Answer]]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Results by language, and the ten tokens that quantization changed most, with what stands before them."""
    results = {}
    worst: list[tuple[float, int, dict[str, Any]]] = []
    number = 0
    for language, group in groups.items():
        sums = Sums()
        for answer in group:
            for position, kl, tops in _positions(full, quantized, answer, sums):
                if len(worst) == WORST_SHOWN and kl <= worst[0][0]:
                    continue
                if len(worst) == WORST_SHOWN:
                    heapq.heappop(worst)
                number += 1  # decides between equal ones
                heapq.heappush(worst, (kl, number, _told(full, answer, position, language, kl, tops)))
        if sums.divergences:
            results[language] = sums.result()
    return results, [each for *_, each in sorted(worst, key=lambda entry: -entry[0])]


def _positions(full: GgufModel, quantized: GgufModel, answer: Answer, sums: Sums) -> Iterator[tuple[int, float, Any]]:
    """Adds up one answer; yields each position, its divergence and the top tokens of both."""
    import numpy

    inputs, first = answer.tokens[:-1], answer.start - 1
    for (position, ours), (_, theirs) in zip(full.stream(inputs, first), quantized.stream(inputs, first), strict=True):
        sixteen, fewer = _log_softmax(ours), _log_softmax(theirs)
        divergences = numpy.maximum((numpy.exp(sixteen) * (sixteen - fewer)).sum(axis=1), 0.0)
        actual = numpy.array(answer.tokens[position + 1 : position + 1 + len(ours)])
        rows = numpy.arange(len(actual))
        tops = numpy.stack([sixteen.argmax(axis=1), fewer.argmax(axis=1)], axis=1)
        sums.agreed += int((tops[:, 0] == tops[:, 1]).sum())
        sums.surprise -= float(sixteen[rows, actual].sum())
        sums.surprise_quantized -= float(fewer[rows, actual].sum())
        for row, kl in enumerate(divergences):
            sums.divergences.append(float(kl))
            yield position + row, float(kl), tops[row]


def _told(full: GgufModel, answer: Answer, position: int, language: str, kl: float, tops: Any) -> dict[str, Any]:
    before = answer.tokens[max(0, position + 1 - CONTEXT_TOKENS) : position + 1]
    return {
        "language": language,
        "kl": round(kl, 4),
        "after": full.detokenize(before, with_control=True),
        "f16": full.detokenize([int(tops[0])], with_control=True),
        "quantized": full.detokenize([int(tops[1])], with_control=True),
    }


def _log_softmax(logits: Any) -> Any:
    import numpy

    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - numpy.log(numpy.exp(shifted).sum(axis=1, keepdims=True))


def _standard_error(values: Sequence[float]) -> float:
    """Of the mean; positions of one answer are not independent, so it is a lower bound."""
    if len(values) < 2:
        return math.inf
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _ids(tokenizer: Any, messages: Messages, *, add_generation_prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
