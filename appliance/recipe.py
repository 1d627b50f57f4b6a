"""A recipe declares one assistant: base model, data, training phases, quantization, serving.

Every default stands once: here, and for training in `training_settings.py`. Paths in a recipe are relative to the recipe's
folder, paths in `--set` to the current one.
"""

import dataclasses
import json
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from appliance import config
from appliance.config import setting
from appliance.errors import RecipeError, several
from appliance.training_settings import ORDER, PREFERENCES, Dpo, Grpo, Kto, Lora, Memory, Orpo, Passages, Sft

STARTER = "starter"
Quantization = Literal[
    "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "IQ4_NL", "Q4_0", "IQ4_XS",
    "Q3_K_L", "Q3_K_M", "IQ3_M", "IQ3_S", "Q3_K_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "IQ2_M", "Q2_K_S", "IQ2_S", "IQ2_XS",
    "IQ2_XXS", "IQ1_M", "IQ1_S",
]  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PairColumns:
    """Each a column's name, or a text with columns in braces: `"{query}. {keyphrase}"`. So in the next two."""

    prompt: str = setting("prompt")
    completion: str = setting("completion")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TripletColumns:
    prompt: str = setting("prompt")
    chosen: str = setting("chosen")
    rejected: str = setting("rejected")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JudgedColumns:
    prompt: str = setting("prompt")
    completion: str = setting("completion")
    label: str = setting("label", about="whether the answer is wanted")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceColumns:
    prompt: str = setting("prompt")
    reference: str = setting("reference", about="rewards are also given all other columns")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns of a file are what, where their names do not say it."""

    sft: PairColumns | None = setting(None)
    heldout: PairColumns | None = setting(None)
    dpo: TripletColumns | None = setting(None)
    kto: JudgedColumns | None = setting(None)
    grpo: ReferenceColumns | None = setting(None)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """JSON lines, JSON lists or CSV; docs/data.md has the shapes of rows."""

    sft: Path = setting(about="conversations")
    dpo: Path | None = setting(None, about="preference triplets: prompt, chosen and rejected answer")
    kto: Path | None = setting(None, about="single answers that are wanted or not, for KTO in place of triplets")
    grpo: Path | None = setting(None, about="prompts with a reference that rewards compare answers with")
    heldout: Path | None = setting(None, about="conversations that are not trained on, to measure on")
    faq: Path | None = setting(None, about="questions and answers")
    columns: Columns = Columns()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Starter:
    """The base model made on the spot: a Qwen3 decoder small enough for two cores."""

    vocabulary_tokens: int = setting(4096, minimum=512, maximum=65536)
    layers: int = setting(6, minimum=1, maximum=64)
    hidden: int = setting(256, minimum=32, maximum=4096)
    feed_forward: int = setting(768, minimum=32, maximum=16384)
    heads: int = setting(4, minimum=1, maximum=64)
    kv_heads: int = setting(2, minimum=1, maximum=64)
    head_width: int = setting(64, minimum=8, maximum=256)
    context_tokens: int = setting(1024, minimum=64, maximum=32768)
    row_tokens: int = setting(512, minimum=16, maximum=32768, about="longer texts are cut into rows of this length")
    epochs: int = setting(16, minimum=1)
    batch_rows: int = setting(4, minimum=1)
    learning_rate: float = setting(4e-3, minimum=0.0, about="AdamW, for embeddings and norms")
    matrix_learning_rate: float = setting(0.05, minimum=0.0, about="Muon, for the matrices of the layers")
    checkpoint_steps: int = setting(100, minimum=1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Quantize:
    types: tuple[Quantization, ...] = setting(("Q8_0", "Q4_K_M"))
    serve: Quantization = setting("Q4_K_M", about="the file that is promoted")
    imatrix_tokens: int = setting(
        8192, minimum=0, about="of the training text, to find which weights matter (importance matrix); 0: all matter alike"
    )
    spend_mib: int = setting(
        0, minimum=0, about="that each file may grow by, for better types of the tensors that lose most; 0: none"
    )
    compare: bool = setting(False, about="also make each file without either, to measure what they are worth")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verify:
    prompts: int = setting(8, minimum=1, about="prompts followed along the merged model's greedy answer")
    answer_tokens: int = setting(48, minimum=1)
    logit_gap: float = setting(
        0.01, minimum=0.0, maximum=1.0, about="steps with a smaller top-2 gap are ties and not judged"
    )
    kl_limit: float = setting(
        0.1, minimum=0.0, about="nats that the served file may differ from 16 bits in any language, on average"
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine that will serve."""

    memory_mib: int = setting(0, minimum=0, about="its memory; 0: it is the one that converts")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    host: str = setting("127.0.0.1")
    port: int = setting(8080, minimum=0, maximum=65535, about="0 takes any free port")
    context_tokens: int = setting(2048, minimum=64, about="per request: prompt and answer together")
    slots: int = setting(2, minimum=1, maximum=64, about="requests answered at the same time")
    queue_requests: int = setting(16, minimum=0, about="requests that may wait; one more is told to come back")
    queue_tokens: int = setting(65536, minimum=1, about="prompt tokens that may wait, all requests together")
    max_tokens: int = setting(512, minimum=1, about="answer length when the request names none")
    deadline_seconds: float = setting(600.0, minimum=1.0, about="for a whole request; a client may ask for less")
    grace_seconds: float = setting(30.0, minimum=0.0, about="for answers still running at shutdown")
    stream_seconds: float = setting(
        0.05, minimum=0.0, maximum=1.0, about="text of an answer leaves at most this often; 0: each token by itself"
    )
    watchdog_seconds: float = setting(120.0, minimum=5.0, about="an engine that computes one step longer is restarted")
    threads: int = setting(0, minimum=0, maximum=1024, about="for decoding; 0 takes the usable physical cores")
    prefill_threads: int = setting(0, minimum=0, maximum=1024, about="for reading prompts; 0 takes all usable cores")
    cache_tokens: int = setting(4096, minimum=0, about="tokens kept in memory after their request has ended")
    snapshot_mib: int = setting(512, minimum=0, about="disk for prefixes that outlive a restart; 0 keeps none")
    system_prompts: tuple[str, ...] = setting((), about="read at start, so that the first visitor need not wait for it")
    documents: Literal["auto", "exact", "stitched"] = setting(
        "auto",
        about="stitched: each is read once, by itself, and then moved; auto: exact, until that is proven for the model",
    )
    document_reread_tokens: int = setting(
        0, minimum=0, maximum=1024, about="of each document that was read by itself, read again where it stands"
    )
    document_tolerance: float = setting(
        0.1, minimum=0.0, maximum=1.0, about="of the range of all scores: documents so near may change places"
    )
    kv_type: Literal["auto", "f16", "q8_0"] = setting("auto", about="auto: f16, and q8_0 when memory is short")
    mmap: Literal["auto", "on", "off"] = setting("auto", about="whether weights stay in the file's page cache")
    repack: Literal["auto", "on", "off"] = setting("auto", about="copy weights into the layout that computes fastest")
    gpu_layers: int = setting(-1, minimum=-1, about="-1 takes as many as fit into free GPU memory")
    speculation: Literal["auto", "off"] = setting("auto", about="guess tokens from the prompt, while it pays")
    models: tuple[str, ...] = setting((), about="more models to serve, loaded on demand: files or artifacts")
    adapters: tuple[str, ...] = setting((), about="LoRA adapters of the main model: name=file.gguf")
    idle_seconds: float = setting(300.0, minimum=0.0, about="a model beside the main one is unloaded after it; 0 never")
    memory_mib: int = setting(0, minimum=0, about="for all models together; 0 takes what is free")
    allowed_hosts: tuple[str, ...] = setting((), about="names by which clients reach this server, beside its addresses")
    requests_per_minute: int = setting(0, minimum=0, about="per key; 0 sets no limit")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    name: str
    data: Data
    base: str = setting(STARTER, about="'starter', a Hugging Face id that was pulled, or a local folder")
    languages: tuple[str, ...] = setting(("en",), about="ISO 639-1 codes of the answers")
    seed: int = setting(3407, minimum=0, maximum=2**32 - 1)
    phases: tuple[Literal["sft", "dpo", "kto", "orpo", "grpo", "passages"], ...] = setting(("sft", "dpo"))
    starter: Starter = Starter()
    memory: Memory = Memory()
    lora: Lora = Lora()
    sft: Sft = Sft()
    dpo: Dpo = Dpo()
    kto: Kto = Kto()
    orpo: Orpo = Orpo()
    grpo: Grpo = Grpo()
    passages: Passages = Passages()
    quantize: Quantize = Quantize()
    verify: Verify = Verify()
    machine: Machine = Machine()
    serve: Serve = Serve()

    @property
    def preference_phase(self) -> str | None:
        """Which of DPO, KTO and ORPO this recipe has."""
        return next((phase for phase in self.phases if phase in PREFERENCES), None)

    @property
    def triplets(self) -> Path | None:
        """The file of preference triplets, where a phase learns from it."""
        has_own = self.preference_phase == "kto" and self.data.kto is not None
        return None if has_own or self.preference_phase is None else self.data.dpo


