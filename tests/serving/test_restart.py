"""What outlives a server that was killed: prefixes on disk, and only for the model that they were made with."""

import signal
from pathlib import Path

from tests import tiny_gguf
from tests.serving.serving_process import RunningServer, running_server, until

SYSTEM = "You are the assistant of a night shelter. You know its rules, its opening times and its neighbours. " * 3
ENVIRON = {"APPLIANCE_SERVE_SYSTEM_PROMPTS": f'["{SYSTEM.strip()}"]'}


def ask(server: RunningServer) -> tuple[str, int]:
    """The answer, and how many prompt tokens were not read for it."""
    messages = [{"role": "system", "content": SYSTEM.strip()}, {"role": "user", "content": "When do you open?"}]
    body = server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 24}).json()
    return body["choices"][0]["message"]["content"], body["usage"]["prompt_tokens_details"]["cached_tokens"]


def files(root: Path) -> list[Path]:
    return sorted((root / "snapshots").glob("*.prefix"))


def served_and_killed(model: Path, root: Path) -> str:
    """The answer of a server that is killed as soon as its prefix is on disk."""
    with running_server(model, root=root, environ=ENVIRON) as server:
        text, _ = ask(server)
        until(lambda: files(root))
        server.stop(signal.SIGKILL)
    return text


def test_a_prefix_is_loaded_and_not_read_after_a_kill(tmp_path: Path, root: Path) -> None:
    root.mkdir()
    model = tiny_gguf.write(tmp_path / "tiny.gguf")
    text = served_and_killed(model, root)
    with running_server(model, root=root, environ=ENVIRON) as server:
        again, cached = ask(server)
        read = server.metric("appliance_prompt_tokens_total", source="computed")
        assert again == text
        assert cached > len(SYSTEM.split())
        assert read < cached  # the question; the system prompt came from the file
        assert server.stop() == 0


def test_prefixes_are_kept_in_the_cache_where_artifacts_are_only_read(tmp_path: Path, root: Path) -> None:
    root.mkdir()
    (root / "snapshots").write_text("")  # in the way as a read-only disk would be, for root too
    model, cache = tiny_gguf.write(tmp_path / "tiny.gguf"), tmp_path / "cache"
    environ = {**ENVIRON, "APPLIANCE_CACHE": str(cache)}
    for number in range(2):
        with running_server(model, root=root, environ=environ) as server:
            assert ask(server)[1] > 0
            until(lambda: files(cache))
            read = server.metric("appliance_prompt_tokens_total", source="computed")
            assert (read < len(SYSTEM.split())) == bool(number)  # the second has it from the file
            assert server.stop() == 0
            assert any(f"prefixes are kept in {cache}" in line for line in server.errors)
    cache.joinpath("more").write_text("")
    with running_server(model, root=root, environ={**ENVIRON, "APPLIANCE_CACHE": str(cache / "more")}) as server:
        assert server.stop() == 0
        assert any("no prefixes are kept on disk" in line for line in server.errors)


def test_a_damaged_prefix_is_read_again(tmp_path: Path, root: Path) -> None:
    root.mkdir()
    model = tiny_gguf.write(tmp_path / "tiny.gguf")
    text = served_and_killed(model, root)
    (damaged,) = files(root)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with running_server(model, root=root, environ=ENVIRON) as server:
        assert ask(server)[0] == text
        until(lambda: files(root) and damaged not in files(root))
        assert server.stop() == 0
        assert any("checksum" in line for line in server.errors)


def test_another_model_of_the_same_name_never_sees_them(tmp_path: Path, root: Path) -> None:
    root.mkdir()
    model = tiny_gguf.write(tmp_path / "tiny.gguf")
    old = served_and_killed(model, root)
    tiny_gguf.write(model, seed=8)
    with running_server(model, root=root, environ=ENVIRON) as server:
        new, _ = ask(server)
    with running_server(model, root=tmp_path / "fresh") as server:
        assert ask(server)[0] == new
    assert new != old
