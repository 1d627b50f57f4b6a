"""Grammars that bind an answer, through llguidance: compiling them within limits, and following one while tokens come.

`GrammarCompiler` may be used from any thread; a `Gate` belongs to one answer. Knows nothing of llama.cpp or sampling.
"""

import concurrent.futures
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from appliance.errors import RequestError
from appliance.serving import grammar_check
from appliance.serving.requests import Grammar
from appliance.serving.sampling import TokenIds

COMPILE_SECONDS = 20.0
COMPILE_STACK_BYTES = 64 * 1024 * 1024  # llguidance recurses for each `$ref`: 8 MiB end at 700 of them, one inside the other
KEPT_GRAMMARS = 32
MESSAGE_CHARACTERS = 300

_GBNF_CODE_POINT = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)


_EXCERPT = re.compile(r"(?m)^\s*\d+ \| ")  # the first numbered line of the source
_PLACE_OF_SCHEMA = re.compile(r"^at \d+\(\d+\): failed to compile JSON schema: ")


class GrammarStuck(Exception):
    """The grammar leaves no token, or became too complex for its limits on the way."""


class CompiledGrammar:
    """A grammar that was found to be good."""

    def __init__(self, grammar: Grammar, matcher: Any) -> None:
        self.after = None if grammar.after is None else grammar.after.encode()
        self.is_required, self.is_last = grammar.is_required, grammar.is_last
        self._matcher = matcher

    def matcher(self) -> Any:
        """A new one, at the grammar's beginning."""
        return self._matcher.deep_copy()


class GrammarCompiler:
    """Checks and compiles grammars for one vocabulary, one after the other; keeps those used last."""

    def __init__(self, make_tokenizer: Callable[[], LLTokenizer], end_tokens: TokenIds) -> None:
        self._make_tokenizer, self._end_tokens = make_tokenizer, end_tokens
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._matchers: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._thread = _thread_with_a_large_stack()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Raises `RequestError` for a grammar that is wrong, too large, or takes too long."""
        if len(self._end_tokens) == 0:
            raise RequestError("This model's vocabulary has no token that ends an answer; ask without a grammar.")
        key = (grammar.kind, grammar.source)
        with self._lock:
            if (matcher := self._matchers.get(key)) is not None:
                self._matchers.move_to_end(key)
        if matcher is None:
            _check(grammar)
            matcher = self._compiled(grammar)
            with self._lock:
                self._matchers[key] = matcher
                if len(self._matchers) > KEPT_GRAMMARS:
                    self._matchers.popitem(last=False)
        return CompiledGrammar(grammar, matcher)

    def gate(self, compiled: CompiledGrammar, piece: Callable[[int], bytes]) -> "Gate":
        return Gate(compiled, self._tokens(), self._end_tokens, piece)

    def close(self) -> None:
        """A compilation that still runs is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _tokens(self) -> LLTokenizer:
        """Made when first needed: it takes a second for a large vocabulary."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._make_tokenizer()
            return self._tokenizer

    def _compiled(self, grammar: Grammar) -> Any:
        future = self._thread.submit(_matcher, grammar, self._tokens())
        try:
            matcher, problem = future.result(COMPILE_SECONDS)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise RequestError(
                f"{_named(grammar)} was not compiled within {COMPILE_SECONDS:g} seconds; give a simpler one, "
                "or try again when the server is less busy.",
                param=grammar.field,
            ) from None
        if problem:
            raise RequestError(f"{_named(grammar)} is refused: {_told(problem)}", param=grammar.field)
        return matcher


class Gate:
    """Where one answer is in its grammar: what may come next, and what came."""

    def __init__(
        self, compiled: CompiledGrammar, tokenizer: LLTokenizer, end_tokens: TokenIds, piece: Callable[[int], bytes]
    ) -> None:
        self._compiled, self._tokenizer, self._end_tokens, self._piece = compiled, tokenizer, end_tokens, piece
        self._ends = frozenset(map(int, end_tokens))
        self._marker = compiled.after
        self._matcher = compiled.matcher() if self._marker is None else None
        self._tail = b""  # the end of the free text, where a marker may have begun
        self._is_marker_seen = self._is_ended = False
        self._forced: deque[int] = deque()  # decided and not yet accepted

    @property
    def is_end_forbidden(self) -> bool:
        return self._matcher is None and self._compiled.is_required and not self._is_marker_seen

    def allowed(self) -> TokenIds | None:
        """The tokens that may come next; None when all may. Raises `GrammarStuck`."""
        if self._matcher is None:
            return None
        if self._is_complete():
            return self._end_tokens
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise GrammarStuck(_shortened(self._matcher.get_error()))
        ids = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
        if len(ids) == 0:
            raise GrammarStuck("no token fits")
        return ids

    def permits(self, token: int) -> bool:
        """Whether a token of free text may come: not when it ends the marker and goes on with what the grammar refuses."""
        if self._matcher is not None:
            return True
        rest = self._after_marker(token)
        return not rest or self._begun(rest) is not None

    def next_forced(self) -> int | None:
        """The next token if the grammar decides it: text that has no alternative, or the end where nothing may follow.

        The same for a state however it was reached, so that drafts, which pass through states one by one, change nothing.
        """
        if not self._forced and self._matcher is not None and not self._matcher.is_error():
            if not self._is_complete():
                self._forced.extend(map(int, self._matcher.compute_ff_tokens()))
            elif not self._is_ended:
                self._forced.append(int(self._end_tokens[0]))
        return self._forced[0] if self._forced else None

    def accept(self, token: int) -> None:
        """Moves on by a token that was sampled or forced."""
        if not self._forced or self._forced.popleft() != token:
            self._forced.clear()
        if token in self._ends:
            self._is_ended = True
        elif self._matcher is None:
            self._accept_free(token)
        else:
            self._matcher.consume_token(token)  # a failure is told by `allowed`
            if self._marker is not None and not self._compiled.is_last and self._is_complete():
                self._matcher, self._tail = None, b""

    def _is_complete(self) -> bool:
        """Whether the grammar has ended and nothing may follow."""
        return self._matcher is not None and self._matcher.is_stopped() and not self._matcher.is_error()

    def _accept_free(self, token: int) -> None:
        rest = self._after_marker(token)
        if rest is not None:
            self._matcher, self._tail, self._is_marker_seen = self._begun(rest), b"", True
            assert self._matcher is not None, "a token was accepted that is not permitted"
        elif self._marker is not None:
            text = self._tail + self._piece(token)
            self._tail = text[max(len(text) - len(self._marker) + 1, 0) :]

    def _after_marker(self, token: int) -> bytes | None:
        """What the token's text has behind the end of the marker; None if the marker does not end in it."""
        if self._marker is None:
            return None
        _, found, rest = (self._tail + self._piece(token)).partition(self._marker)
        return rest if found else None

    def _begun(self, text: bytes) -> Any:
        """A matcher that has taken `text`; None if that is no beginning of the grammar."""
        matcher = self._compiled.matcher()
        tokens = self._tokenizer.tokenize_bytes(text) if text else []
        return matcher if matcher.try_consume_tokens(tokens) == len(tokens) else None


