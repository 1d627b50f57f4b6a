"""`appliance serve`: models behind OpenAI's HTTP API, the promoted one first."""

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance import config, logs
from appliance.console import Command, note
from appliance.errors import RecipeError, several
from appliance.recipe import Recipe, Serve

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from socket import socket

    from fastapi import FastAPI

    from appliance.serving.auth import Gate
    from appliance.serving.engine import EngineListener
    from appliance.serving.memory_plan import Plan
    from appliance.serving.model_pool import ModelPool
    from appliance.serving.planning import Planner
    from appliance.serving.served_model import ServedModel
    from appliance.serving.worker_process import Workers

DEFAULTS = Serve()


@click.command(cls=Command)
@click.option("--model", metavar="PATH|NAME", help="A .gguf file or an artifact; by default the promoted model.")
@click.option("--also", "models", multiple=True, metavar="PATH|NAME", help="Another model, loaded while it is wanted.")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=FILE", help="A LoRA adapter, asked for as model:NAME.")
@click.option("--host", help=f"Address to listen on [default: {DEFAULTS.host}].")
@click.option("--port", type=int, help=f"0 takes any free port [default: {DEFAULTS.port}].")
@click.option(
    "--context-tokens", type=int, help=f"Per request, prompt and answer together [default: {DEFAULTS.context_tokens}]."
)
@click.option("--slots", type=int, help=f"Requests answered at the same time [default: {DEFAULTS.slots}].")
@click.option("--queue-requests", type=int, help=f"Requests that may wait [default: {DEFAULTS.queue_requests}].")
@click.option("--threads", type=int, help="For answers; 0 takes the usable physical cores [default: 0].")
@click.option("--kv-type", help="f16 or q8_0 for the memory of prompts [default: q8_0 when memory is short].")
@click.option("--gpu-layers", type=int, help="-1 takes as many as fit into free GPU memory [default: -1].")
@click.option("--memory-mib", type=int, help="For all models together; 0 takes what is free [default: 0].")
@click.option(
    "--document-folder",
    type=click.Path(path_type=Path),
    help="A folder of documents to be read before anybody asks; see `serve.documents`.",
)
@click.option(
    "--tuned",
    type=click.Path(path_type=Path),
    help="What `appliance bench serve --tune` found, if it does not lie beside the model.",
)
@click.option("--verify", is_flag=True, help="Read every model file again to check its sha256.")
@click.option(
    "--log-format", type=click.Choice(logs.FORMATS), default="text", envvar="APPLIANCE_LOG_FORMAT", show_default=True
)
@click.option(
    "--log-level", type=click.Choice(logs.LEVELS), default="warning", envvar="APPLIANCE_LOG_LEVEL", show_default=True
)
@click.option("--traces", metavar="URL", envvar="APPLIANCE_TRACES", help="Send OpenTelemetry traces there (OTLP over HTTP).")
@click.option(
    "--first-model",
    type=click.Path(path_type=Path),
    envvar="APPLIANCE_FIRST_MODEL",
    help="An exported model, to be imported and promoted where none is.",
)
@click.option(
    "--make-keys",
    type=click.Path(path_type=Path),
    envvar="APPLIANCE_MAKE_KEYS",
    help="Where to leave the first keys, if there are none yet: chat.key and metrics.key.",
)
@click.option("--insecure-no-key", is_flag=True, help="Nobody needs a key, on other machines neither.")
def serve(
    model: str | None,
    tuned: Path | None,
    verify: bool,
    log_format: logs.Format,
    log_level: logs.Level,
    traces: str | None,
    first_model: Path | None,
    make_keys: Path | None,
    insecure_no_key: bool,
    **flags: Any,
) -> None:
    """Answer chats over HTTP with the promoted model.

    Settings come from the flags, else APPLIANCE_SERVE_*, else the model's recipe, else what `appliance bench serve --tune`
    found, else the defaults shown.
    """
    config.apply_quiet_environment()
    logs.configure(log_format, log_level)
    import asyncio

    from appliance.serving.worker_process import Workers

    with contextlib.closing(Workers()) as workers:
        workers.prepare()  # before this process imports what it needs itself
        from appliance.serving import auth, listening

        given = {name: value for name, value in flags.items() if value not in (None, ())}
        if first_model is not None and model is None:
            _import_first_model(first_model)
        catalog = _Catalog(model, given, verify, tuned)
        served = catalog.find_all()
        settings = served[0][1]
        if make_keys is not None and not insecure_no_key:
            _make_first_keys(make_keys)
        with (
            contextlib.closing(
                auth.gate_for(settings, settings.host, settings.port, is_keyless_allowed=insecure_no_key)
            ) as gate,
            listening.bind(settings.host, settings.port) as sock,
        ):
            asyncio.run(_serve(catalog, served, gate, sock, workers, traces))


def _import_first_model(file: Path) -> None:
    from appliance import bundles, promotion

    root = config.artifacts_root()
    if promotion.current(root) is None:
        taken = bundles.take_in(file, root, config.trusted_key())
        said = promotion.promote(taken.model, taken.report, taken.serve, root, is_carried=True)
        if said is not None:
            note(said)
        note(f"imported {taken.model.id} from {file}")


def _make_first_keys(folder: Path) -> None:
    from appliance import first_keys

    for path in first_keys.make(folder, config.store_file(), config.store_key_file()):
        note(f"made a first API key: it is in {path}")


