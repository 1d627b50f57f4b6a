"""Settings from TOML, the environment and flags; every mistake is reported, none is swallowed."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance import config
from appliance.config import setting


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    rate: float = setting(0.5, minimum=0.0, maximum=1.0)
    steps: int = setting(3, minimum=1)
    is_on: bool = setting(False)
    kind: Literal["a", "b"] = setting("a")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    name: str
    folder: Path | None = setting(None)
    words: tuple[str, ...] = setting(("x",))
    inner: Inner = Inner()


def built(table: dict[str, Any]) -> tuple[Outer | None, list[str]]:
    problems: list[str] = []
    return config.build(Outer, table, "", problems), problems


def test_defaults_and_conversions() -> None:
    outer, problems = built({"name": "n", "folder": "f", "words": ["p", "q"], "inner": {"rate": 1}})
    assert problems == []
    assert outer == Outer(name="n", folder=Path("f"), words=("p", "q"), inner=Inner(rate=1.0))
    assert isinstance(outer.inner.rate, float)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"nam": "n"}, "nam: unknown key; did you mean 'name'?"),
        ({"name": "n", "zzzz": 1}, "zzzz: unknown key; known keys: folder, inner, name, words."),
        ({}, "name: missing"),
        ({"name": 3}, "name: expected str, found 3"),
        ({"name": " "}, "name: must not be empty"),
        ({"name": "n", "inner": 3}, "inner: expected a table, found 3"),
        ({"name": "n", "words": "x"}, "words: expected a list, found 'x'"),
        ({"name": "n", "words": [1]}, "words[0]: expected str, found 1"),
        ({"name": "n", "inner": {"stps": 1}}, "inner.stps: unknown key; did you mean 'steps'?"),
        ({"name": "n", "inner": {"rate": 1.5}}, "inner.rate: 1.5 is out of range; it must be from 0.0 to 1.0"),
        ({"name": "n", "inner": {"rate": float("nan")}}, "inner.rate: nan is not a finite number"),
        ({"name": "n", "inner": {"steps": 0}}, "inner.steps: 0 is out of range; it must be at least 1"),
        ({"name": "n", "inner": {"steps": True}}, "inner.steps: expected int, found True"),
        ({"name": "n", "inner": {"steps": 1.5}}, "inner.steps: expected int, found 1.5"),
        ({"name": "n", "inner": {"is_on": 1}}, "inner.is_on: expected bool, found 1"),
        ({"name": "n", "inner": {"kind": "c"}}, "inner.kind: 'c' is not one of 'a', 'b'"),
    ],
)
def test_mistake_is_named(table: dict[str, Any], said: str) -> None:
    outer, problems = built(table)
    assert outer is None
    assert any(problem.startswith(said) for problem in problems), problems


def test_all_mistakes_at_once() -> None:
    _, problems = built({"nam": 1, "words": 2, "inner": {"rate": -1, "steps": "x", "kinds": 1}})
    assert len(problems) == 6, problems


def test_set_values() -> None:
    problems: list[str] = []
    assert config.parse_set("a.b=3", problems) == {"a": {"b": 3}}
    assert config.parse_set("a=[1, 2]", problems) == {"a": [1, 2]}
    assert config.parse_set("a=some/path.jsonl", problems) == {"a": "some/path.jsonl"}
    assert config.parse_set('a="3"', problems) == {"a": "3"}
    assert config.parse_set("a=x=y", problems) == {"a": "x=y"}
    assert problems == []
    config.parse_set("nothing", problems)
    config.parse_set("=3", problems)
    assert len(problems) == 2


def test_environment() -> None:
    environ = {"APPLIANCE_NAME": "n", "APPLIANCE_INNER_STEPS": "7", "APPLIANCE_INNER_NONE": "1", "APPLIANCE_ARTIFACTS": "a"}
    assert config.environment_table(Outer, environ) == {"name": "n", "inner": {"steps": 7}}


TABLES = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8
).filter(lambda value: isinstance(value, dict))


def leaves(table: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    found: dict[tuple[str, ...], Any] = {}
    for key, value in table.items():
        found |= leaves(value, (*path, key)) if isinstance(value, dict) and value else {(*path, key): value}
    return found


@given(TABLES, TABLES)
def test_later_table_wins_and_nothing_else_is_lost(first: dict[str, Any], second: dict[str, Any]) -> None:
    merged = leaves(config.merge_tables(first, second))
    for path, value in leaves(second).items():
        if value != {}:
            assert merged[path] == value
    overridden = set(leaves(second))
    for path, value in leaves(first).items():
        parts = [path[:length] for length in range(1, len(path) + 1)]
        if not any(part in overridden for part in parts) and not any(each[: len(path)] == path for each in overridden):
            assert merged[path] == value


@given(
    st.builds(
        Outer,
        name=st.text(min_size=1).filter(str.strip),
        folder=st.none() | st.just(Path("a/b")),
        words=st.lists(st.text(min_size=1).filter(str.strip)).map(tuple),
        inner=st.builds(
            Inner,
            rate=st.floats(0, 1),
            steps=st.integers(1, 10**9),
            is_on=st.booleans(),
            kind=st.sampled_from(["a", "b"]),
        ),
    )
)
def test_plain_form_builds_the_same(outer: Outer) -> None:
    assert built(config.plain(outer)) == (outer, [])


def test_toml_and_set_agree() -> None:
    table = tomllib.loads("[inner]\nrate = 0.25\nis_on = true\n")
    problems: list[str] = []
    by_flags = config.merge_tables(*(config.parse_set(each, problems) for each in ("inner.rate=0.25", "inner.is_on=true")))
    assert by_flags == table


def test_artifacts_and_cache_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APPLIANCE_ARTIFACTS")
    assert config.artifacts_root() == Path("artifacts")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("APPLIANCE_CACHE", raising=False)
    assert config.cache_root() == Path("/somewhere/edge-appliance")