def _matcher(grammar: Grammar, tokenizer: LLTokenizer) -> tuple[Any, str]:
    """A matcher at the grammar's beginning, or what is wrong with the grammar."""
    try:
        text = _llguidance_form(grammar)
    except RecursionError:
        return None, "it is nested too deeply"
    except Exception as error:  # gbnf_to_lark raises plain `Exception` for mistakes in the grammar
        return None, str(error)
    limits = LLParserLimits(
        initial_lexer_fuel=200_000,
        max_items_in_row=10_000,  # alternatives at one place: an object of 2,000 properties has 8,000
        step_max_items=20_000,  # a quarter of a second at worst
        max_lexer_states=50_000,  # 1 to 2 kB each
        precompute_large_lexemes=False,  # would walk the whole vocabulary now
        verbose_errors=False,
    )
    matcher = LLMatcher(tokenizer, text, limits=limits, log_level=0)
    problems = [matcher.get_error()] if matcher.is_error() else matcher.get_grammar_warnings()
    if problems:  # a warning names something that would be ignored
        return None, "; ".join(problems)
    trial = matcher.deep_copy()
    trial.compute_bitmask()
    if trial.is_error():
        return None, f"no text begins as it says, or too many do ({trial.get_error()})"
    return matcher, ""


def _llguidance_form(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_schema":
            return str(LLMatcher.grammar_from_json_schema(grammar.source))
        case "regex":
            return str(LLMatcher.grammar_from_regex(grammar.source))
        case "gbnf":
            return str(LLMatcher.grammar_from_lark(gbnf_to_lark(_GBNF_CODE_POINT.sub(_spelled_out, grammar.source))))
        case "lark":
            return str(LLMatcher.grammar_from_lark(grammar.source))


def _spelled_out(escape: re.Match[str]) -> str:
    """The character itself for an escape with leading zeros, which gbnf_to_lark spells wrong."""
    digits = escape[1] or escape[2]
    if digits is None:
        return escape[0]
    character = chr(int(digits, 16))
    return character if character.isalnum() else f"\\x{ord(character):02x}" if ord(character) < 128 else character


def _thread_with_a_large_stack() -> concurrent.futures.ThreadPoolExecutor:
    executor = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
    usual = threading.stack_size(COMPILE_STACK_BYTES)
    try:
        executor.submit(bool).result()
    finally:
        threading.stack_size(usual)
    return executor


def _check(grammar: Grammar) -> None:
    try:
        grammar_check.check(grammar)
    except RequestError as error:
        raise RequestError(str(error), param=grammar.field) from None


def _named(grammar: Grammar) -> str:
    return f"The {grammar.kind} grammar" if grammar.field is None else grammar.field


def _told(problem: str) -> str:
    """llguidance's words without its excerpt of the source: the client knows it, and not what was wrapped around it."""
    return _shortened(_PLACE_OF_SCHEMA.sub("", _EXCERPT.split(problem, maxsplit=1)[0]))


def _shortened(message: str) -> str:
    text = " ".join(message.replace("<non-verbose/>", "").split())
    return text if len(text) <= MESSAGE_CHARACTERS else text[:MESSAGE_CHARACTERS] + "…"