def load(path: Path, sets: Sequence[str] = ()) -> Recipe:
    """Reads a recipe; raises `RecipeError` listing every mistake.

    A table `[with_starter.<section>]` applies only while `base` is "starter", whose few parameters want other settings.
    """
    table = _read(path)
    problems: list[str] = []
    flags = config.merge_tables(*(_absolute(config.parse_set(each, problems), Path.cwd()) for each in sets))
    overrides = config.merge_tables(config.environment_table(Recipe), flags)
    with_starter = table.pop("with_starter", {})
    if not isinstance(with_starter, dict):
        raise RecipeError(f"{path}: with_starter: expected a table, found {with_starter!r}.")
    if overrides.get("base", table.get("base", STARTER)) == STARTER:
        table = config.merge_tables(table, with_starter)
    return _build(config.merge_tables(_absolute(table, path.parent), overrides), problems, str(path))


def from_resolved(table: Mapping[str, Any], sets: Sequence[str], where: str) -> Recipe:
    """A recipe from all its resolved values, as a lock file has them; the environment has no say. Raises as `load` does."""
    problems: list[str] = []
    flags = config.merge_tables(*(_absolute(config.parse_set(each, problems), Path.cwd()) for each in sets))
    return _build(config.merge_tables(table, flags), problems, where)


