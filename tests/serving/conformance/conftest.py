"""Running servers for real clients: a tiny chat model with noise for weights, an embedding model and a reranker."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from appliance.cli import main
from tests import tiny_gguf
from tests.serving.conformance.served import CHAT, PER_MINUTE, RERANKER, VECTORS, Served
from tests.serving.fakes import TEMPLATE
from tests.serving.serving_process import running_server

# Knows tools but no thinking, which a model of noise would never end.
TOOLS_TEMPLATE = TEMPLATE.partition("{%- if enable_thinking")[0] + "{% endif %}"
CONTEXT = ("--context-tokens", "1000")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models; also where the servers keep what they keep."""
    folder = tmp_path_factory.mktemp("models")
    tiny_gguf.write(folder / f"{CHAT}.gguf", template=TOOLS_TEMPLATE)
    tiny_gguf.write_embedding(folder / f"{VECTORS}.gguf")
    tiny_gguf.write_reranker(folder / f"{RERANKER}.gguf")
    return folder


@pytest.fixture(scope="session")
def served(folder: Path) -> Iterator[Served]:
    also = [argument for name in (VECTORS, RERANKER) for argument in ("--also", folder / f"{name}.gguf")]
    with running_server(folder / f"{CHAT}.gguf", *CONTEXT, *also, root=folder) as server:
        yield Served(server.url)


@pytest.fixture(scope="session")
def busy(folder: Path) -> Iterator[Served]:
    """A server that is busy with one request."""
    one = ("--slots", "1", "--queue-requests", "0")
    with running_server(folder / f"{CHAT}.gguf", *CONTEXT, *one, root=folder) as server:
        yield Served(server.url)


@pytest.fixture(scope="session")
def keyed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with a key for each of two scopes, and a limit on how often one may ask."""
    store = tmp_path_factory.mktemp("store")
    secret = tmp_path_factory.mktemp("secret") / "store.key"
    environ = {"APPLIANCE_STORE": str(store / "store.sqlite3"), "APPLIANCE_KEY_FILE": str(secret)}
    keys = {}
    for scope in ("chat", "metrics"):
        result = CliRunner().invoke(main, ["keys", "create", "--label", scope, "--scope", scope], env=environ)
        assert result.exit_code == 0, result.output
        keys[scope] = result.stdout.strip()
    environ["APPLIANCE_SERVE_REQUESTS_PER_MINUTE"] = str(PER_MINUTE)
    with running_server(folder / f"{CHAT}.gguf", *CONTEXT, root=folder, environ=environ) as server:
        yield Served(server.url, keys)
