"""The documents of a row: texts that stand in the prompt and that its answer rests on, as a chat request has them."""

from typing import Any

from appliance.data.defects import Report, Row, SetAside, kind_of
from appliance.data.messages import read_text, report_stray_keys
from appliance.text.passages import MOST_DOCUMENTS, MOST_ID_CHARACTERS, repeated

DOCUMENTS = "documents"
KEYS = ("id", "text")


def read(row: Row, report: Report) -> Row:
    """The row's `documents` in normal form; nothing where it has none. Raises `SetAside`."""
    value = row.get(DOCUMENTS)
    if value in (None, "", []):
        return {}
    if not isinstance(value, list):
        raise SetAside(f"{DOCUMENTS}: expected a list of objects with id and text, found {kind_of(value)}")
    if len(value) > MOST_DOCUMENTS:
        raise SetAside(f"{DOCUMENTS}: {len(value)} of them, the limit is {MOST_DOCUMENTS}; leave out what no answer needs")
    found = [_document(each, f"{DOCUMENTS}[{at}]", report) for at, each in enumerate(value)]
    if twice := repeated([(each["id"], each["text"]) for each in found]):
        at, what, earlier = twice
        raise SetAside(f"{DOCUMENTS}[{at}] has the {what} of {DOCUMENTS}[{earlier}]; give each document once")
    return {DOCUMENTS: found}


def names(row: Row) -> list[str]:
    return [each["id"] for each in row.get(DOCUMENTS, ())]


def texts(row: Row) -> list[str]:
    return [each["text"] for each in row.get(DOCUMENTS, ())]


def _document(value: Any, place: str, report: Report) -> dict[str, str]:
    if not isinstance(value, dict):
        raise SetAside(f"{place}: expected an object with id and text, found {kind_of(value)}")
    report_stray_keys(value, KEYS, report, f"{place}: ")
    document = {key: read_text(value.get(key), f"{place}.{key}", report) for key in KEYS}
    if len(document["id"]) > MOST_ID_CHARACTERS:
        raise SetAside(f"{place}.id has {len(document['id']):,} characters, the limit is {MOST_ID_CHARACTERS}")
    return document