async def _serve(
    catalog: "_Catalog",
    served: "list[tuple[ServedModel, Serve]]",
    gate: "Gate",
    sock: "socket",
    workers: "Workers",
    traces: str | None,
) -> None:
    """Loads the default model and answers until a signal comes."""
    import asyncio

    from prometheus_client import CollectorRegistry

    from appliance import device
    from appliance.machine_metrics import MachineCollector
    from appliance.serving import bandwidth
    from appliance.serving.document_following import Following
    from appliance.serving.metrics import Metrics

    settings = served[0][1]
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    threads = settings.threads or device.physical_cores()
    metrics.record_peak_bandwidth(bandwidth.remembered(threads, catalog.folder))
    async with contextlib.AsyncExitStack() as held:
        listener: EngineListener = metrics
        if traces is not None:
            from appliance.serving.traces import sent_to

            listener = held.enter_context(sent_to(traces, metrics))
        following = Following(settings.document_folder, note)
        documents = following.start(catalog.planner.snapshot_folders)
        pool = catalog.pool(served, listener, workers)
        pool.keep(documents)
        held.push_async_callback(pool.close)
        registry.register(MachineCollector(pool.processes, folders={"artifacts": catalog.folder}))
        # The engine's process loads the model while this one loads its libraries.
        _, (create_app, run) = await asyncio.gather(pool.start(), asyncio.to_thread(_http))
        watching = asyncio.create_task(following.follow(pool))
        held.callback(watching.cancel)
        app = create_app(pool, metrics, serve=settings, gate=gate)
        name = served[0][0].name

        def say_ready(url: str) -> None:
            click.echo(f"serving {name} on {url}")

        await run(app, pool, sock, say_ready, grace_seconds=settings.grace_seconds)


def _http() -> "tuple[Callable[..., FastAPI], Callable[..., Coroutine[Any, Any, None]]]":
    """What makes the application, and what runs it: half a second of imports."""
    from appliance.serving import server
    from appliance.serving.api.app import create_app

    return create_app, server.run


class _Catalog:
    """What is to be served, by the command line; a `Promotion` when no model is named."""

    def __init__(self, model: str | None, flags: dict[str, Any], is_verifying: bool, tuned: Path | None) -> None:
        from appliance.serving.digests import Digests

        self._model = model
        self._flags = flags
        self._root = config.artifacts_root()
        self.folder = self._root if self._root.is_dir() else config.cache_root()
        self._digests = Digests(self.folder, is_trusted=not is_verifying)
        self._is_verifying = is_verifying
        self._tuned = tuned

    def find_all(self) -> "list[tuple[ServedModel, Serve]]":
        """The default model and the others, with their settings; every file's header and sha256 is checked."""
        default, settings = self.find()
        others = [self._find_other(each, settings) for each in settings.models]
        names = [default.name, *(model.name for model, _ in others)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RecipeError(f"serve.models: {', '.join(twice)} is the name of two models; rename a file or leave one out.")
        return [(default, settings), *others]

    def find(self) -> "tuple[ServedModel, Serve]":
        """The default model."""
        from appliance.serving import served_model

        found = served_model.find(self._model, self._root, self._digests)
        settings = serve_settings(found.serve, self._flags)
        return served_model.with_adapters(found, settings.adapters), settings

    def mark(self) -> object:
        from appliance.serving import served_model

        return served_model.promotion_mark(self._root)

    @property
    def planner(self) -> "Planner":
        from appliance.serving.planning import Planner

        explicit = {*self._flags, *config.environment_table(Recipe).get("serve", {})}
        return Planner(explicit=explicit, folder=self.folder, tuned=self._tuned)

    def pool(self, served: "list[tuple[ServedModel, Serve]]", listener: "EngineListener", workers: "Workers") -> "ModelPool":
        from appliance.serving.model_pool import ModelPool
        from appliance.serving.tried import Tried

        _warn_of_cards()
        for model, _ in served:
            if model.is_foreign:
                note(f"warning: {model.path} has no manifest; nothing says where it came from or what it was tested for")
        promotion = self if self._model is None else None
        tried = Tried(self.folder, self._digests, is_trusted=not self._is_verifying)
        return ModelPool(
            served,
            plans=self.planner,
            listener=listener,
            promotion=promotion,
            on_planned=_tell_plan,
            probe=tried.check,
            workers=workers,
        )

    def _find_other(self, model: str, settings: Serve) -> "tuple[ServedModel, Serve]":
        from appliance.serving import served_model

        plain = dataclasses.replace(
            settings, adapters=(), system_prompts=(), document_folder=None
        )  # they belong to the default model
        return served_model.find(model, self._root, self._digests), plain


def _warn_of_cards() -> None:
    """What keeps cards from being used. Whether llama.cpp can use them the plan says: no layer goes to one without code."""
    from appliance import gpu, gpu_access

    # Beside a card of another vendor, that one may compute.
    until_then = " Until then the CPU computes." if len(gpu_access.vendors()) < 2 else ""
    for problem in gpu.problems():
        note(f"warning: {problem}{until_then}")


def _tell_plan(plan: "Plan") -> None:
    """What is about to be loaded, in numbers, and what is not as it was asked."""
    chosen = plan.settings
    note(
        f"{chosen.name}: {chosen.slots} x {chosen.context_tokens} tokens, {chosen.threads_decode} + "
        f"{chosen.threads_prefill} threads, KV {chosen.kv_type}; memory {plan.memory}"
    )
    for each in chosen.notes:
        note(f"  {each}")


def serve_settings(from_recipe: Any, flags: dict[str, Any]) -> Serve:
    """Defaults < the recipe in the model's manifest < environment < flags; raises `RecipeError` with every mistake."""
    environment = config.environment_table(Recipe).get("serve", {})
    problems: list[str] = []
    settings = config.build(Serve, config.merge_tables(from_recipe, environment, flags), "serve", problems)
    if settings is None:
        raise RecipeError(several(problems, "serve settings"))
    return settings
