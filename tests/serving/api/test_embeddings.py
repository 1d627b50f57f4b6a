"""Vectors, ranked documents and tokens over a fake engine."""

import base64
import struct
from typing import Any

import msgspec
import pytest

from appliance.serving.events import Pooled
from appliance.serving.requests import PoolingRequest
from tests.serving.api.site import Site
from tests.serving.fakes import MODEL, FakeEngine

EMBEDDINGS, RERANK = "/v1/embeddings", "/v1/rerank"


@pytest.fixture
def site() -> Site:
    return Site(FakeEngine())


def test_vectors_as_numbers_and_as_bytes(site: Site) -> None:
    body = site.post(EMBEDDINGS, {"model": "fake", "input": ["abc", "d"]}).json()
    assert (body["object"], body["model"]) == ("list", "fake")
    assert body["data"] == [
        {"object": "embedding", "index": 0, "embedding": [3.0, 1.0]},
        {"object": "embedding", "index": 1, "embedding": [1.0, 1.0]},
    ]
    assert body["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    packed = site.post(EMBEDDINGS, {"input": "abc", "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert struct.unpack("<2f", base64.b64decode(packed)) == (3.0, 1.0)
    assert site.models.leased == [("fake", "embedding"), (None, "embedding")]
    assert site.models.leases == 0


@pytest.mark.parametrize(
    ("given", "sent"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1, 2], [3]], ((1, 2), (3,)))],
)
def test_inputs(site: Site, given: Any, sent: Any) -> None:
    site.post(EMBEDDINGS, {"input": given})
    request = site.engine.pooled[0]
    assert request.inputs == sent
    assert request.deadline_at is not None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [""]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [1000]}, "input"),
        ({"dimensions": 1}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"truncate": True}, "truncate"),
    ],
)
def test_refused_embeddings(site: Site, fields: dict[str, Any], param: str) -> None:
    response = site.post(EMBEDDINGS, {"input": "x", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert site.engine.pooled == []


def test_the_full_width_may_be_asked_for(site: Site) -> None:
    assert site.post(EMBEDDINGS, {"input": "x", "dimensions": MODEL.embedding_width, "user": "u"}).status_code == 200


def test_a_vector_of_no_numbers_is_the_servers_failure(site: Site) -> None:
    async def pool(_: PoolingRequest) -> Pooled:
        return Pooled(vectors=(struct.pack("<2f", float("nan"), 1.0),), scores=(float("nan"),), prompt_tokens=1)

    site.engine.pool = pool  # type: ignore[method-assign]
    asked = [
        site.post(EMBEDDINGS, {"input": "x"}),
        site.post(EMBEDDINGS, {"input": "x", "encoding_format": "base64"}),
        site.post(RERANK, {"query": "q", "documents": ["x"]}),
        site.post("/api/embed", {"model": "fake", "input": "x"}),
    ]
    assert [answer.status_code for answer in asked] == [500] * 4
    assert asked[0].json()["error"]["code"] == "engine_failed"


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
def test_documents_are_sorted_by_relevance(site: Site, path: str) -> None:
    body = site.post(path, {"query": "q", "documents": ["a", {"text": "abc"}, "ab"]}).json()
    assert body["results"] == [
        {"index": 1, "relevance_score": 3.0},
        {"index": 2, "relevance_score": 2.0},
        {"index": 0, "relevance_score": 1.0},
    ]
    assert body["usage"]["total_tokens"] == 7
    assert site.engine.pooled[0].query == "q"
    assert site.models.leased == [(None, "rerank")]


def test_the_best_documents_with_their_text(site: Site) -> None:
    asked = {"query": "q", "documents": ["a", "abc"], "top_n": 1, "return_documents": True}
    assert site.post(RERANK, asked).json()["results"] == [{"index": 1, "relevance_score": 3.0, "document": {"text": "abc"}}]


@pytest.mark.parametrize(
    "fields",
    [{"query": ""}, {"documents": []}, {"documents": ["a"] * 1025}, {"documents": [""]}, {"top_n": 0}, {"documents": [{}]}],
)
def test_refused_ranking(site: Site, fields: dict[str, Any]) -> None:
    assert site.post(RERANK, {"query": "q", "documents": ["a"], **fields}).status_code == 400


def test_tokens_of_a_text_and_back(site: Site) -> None:
    assert site.post("/tokenize", {"content": "aé"}).json() == {"tokens": [97, 195, 169]}
    pieces = site.post("/tokenize", {"content": "aé", "with_pieces": True}).json()["tokens"]
    assert pieces == [{"id": 97, "piece": "a"}, {"id": 195, "piece": [195]}, {"id": 169, "piece": [169]}]
    assert site.post("/tokenize", {"content": ""}).json() == {"tokens": []}
    assert site.post("/detokenize", {"tokens": [97, 195, 169]}).json() == {"content": "aé"}
    assert site.post("/detokenize", {"tokens": []}).json() == {"content": ""}


def test_tokens_that_do_not_exist_are_refused(site: Site) -> None:
    error = site.post("/detokenize", {"tokens": [1, 1000]}).json()["error"]
    assert error["param"] == "tokens"
    assert "1000 tokens" in error["message"]


def test_template(site: Site) -> None:
    asked = {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"enable_thinking": False}}
    assert site.post("/apply-template", asked).json() == {"prompt": "user: hi\nassistant: <think>\n\n</think>\n\n"}
    assert site.post("/apply-template", {"messages": []}).status_code == 400
    twice = [{"id": "a", "text": "one"}, {"id": "a", "text": "two"}]
    refused = site.post("/apply-template", {**asked, "documents": twice})
    assert (refused.status_code, "has the id of documents[0]" in refused.text) == (400, True)


def test_models_of_other_kinds_can_be_listed() -> None:
    engines = [FakeEngine(), FakeEngine(model=msgspec.structs.replace(MODEL, name="vectors", kind="embedding"))]
    site = Site(*engines)
    listed = site.ask("GET", "/v1/models").json()
    assert [(each["id"], each["object"], each["kind"]) for each in listed["data"]] == [
        ("fake", "model", "chat"),
        ("vectors", "model", "embedding"),
    ]
    assert site.ask("GET", "/v1/models/vectors").json() == listed["data"][1]
    missing = site.ask("GET", "/v1/models/a/b")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
