"""What is asked of an engine, as plain data that crosses to the engine's process. Knows nothing of HTTP or llama.cpp.

Times are `time.monotonic()` seconds, which processes of one machine share.
"""

from typing import Any, Literal

from msgspec import Struct

GrammarKind = Literal["json_schema", "regex", "lark", "gbnf"]


class Document(Struct, frozen=True, kw_only=True):
    """What an answer may rest on. `score` says how relevant it is, higher is more; None: its place is as given."""

    id: str
    text: str
    score: float | None = None


class ChatPrompt(Struct, frozen=True, kw_only=True, tag=True):
    """A conversation for the model's chat template; `messages` and `tools` as OpenAI's API spells them, content as text.

    `documents` stand between the system prompt and the conversation.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    documents: tuple[Document, ...] = ()
    template_variables: dict[str, Any] = {}  # reach the template by name, for example enable_thinking


class TextPrompt(Struct, frozen=True, kw_only=True, tag=True):
    """Text to continue as it stands; control tokens in it are plain text."""

    text: str


class TokenPrompt(Struct, frozen=True, kw_only=True, tag=True):
    """Token ids to continue."""

    tokens: tuple[int, ...]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


class SamplingSettings(Struct, frozen=True, kw_only=True):
    """How the next token is chosen. Temperature 0 takes the likeliest token; the filters then do nothing.

    The order is llama.cpp's: logit_bias, grammar, penalties (over generated tokens only), top_k, top_p, min_p, temperature.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_penalty: float = 1.0  # Ollama's and llama.cpp's; 1 does nothing
    seed: int | None = None
    logit_bias: dict[int, float] = {}  # added to the logit of a token id; -100 or less forbids it


class Grammar(Struct, frozen=True, kw_only=True):
    """What the answer must look like. With `after`, only text that follows this marker is bound: each time the marker has
    been generated the grammar starts anew, and when it is complete the answer is free again. Without it, the whole answer is
    bound and ends where the grammar does.

    `is_required` (only with `after`) means that the answer may not end before the marker was seen once; `is_last`, that it
    ends where the grammar is complete for the first time.
    """

    kind: GrammarKind
    source: str
    after: str | None = None
    field: str | None = None  # of the client's request, for errors to name
    is_required: bool = False
    is_last: bool = False


class GenerationRequest(Struct, frozen=True, kw_only=True, tag=True):
    """A prompt and how to continue it; `arrived_at` is where the waiting of the client began."""

    id: str
    prompt: Prompt
    arrived_at: float
    max_tokens: int  # the context may end the answer sooner
    deadline_at: float | None = None
    n: int = 1  # answers to the same prompt; the seed of answer i is seed + i
    stop: tuple[str, ...] = ()
    sampling: SamplingSettings = SamplingSettings()
    grammar: Grammar | None = None
    top_logprobs: int | None = None  # None: no log probabilities; k: of the token chosen and of the k likeliest
    adapter: str | None = None  # a name of `ModelInfo.adapters`
    adapter_scale: float = 1.0
    tenant: str = ""  # prompts are cached for requests of the same tenant only
    ignore_end: bool = False  # benchmarks: go on to max_tokens whatever the model says


class PoolingRequest(Struct, frozen=True, kw_only=True, tag=True):
    """Texts to embed, or, with `query`, documents to score against it."""

    id: str
    inputs: tuple[str | tuple[int, ...], ...]  # texts or token ids
    arrived_at: float
    deadline_at: float | None = None
    query: str | None = None


class TokenizeRequest(Struct, frozen=True, kw_only=True, tag=True):
    """`is_special_parsed` turns texts of control tokens into those tokens."""

    id: str
    text: str
    is_special_parsed: bool = False


class DetokenizeRequest(Struct, frozen=True, kw_only=True, tag=True):
    id: str
    tokens: tuple[int, ...]


class TemplateRequest(Struct, frozen=True, kw_only=True, tag=True):
    """Asks for the text that a conversation becomes."""

    id: str
    prompt: ChatPrompt


Request = GenerationRequest | PoolingRequest | TokenizeRequest | DetokenizeRequest | TemplateRequest
