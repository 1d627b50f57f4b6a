"""A running server, as the tests with real clients see it."""

import dataclasses

import httpx

from tests import tiny_gguf
from tests.serving.serving_process import until

CHAT, VECTORS, RERANKER = "tiny", "vectors", "reranker"
PER_MINUTE = 10


@dataclasses.dataclass(frozen=True, slots=True)
class Served:
    url: str
    keys: dict[str, str] = dataclasses.field(default_factory=dict)  # by scope

    @property
    def endless(self) -> dict[str, int]:
        """As logit_bias, keeps an answer from ending before its last token."""
        words = tiny_gguf.vocabulary()
        return {str(words.index(special)): -100 for special in tiny_gguf.SPECIALS}

    def until_idle(self) -> None:
        """Waits until what departed clients had asked for is gone."""
        until(lambda: self._requests() == 0)

    def _requests(self) -> int:
        load: dict[str, int] = httpx.get(f"{self.url}/readyz", trust_env=False).json()
        return load["running"] + load["waiting"]
