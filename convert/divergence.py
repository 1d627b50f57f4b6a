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

from convert import conversations
from convert.conversations import Messages
from convert.gguf_model import GgufModel

WORST_SHOWN = 10
CONTEXT_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Answer:
    """Token ids up to the end of an assistant's turn, where the turn begins, and which conversation it is of."""

    tokens: Sequence[int]
    start: int
    row: int = 0


@dataclass(slots=True)
class Sums:
    """Of one language; `rows` has the divergences of each conversation added up, and how many they are."""

    divergences: list[float] = field(default_factory=list)
    rows: dict[int, tuple[float, int]] = field(default_factory=dict)
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


@dataclass(frozen=True, slots=True)
class Measured:
    """Results by language, the ten tokens that changed most with what stands before them, and `Sums.rows` by language."""

    languages: dict[str, dict[str, Any]]
    worst: list[dict[str, Any]]
    rows: dict[str, dict[int, tuple[float, int]]]


def answers(tokenizer: Any, rows: Sequence[Messages], most_tokens: int, where: str = "of its language") -> list[Answer]:
    """Every assistant's turn of the rows, as training renders it; one that does not fit is left out.

    `where` says in an error which rows a number counts.
    """
    found = []
    for row, messages in enumerate(rows, 1):
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            name = f"turn {index + 1} of conversation {row} {where}"
            prompt = conversations.token_ids(tokenizer, messages[:index], name, add_generation_prompt=True)
            whole = conversations.token_ids(tokenizer, messages[: index + 1], name)
            if tokenizer.eos_token_id in whole[len(prompt) :]:  # what a template writes behind it is never generated
                whole = whole[: whole.index(tokenizer.eos_token_id, len(prompt)) + 1]
            if whole[: len(prompt)] == prompt and len(prompt) < len(whole) <= most_tokens:
                found.append(Answer(whole, len(prompt), row))
    return found


def measure(full: GgufModel, quantized: GgufModel, groups: Mapping[str, Sequence[Answer]]) -> Measured:
    """What quantization changed, answer by answer."""
    results, rows = {}, {}
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
            results[language], rows[language] = sums.result(), sums.rows
    return Measured(results, [each for *_, each in sorted(worst, key=lambda entry: -entry[0])], rows)


def difference(
    rows: Mapping[int, tuple[float, int]], plain: Mapping[int, tuple[float, int]]
) -> dict[str, float | int | None]:
    """How much more one file lost than another over the same conversations: the mean per token, in nats, and its error.

    Tokens of one conversation are not independent, so that conversations are the sample: the standard error is that of a
    ratio of sums over conversations (Cochran, Sampling Techniques, 6.4). It is None where there is but one of them.
    """
    tokens = sum(count for _, count in rows.values())
    differences = {row: (total - plain[row][0], count) for row, (total, count) in rows.items()}
    mean = sum(total for total, _ in differences.values()) / tokens
    spread = sum((total - mean * count) ** 2 for total, count in differences.values())
    sample = len(differences)
    error = math.sqrt(spread * sample / (sample - 1)) / tokens if sample > 1 else None
    return {"kl_difference": mean, "error": error, "conversations": sample, "tokens": tokens}


def _positions(full: GgufModel, quantized: GgufModel, answer: Answer, sums: Sums) -> Iterator[tuple[int, float, Any]]:
    """Adds up one answer; yields each position, its divergence and the top tokens of both."""
    import numpy

    inputs, first = answer.tokens[:-1], answer.start - 1
    for (position, ours), (_, theirs) in zip(full.stream(inputs, first), quantized.stream(inputs, first), strict=True):
        sixteen, fewer = log_softmax(ours), log_softmax(theirs)
        divergences = numpy.maximum((numpy.exp(sixteen) * (sixteen - fewer)).sum(axis=1), 0.0)
        actual = numpy.array(answer.tokens[position + 1 : position + 1 + len(ours)])
        rows = numpy.arange(len(actual))
        tops = numpy.stack([sixteen.argmax(axis=1), fewer.argmax(axis=1)], axis=1)
        sums.agreed += int((tops[:, 0] == tops[:, 1]).sum())
        sums.surprise -= float(sixteen[rows, actual].sum())
        sums.surprise_quantized -= float(fewer[rows, actual].sum())
        total, count = sums.rows.get(answer.row, (0.0, 0))
        sums.rows[answer.row] = (total + float(divergences.sum(dtype=float)), count + len(divergences))
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


def log_softmax(logits: Any) -> Any:
    """Log probabilities, row by row."""
    import numpy

    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - numpy.log(numpy.exp(shifted).sum(axis=1, keepdims=True))


def _standard_error(values: Sequence[float]) -> float:
    """Of the mean; positions of one answer are not independent, so it is a lower bound."""
    if len(values) < 2:
        return math.inf
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
