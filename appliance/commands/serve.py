"""`appliance serve`: the promoted model behind OpenAI's HTTP API."""

from typing import TYPE_CHECKING, Any

import click

from appliance import config
from appliance.console import Command, note
from appliance.errors import RecipeError, several
from appliance.recipe import Recipe, Serve

if TYPE_CHECKING:
    from socket import socket

    from appliance.serving.served_model import ServedModel

DEFAULTS = Serve()


@click.command(cls=Command)
@click.option("--model", metavar="PATH|NAME", help="A .gguf file or an artifact; by default the promoted model.")
@click.option("--host", help=f"Address to listen on [default: {DEFAULTS.host}].")
@click.option("--port", type=int, help=f"0 takes any free port [default: {DEFAULTS.port}].")
@click.option(
    "--context-tokens", type=int, help=f"Per request, prompt and answer together [default: {DEFAULTS.context_tokens}]."
)
@click.option("--slots", type=int, help=f"Requests answered at the same time [default: {DEFAULTS.slots}].")
@click.option("--threads", type=int, help="0 takes the usable cores [default: 0].")
@click.option("--queue-requests", type=int, help=f"Requests that may wait [default: {DEFAULTS.queue_requests}].")
@click.option("--insecure-no-key", is_flag=True, help="Listen beyond this machine although nobody needs a key.")
def serve(model: str | None, insecure_no_key: bool, **flags: Any) -> None:
    """Answer chats over HTTP with the promoted model.

    Settings come from the flags, else APPLIANCE_SERVE_*, else the model's recipe, else the defaults shown.
    """
    config.apply_quiet_environment()  # before llama.cpp is loaded: a crash must not hang in gdb
    from appliance.serving import gguf_file, probe, served_model, server

    served = served_model.find(model, config.artifacts_root())
    settings = _settings(served.serve, {name: value for name, value in flags.items() if value is not None})
    if not insecure_no_key:
        server.require_loopback(settings.host)
    gguf_file.check(served.path)
    with server.bind(settings.host, settings.port) as sock:
        if served.is_foreign:
            note(f"warning: {served.path} has no manifest; nothing says where it came from or what it was tested for")
            probe.check(served.path)
        _serve(served, settings, sock)


def _serve(served: "ServedModel", settings: Serve, sock: "socket") -> None:
    """Loads the model and answers until a signal comes."""
    from prometheus_client import CollectorRegistry

    from appliance.device import usable_cores
    from appliance.serving import server
    from appliance.serving.app import create_app
    from appliance.serving.local_engine import LocalEngine
    from appliance.serving.metrics import Metrics

    metrics = Metrics(CollectorRegistry())
    engine = LocalEngine(
        served,
        context_tokens=settings.context_tokens,
        slots=settings.slots,
        threads=settings.threads or usable_cores(),
        queue_requests=settings.queue_requests,
        listener=metrics,
    )
    try:
        info = engine.model
        if info.context_tokens < settings.context_tokens:
            note(f"context_tokens: {info.context_tokens}; {info.name} was not trained for {settings.context_tokens}")
        app = create_app(engine, metrics, default_max_tokens=settings.max_tokens)
        server.run(app, engine, sock, lambda url: click.echo(f"serving {info.name} on {url}"))
    finally:
        engine.close()


def _settings(from_recipe: Any, flags: dict[str, Any]) -> Serve:
    """Defaults < the recipe in the model's manifest < environment < flags; raises `RecipeError` with every mistake."""
    environment = config.environment_table(Recipe).get("serve", {})
    problems: list[str] = []
    settings = config.build(Serve, config.merge_tables(from_recipe, environment, flags), "serve", problems)
    if settings is None:
        raise RecipeError(several(problems, "serve settings"))
    return settings
