"""Divergence by language equals the same sums over whole arrays of logits; only answers count, and the worst come first."""

from typing import Any

import numpy as np
import pytest

from convert import certificate, divergence
from convert.divergence import Answer
from convert.gguf_model import GgufModel
from convert.pre_tokenizer import load as load_tokenizer
from tests.running import Trained

MESSAGES = [
    {"role": "user", "content": "Waar is de balie?"},
    {"role": "assistant", "content": "De balie is aan de Lindekade 3, naast de brug."},
    {"role": "user", "content": "Dank je."},
    {"role": "assistant", "content": "Graag gedaan."},
]


@pytest.fixture(scope="module")
def tokenizer(trained: Trained) -> Any:
    return load_tokenizer(trained.made["merge"])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return (
        wide
        - np.log(np.exp(wide - wide.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
        - wide.max(axis=1, keepdims=True)
    )


def test_only_answers_are_measured_each_up_to_its_end(tokenizer: Any) -> None:
    found = divergence.answers(tokenizer, [MESSAGES], 1000)
    texts = [tokenizer.decode(each.tokens[each.start :]) for each in found]
    assert texts == [f"{MESSAGES[turn]['content']}<|im_end|>" for turn in (1, 3)]
    assert divergence.answers(tokenizer, [MESSAGES], len(found[0].tokens)) == found[:1]


def test_sums_are_those_of_whole_arrays(trained: Trained, tokenizer: Any) -> None:
    found = divergence.answers(tokenizer, [MESSAGES], 1000)
    (four,) = trained.made["Q4_K_M"].glob("*.gguf")
    with GgufModel(trained.full, context_tokens=256) as full, GgufModel(four, context_tokens=256) as quantized:
        measured = divergence.measure(full, quantized, {"nl": found, "en": found[:1]})
        kls, surprises, same = [], [], []
        for answer in found:
            inputs, first = list(answer.tokens[:-1]), answer.start - 1
            p, q = log_softmax(full.logits(inputs, first)), log_softmax(quantized.logits(inputs, first))
            kls += (np.exp(p) * (p - q)).sum(axis=1).tolist()
            surprises += [-q[row, token] for row, token in enumerate(answer.tokens[answer.start :])]
            same += (p.argmax(axis=1) == q.argmax(axis=1)).tolist()
    results, worst = measured.languages, measured.worst
    dutch = results["nl"]
    assert measured.rows["nl"] == {1: (pytest.approx(sum(kls), rel=1e-3), len(kls))}  # both answers are of one conversation
    assert dutch["tokens"] == len(kls) == sum(len(each.tokens) - each.start for each in found)
    assert dutch["kl_mean"] == pytest.approx(np.mean(kls), rel=1e-3)
    assert dutch["perplexity"] == pytest.approx(np.exp(np.mean(surprises)), rel=1e-4)
    assert dutch["same_top_ratio"] == pytest.approx(np.mean(same))
    assert dutch["kl_error"] == pytest.approx(np.std(kls, ddof=1) / np.sqrt(len(kls)), rel=1e-2)
    assert results["en"]["tokens"] == len(found[0].tokens) - found[0].start
    assert [each["kl"] for each in worst[:1]] == [pytest.approx(max(kls), abs=1e-3)]
    assert len(worst) == 10


def test_a_file_does_not_differ_from_itself(trained: Trained) -> None:
    answer = Answer(list(range(3, 100)), 5)
    with GgufModel(trained.full, context_tokens=256) as full, GgufModel(trained.full, context_tokens=256) as again:
        results = divergence.measure(full, again, {"nl": [answer]}).languages
    assert results["nl"]["kl_mean"] < 1e-6
    assert results["nl"]["same_top_ratio"] == 1.0
    assert results["nl"]["perplexity"] == pytest.approx(results["nl"]["perplexity_f16"], rel=1e-5)


def test_difference_is_paired_by_conversation() -> None:
    """Made numbers: the mean of all tokens' differences; its error from conversations, not from tokens."""
    generator = np.random.default_rng(5)
    counts = [3, 20, 8, 30, 12, 7]
    harder = generator.normal(scale=5.0, size=len(counts))  # of a conversation as a whole, in both files
    plain = {row: (10.0 + harder[row] + count * 0.05, count) for row, count in enumerate(counts)}
    gains = generator.normal(0.01, 0.002, len(counts)) * counts
    better = {row: (total - gains[row], count) for row, (total, count) in plain.items()}
    found = divergence.difference(better, plain)
    assert found["kl_difference"] == pytest.approx(-gains.sum() / sum(counts))
    assert (found["conversations"], found["tokens"]) == (6, 80)
    residues = -gains + gains.sum() / sum(counts) * np.array(counts)
    assert found["error"] == pytest.approx(np.sqrt(6 * (residues**2).sum() / 5) / 80)
    doubled = divergence.difference(
        {row: (2 * total, 2 * count) for row, (total, count) in better.items()},
        {row: (2 * total, 2 * count) for row, (total, count) in plain.items()},
    )
    assert doubled["error"] == pytest.approx(found["error"])  # more tokens in the same conversations tell nothing more
    assert divergence.difference({1: (1.0, 5)}, {1: (1.5, 5)}) == {
        "kl_difference": -0.1,
        "error": None,
        "conversations": 1,
        "tokens": 5,
    }


def test_verdict_says_which_language_is_worse_by_more_than_noise() -> None:
    found = {
        "nl": {"kl_difference": -0.01, "error": 0.002},
        "en": {"kl_difference": 0.01, "error": 0.006},
        "pl": {"kl_difference": 0.5, "error": None},
    }
    said = certificate.verdict("Q4_K_M", {}, found)
    assert said.startswith("The importance matrix of Q4_K_M makes no language worse by more than noise: ")
    assert "nl -0.0100 ± 0.0020 (better), en +0.0100 ± 0.0060 (within noise), pl +0.5000" in said
    assert "one conversation is too few to tell (pl)" in said
    worse = certificate.verdict("Q4_K_M", {"better": ["x"]}, {**found, "en": {"kl_difference": 0.01, "error": 0.004}})
    assert "with the better types, of Q4_K_M makes en worse by more than noise" in worse
