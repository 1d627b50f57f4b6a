"""Markers in text that arrives in pieces."""


def partial_end(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker` without being all of it."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0
