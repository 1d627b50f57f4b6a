"""`appliance keys ...`: who may use the server."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from appliance import config
from appliance.console import Command, emit, json_option, note

if TYPE_CHECKING:
    from appliance.keys import Key

SCOPES = ("chat", "metrics", "admin")


@click.command(cls=Command)
@click.option("--label", required=True, help="Whose key it is, or what for.")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(SCOPES),
    multiple=True,
    default=("chat",),
    show_default=True,
    help="May be repeated.",
)
@click.option("--expires", metavar="TIME", help="How long it is valid, for example 90d, 12h or 2w; for ever by default.")
@json_option
def create(label: str, scopes: Sequence[Any], expires: str | None, as_json: bool) -> None:
    """A new API key, shown this once.

    chat: ask models. metrics: read /metrics. admin: everything. The first key also makes the encrypted store and, if there
    is none, its own key in APPLIANCE_KEY_FILE.
    """
    from appliance import keys, store_key
    from appliance.store import Store

    path, key_file = config.store_file(), config.store_key_file()
    lifetime = None if expires is None else keys.lifetime_seconds(expires)
    label = keys.checked_label(label)
    if store_key.create(key_file, path):
        note(f"made the store's key {key_file}: keep a copy apart from the data, which cannot be read without it")
    with Store.open(path, key_file) as store:
        key, text = keys.create(store, label, scopes, lifetime)
    note(f"{key.id} ({key.label}, {_scopes(key)}, {_expiry(key)}): write the key down now, it is not shown again")
    emit({**_plain(key), "key": text}, as_json, text)


@click.command("list", cls=Command)
@json_option
def list_keys(as_json: bool) -> None:
    """All API keys ever made; never their text."""
    from appliance import keys
    from appliance.store import Store

    path = config.store_file()
    found = []
    if path.exists():
        with Store.open(path, config.store_key_file()) as store:
            found = keys.list_keys(store)
    lines = [
        f"{key.id}  …{key.last4}  {_state(key):<8}  {_scopes(key):<12}  {_expiry(key):<24}  {key.label}" for key in found
    ]
    emit(
        {"keys": [_plain(key) for key in found]}, as_json, "\n".join(lines) or "No keys; `appliance keys create` makes one."
    )


@click.command(cls=Command)
@click.argument("key_id", metavar="ID")
@json_option
def revoke(key_id: str, as_json: bool) -> None:
    """End the API key ID for good; running servers refuse it within seconds."""
    from appliance import keys
    from appliance.store import Store

    path = config.store_file()
    if not path.exists():
        raise keys.unknown(key_id)
    with Store.open(path, config.store_key_file()) as store:
        key = keys.revoke(store, key_id)
    emit(_plain(key), as_json, f"{key.id} ({key.label}) is revoked")


def _plain(key: "Key") -> dict[str, Any]:
    times = {name: _iso(getattr(key, name)) for name in ("created_at", "expires_at", "revoked_at")}
    return {
        "id": key.id,
        "label": key.label,
        "scopes": sorted(key.scopes),
        "last4": key.last4,
        "state": _state(key),
        **times,
    }


def _state(key: "Key") -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "active" if key.is_active(time.time()) else "expired"


def _scopes(key: "Key") -> str:
    return ",".join(sorted(key.scopes))


def _expiry(key: "Key") -> str:
    return "never expires" if key.expires_at is None else f"until {_iso(key.expires_at)}"


def _iso(seconds: int | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
