"""What an examination of data or of a training run found: said in words, with evidence and with what to do about it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["problem", "notice"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found. A problem spoils what is trained; a notice is worth knowing.

    `kind` is a stable name for programs ("near_duplicates"); `count` the number of rows or steps that it concerns;
    `examples` say where to look, as `file:line` or `step 120`, the worst first; `figures` are what the sentence rests on.
    """

    kind: str
    level: Level
    what: str
    remedy: str
    count: int = 0
    examples: Sequence[str] = ()
    figures: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        where = f" ({', '.join(self.examples)})" if self.examples else ""
        return f"{self.level}: {self.what}{where}. {self.remedy}"
