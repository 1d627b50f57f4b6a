"""The rewards that a recipe can name for GRPO, and their settings. What they compute is in `appliance/training/rewards/`."""

import dataclasses
from pathlib import Path
from typing import Literal

from appliance.config import setting


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TfidfSimilarity:
    """How near the answer's words are to those of its reference; rare words count more."""

    weight: float = setting(1.0, minimum=0.0)
    guard: bool = setting(
        True, about="less for answers shorter or more repetitive than the reference, so that keywords gain nothing"
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SentimentMatch:
    """The probability that a classifier gives the label wanted of the answer."""

    encoder: Path = setting(about="a classifier as `appliance convert onnx` makes it")
    column: str = setting("sentiment", about="of the rows, with the label that is wanted")
    precision: Literal["fp32", "int8"] = setting("fp32")
    weight: float = setting(1.0, minimum=0.0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LanguageMatch:
    """The probability that the answer is in the language of its reference."""

    column: str | None = setting(None, about="of the rows, with the language that is wanted instead (ISO 639-1)")
    weight: float = setting(1.0, minimum=0.0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FormatTags:
    """Whether the answer begins with these tags, one after the other, filled and closed, and goes on after them."""

    tags: tuple[str, ...] = setting(("think",), about="names, without < and >")
    weight: float = setting(1.0, minimum=0.0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BooleanSyntax:
    """How well-formed the answer is as a search query."""

    dialect: Literal["lucene", "pubmed", "ovid"] = setting("lucene")
    least_operators: int = setting(1, minimum=0, about="a query with fewer gets less, or words alone would always do")
    weight: float = setting(1.0, minimum=0.0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Readability:
    """Whether the answer reads as easily as wanted: Flesch's scale, fitted to the language."""

    ease: float = setting(60.0, minimum=0.0, maximum=100.0, about="from which on the reward is whole; 60 is plain language")
    weight: float = setting(1.0, minimum=0.0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GroundedIn:
    """The share of the answer's facts (numbers, times, addresses, names) that its reference has too."""

    weight: float = setting(1.0, minimum=0.0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """Whether the answer has so many words; less the further it is from that."""

    least_words: int = setting(5, minimum=0)
    most_words: int = setting(80, minimum=1)
    weight: float = setting(1.0, minimum=0.0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OwnReward:
    """A function of yours, called as TRL calls it; a module beside the recipe comes before an installed one."""

    function: Path = setting(about="module:function")
    weight: float = setting(1.0, minimum=0.0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """Each table that a recipe names is a reward, empty or not; answers are judged by their weighted sum."""

    tfidf_similarity: TfidfSimilarity | None = None
    sentiment_match: SentimentMatch | None = None
    language_match: LanguageMatch | None = None
    format_tags: FormatTags | None = None
    boolean_syntax: BooleanSyntax | None = None
    readability: Readability | None = None
    grounded_in: GroundedIn | None = None
    length: Length | None = None
    own: tuple[OwnReward, ...] = ()

    def named(self) -> dict[str, "Reward"]:
        """Those that the recipe has, by name; own ones are named after their functions."""
        fields = [field.name for field in dataclasses.fields(self) if field.name != "own"]
        chosen = {name: reward for name in fields if (reward := getattr(self, name)) is not None}
        return chosen | {each.function.name: each for each in self.own}


Reward = (
    TfidfSimilarity
    | SentimentMatch
    | LanguageMatch
    | FormatTags
    | BooleanSyntax
    | Readability
    | GroundedIn
    | Length
    | OwnReward
)