def build_serve(settings: Mapping[str, Any], where: str) -> Serve:
    """Serving settings that come from elsewhere than a recipe; raises `RecipeError` with every mistake."""
    problems: list[str] = []
    serve = config.build(Serve, settings, "serve", problems)
    if problems or serve is None:
        raise RecipeError(several(problems, where))
    return serve


def parse_serve(text: str, where: str) -> dict[str, Any]:
    """Serving settings as a command is given them, a JSON object; raises `RecipeError` as `build_serve` does."""
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise RecipeError(f"{where} is not valid JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise RecipeError(f"{where}: expected a JSON object, found {text!r}.")
    build_serve(settings, where)
    return settings


def _build(table: Mapping[str, Any], problems: list[str], where: str) -> Recipe:
    recipe = config.build(Recipe, table, "", problems)
    if recipe is not None:
        problems += _contradictions(recipe)
    if problems or recipe is None:
        raise RecipeError(several(problems, where))
    return recipe


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path} does not exist; start from a copy of recipes/shelter.") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder; name the recipe file, for example {path / 'recipe.toml'}.") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}.") from error


def _absolute(table: Mapping[str, Any], folder: Path, kind: type = Recipe) -> dict[str, Any]:
    """The table with every path in it made absolute; the settings of `kind` say which values are paths."""
    hints = typing.get_type_hints(kind)
    return {key: _absolute_value(hints.get(key), value, folder) for key, value in table.items()}


def _absolute_value(hint: Any, value: Any, folder: Path) -> Any:
    kinds = [each for each in (hint, *typing.get_args(hint)) if isinstance(each, type)]
    if isinstance(value, str) and Path in kinds:
        return str((folder / value).resolve())
    section = next((each for each in kinds if dataclasses.is_dataclass(each)), None)
    if section is not None and isinstance(value, Mapping):
        return _absolute(value, folder, section)
    if section is not None and isinstance(value, list):
        return [_absolute(each, folder, section) if isinstance(each, Mapping) else each for each in value]
    return value


