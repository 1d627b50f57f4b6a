"""A function of the user's, named `module:function` in the recipe and called with the arguments that TRL gives a reward.

These are `prompts` and `completions` (lists of messages), `reference` and every column of the rows by its name, each a list
with one entry for each answer.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from appliance import artifacts
from appliance.errors import RecipeError
from appliance.reward_settings import OwnReward
from appliance.training.rewards.reward import Answer, Prompt, Score


def make(settings: OwnReward, prompts: Sequence[Prompt], languages: Sequence[str]) -> Score:  # noqa: ARG001
    """Raises `RecipeError` where there is no such function."""
    function = _load(settings.function)
    names = sorted({name for prompt in prompts for name in prompt.columns})

    def score(answers: Sequence[Answer]) -> Any:
        columns = {name: [answer.prompt.columns.get(name) for answer in answers] for name in names}
        return function(
            prompts=[list(answer.prompt.messages) for answer in answers],
            completions=[[{"role": "assistant", "content": answer.text}] for answer in answers],
            **{**columns, "reference": [answer.prompt.reference for answer in answers]},
        )

    return score


def identity(function: Path) -> str:
    """The function's name, and a digest of its file where it lies beside the recipe: another text is another reward."""
    file = _file(function)
    return f"{function.name}@{artifacts.digest_file(file)[:12]}" if file.is_file() else function.name


def _file(function: Path) -> Path:
    return function.with_name(f"{function.name.partition(':')[0]}.py")


def _load(path: Path) -> Callable[..., Any]:
    module_name, separator, name = path.name.partition(":")
    if not separator or not name:
        raise RecipeError(f"grpo.rewards.own: {path.name!r} names no function; write it as module:function.")
    file = _file(path)
    module = _from_file(file) if file.is_file() else _installed(module_name, file)
    if not callable(found := getattr(module, name, None)):
        raise RecipeError(f"grpo.rewards.own: {module_name} has no function {name!r}.")
    function: Callable[..., Any] = found
    return function


def _from_file(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"own_rewards_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as an import does, for dataclasses and the like
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise RecipeError(f"grpo.rewards.own: {file} cannot be imported: {error}.") from error
    return module


def _installed(name: str, file: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RecipeError(f"grpo.rewards.own: there is no {file}, and {name!r} cannot be imported ({error}).") from error
