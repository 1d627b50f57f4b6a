"""`appliance chat`: talk to a running server, from a terminal or in a pipe."""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from appliance.console import Command, note
from appliance.errors import ServerError
from appliance.recipe import Serve

if TYPE_CHECKING:
    import httpx

DEFAULT_URL = f"http://{Serve().host}:{Serve().port}"
CONNECT_SECONDS = 5.0
KEY_VARIABLE = "APPLIANCE_API_KEY"


@click.command(cls=Command)
@click.argument("message", required=False)
@click.option("--url", default=DEFAULT_URL, show_default=True, help="The server.")
@click.option("--system", metavar="TEXT", help="What the assistant is told first.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer; by default the server's.")
@click.option("--key", envvar=KEY_VARIABLE, help=f"API key, for a server that wants one; better in {KEY_VARIABLE}.")
def chat(message: str | None, url: str, system: str | None, max_tokens: int | None, key: str | None) -> None:
    """Talk to the assistant that `appliance serve` runs.

    With MESSAGE: one answer. On a terminal: a conversation; /new starts over, /exit leaves. In a pipe: one turn a line. The
    key that a server on this machine made at its first start is found: in APPLIANCE_MAKE_KEYS, else in `keys` beside the
    artifacts, where `make serve` leaves it.
    """
    if key is None and url == DEFAULT_URL:
        from appliance import first_keys

        key = first_keys.for_asking()
    with Conversation(url, system, max_tokens, key) as conversation:
        if message is not None:
            _print_answer(conversation, message)
        elif sys.stdin.isatty():
            _talk(conversation)
        else:
            for line in map(str.strip, sys.stdin):
                if line == "/exit":
                    break
                if line == "/new":
                    conversation.start_over()
                elif line:
                    _print_answer(conversation, line)


class Conversation(contextlib.AbstractContextManager["Conversation"]):
    """Messages so far, and the connection. Raises `ServerError` when the server is away or refuses."""

    def __init__(self, url: str, system: str | None, max_tokens: int | None, key: str | None) -> None:
        import httpx

        self._url = url
        # No proxy: the server is in the building. An answer may take as long as it takes.
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with self._translated():
            self._client = httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False)
        self._opening = [{"role": "system", "content": system}] if system else []
        self._limit = {"max_tokens": max_tokens} if max_tokens else {}
        self._model: str | None = None
        self.start_over()

    def start_over(self) -> None:
        self._messages = list(self._opening)

    def ask(self, text: str) -> Iterator[str]:
        """Streams the answer. A turn that fails or is broken off is not remembered."""
        from appliance.serving import sse

        text = text.encode(errors="replace").decode()  # a terminal may pass bytes that are no text
        model = self._model = self._model or self._served_model()
        messages = [*self._messages, {"role": "user", "content": text}]
        body = {"model": model, "messages": messages, "stream": True, **self._limit}
        pieces: list[str] = []
        with self._translated(), self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            self._require_ok(response)
            for chunk in sse.decode(response.iter_lines()):
                if "error" in chunk:
                    raise ServerError(str(chunk["error"]["message"]))
                if piece := chunk["choices"][0]["delta"].get("content"):
                    pieces.append(piece)
                    yield piece
        self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def _served_model(self) -> str:
        with self._translated():
            response = self._client.get("/v1/models")
            self._require_ok(response)
            return str(response.json()["data"][0]["id"])

    def _require_ok(self, response: "httpx.Response") -> None:
        if response.is_success:
            return
        response.read()
        try:
            said = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            said = f"no assistant answers there (HTTP {response.status_code})"
        raise ServerError(f"{self._url}: {said}")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise ServerError(f"No server answers on {self._url}; start it with `appliance serve`.") from None
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise ServerError(f"--url {self._url!r} is no address of a server: {error}.") from error
        except httpx.TransportError as error:
            raise ServerError(f"{self._url} broke off the answer; ask again. ({error})") from error


def _talk(conversation: Conversation) -> None:
    import readline  # noqa: F401 - gives `input` line editing and history

    note("/new starts over, /exit leaves; Ctrl-C breaks off an answer")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return
        if line == "/exit":
            return
        if line == "/new":
            conversation.start_over()
        elif line:
            try:
                _print_answer(conversation, line)
            except KeyboardInterrupt:
                click.echo()
            except ServerError as error:  # the conversation can go on, shorter or later
                note(f"error: {error}")


def _print_answer(conversation: Conversation, text: str) -> None:
    for piece in conversation.ask(text):
        click.echo(piece, nl=False)
    click.echo()