def _contradictions(recipe: Recipe) -> list[str]:
    problems = []
    if not recipe.languages:
        problems.append('languages: must name at least one, for example ["en"].')
    if not recipe.lora.targets:
        problems.append('lora.targets: must name at least one, for example ["q_proj", "v_proj"], or "all-linear".')
    if len(set(recipe.phases)) < len(recipe.phases):
        problems.append(f"phases: {', '.join(recipe.phases)} names a phase twice.")
    if recipe.quantize.serve not in (*recipe.quantize.types, "F16"):
        made = ", ".join(recipe.quantize.types)
        problems.append(f"quantize.serve: {recipe.quantize.serve!r} is not made; quantize.types has {made}.")
    if not recipe.phases or recipe.phases[0] != "sft":
        problems.append("phases: the first phase must be 'sft'; the others continue its adapter.")
    for field in dataclasses.fields(Columns):
        if getattr(recipe.data.columns, field.name) is not None and getattr(recipe.data, field.name) is None:
            problems.append(f"data.columns.{field.name}: there is no data.{field.name} whose columns it could name.")
    problems += _preference_contradictions(recipe)
    problems += _grpo_contradictions(recipe) if "grpo" in recipe.phases else []
    order = tuple(phase for phase in ORDER if phase in recipe.phases)
    if set(order) == set(recipe.phases) and recipe.phases != order and recipe.phases[0] == "sft":
        problems.append(f"phases: they run in the order {', '.join(order)}, each continuing the adapter of the one before.")
    if recipe.starter.heads % recipe.starter.kv_heads:
        problems.append(f"starter.kv_heads: {recipe.starter.kv_heads} does not divide starter.heads {recipe.starter.heads}.")
    if recipe.starter.head_width % 2:
        problems.append(f"starter.head_width: {recipe.starter.head_width} must be even (rotary embeddings turn pairs).")
    if not recipe.name.replace("-", "").replace("_", "").isalnum() or not recipe.name.isascii():
        problems.append(f"name: {recipe.name!r} may have only ASCII letters, digits, '-' and '_'; it names files.")
    if recipe.base == STARTER:
        for phase in recipe.phases:
            tokens = getattr(recipe, phase).max_tokens
            if tokens > recipe.starter.context_tokens:
                limit = recipe.starter.context_tokens
                problems.append(f"{phase}.max_tokens: {tokens} exceeds starter.context_tokens {limit}.")
    return problems


def _preference_contradictions(recipe: Recipe) -> list[str]:
    found = [phase for phase in recipe.phases if phase in PREFERENCES]
    if len(found) > 1:
        return [f"phases: {' and '.join(found)} learn the same in different ways; name one of them."]
    problems = []
    if found and recipe.triplets is None and not (found == ["kto"] and recipe.data.kto is not None):
        or_kto = ", or data.kto" if found == ["kto"] else ""
        problems.append(f'data.dpo: missing{or_kto}, and phases names {found[0]!r}; give a file, or set phases = ["sft"].')
    if found == ["kto"] and recipe.data.kto is not None and recipe.data.dpo is not None:
        problems.append("data.kto: KTO learns from this file or from the triplets of data.dpo; give one of them.")
    return problems


def _grpo_contradictions(recipe: Recipe) -> list[str]:
    grpo, rewards = recipe.grpo, recipe.grpo.rewards
    problems = []
    if recipe.data.grpo is None:
        problems.append("data.grpo: missing, and phases names 'grpo'; give a file of prompts with references.")
    if not any(each.weight > 0 for each in rewards.named().values()):
        problems.append("grpo.rewards: names none with a weight; add a table such as [grpo.rewards.tfidf_similarity].")
    if (grpo.batch_rows * grpo.accumulate) % grpo.answers:
        step = f"a step of grpo.batch_rows = {grpo.batch_rows} times grpo.accumulate = {grpo.accumulate}"
        problems.append(f"grpo.answers: {step} answers holds no whole groups of {grpo.answers}.")
    names = [each.function.name for each in rewards.own]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        problems.append(
            f"grpo.rewards.own: names {', '.join(twice)} twice, also if in two folders; give a function once, with the sum"
            " of the weights, or give each a name of its own."
        )
    if grpo.answer_tokens >= grpo.max_tokens:
        problems.append(f"grpo.answer_tokens: {grpo.answer_tokens} leaves no room for a prompt in grpo.max_tokens.")
    if rewards.length is not None and rewards.length.least_words > rewards.length.most_words:
        least, most = rewards.length.least_words, rewards.length.most_words
        problems.append(f"grpo.rewards.length.least_words: {least} exceeds most_words = {most}.")
    return problems
