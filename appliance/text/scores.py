"""Scores of texts against references."""


def chrf(answer: str, reference: str) -> float:
    """Character n-gram F-score in 0 to 100 (Popović 2015), as sacrebleu computes it."""
    from sacrebleu.metrics import CHRF

    score: float = CHRF().sentence_score(answer, [reference]).score
    return score
