"""Several models in one service, one of them broken, behind keys: each is what it says, and none takes another down."""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from serve_app import keys
from tests.model import FOLDER, MODEL
from tests.service.conftest import START_TIMEOUT_S, Keeper, Service

pytestmark = pytest.mark.service

KEYS_FILE = Path(tempfile.mkdtemp()) / "keys.txt"
SECRET_TEXT = "the launch code is swordfish"


def several(config: dict[str, Any]) -> None:
    """A stand-in, a folder with an alias in float32, and a model whose folder does not exist."""
    application = config["applications"][0]
    application["args"] = {
        "keys_file": str(KEYS_FILE),
        "models": [
            {"id": "Mihaiii/Ivysaur", "sources": ["embedded"]},
            {
                "id": "acme/exact",
                "aliases": ["text-embedding-3-small"],
                "sources": [str(FOLDER)],
                "precision": "float32",
            },
            {"id": "acme/broken", "sources": ["/nowhere/at/all"]},
        ],
    }
    application["deployments"] = [
        {"name": f"Model-{name}", "num_replicas": 1, "ray_actor_options": {"num_cpus": 0.5}}
        for name in ("Ivysaur", "exact", "broken")
    ] + [
        {"name": name, "num_replicas": 1, "ray_actor_options": {"num_cpus": 0}}
        for name in ("Ingress", "Tokenizer-Ivysaur", "Tokenizer-exact", "Tokenizer-broken")
    ]


@pytest.fixture(scope="module")
def key() -> Iterator[str]:
    yield keys.add(KEYS_FILE, "tests")
    shutil.rmtree(KEYS_FILE.parent)


@pytest.fixture
def mixed(keeper: Keeper, key: str) -> Service:
    """Ready, and so with one model at least; the second one is waited for."""
    service = keeper.get(several)
    deadline = time.monotonic() + START_TIMEOUT_S
    while httpx.get(f"{service.url}/readyz", timeout=30).json()["models"]["acme/exact"] != "ready":
        assert time.monotonic() < deadline, service.log.read_text()[-4000:]
        time.sleep(0.2)
    return service


@pytest.fixture
def client(mixed: Service, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{mixed.url}/v1", api_key=key, max_retries=0)


def test_each_model_answers_to_its_names_alone(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, "acme/exact", "text-embedding-3-small"]
    vectors = {
        name: np.array(client.embeddings.create(model=name, input="red shoes").data[0].embedding)
        for name in (MODEL, "acme/exact", "text-embedding-3-small")
    }
    assert np.array_equal(vectors["acme/exact"], vectors["text-embedding-3-small"])
    assert 0.9995 < float(vectors[MODEL] @ vectors["acme/exact"]) < 1.0001
    with pytest.raises(openai.NotFoundError, match=f"`{MODEL}` was loaded in its place"):
        client.embeddings.create(model="Mihaiii/Ivysaur", input="x")
    with pytest.raises(openai.NotFoundError, match="does not exist here"):
        client.embeddings.create(model="gpt-5", input="x")


def test_a_model_that_fails_to_load_says_so_and_takes_no_other_down(client: openai.OpenAI, mixed: Service) -> None:
    with pytest.raises(openai.InternalServerError, match="`acme/broken` is loading, or failed to load") as refused:
        client.embeddings.create(model="acme/broken", input="x")
    assert refused.value.status_code == 503
    ready = httpx.get(f"{mixed.url}/readyz", timeout=30)
    assert ready.status_code == 200
    states = ready.json()["models"]
    assert states["Mihaiii/Ivysaur"] == states["acme/exact"] == "ready"
    assert "acme/broken" in states["acme/broken"]
    assert "NOT READY acme/broken: " in mixed.log.read_text()
    assert "/nowhere/at/all" in mixed.log.read_text(), "the log must say why"


def test_fingerprints_differ_where_vectors_do(client: openai.OpenAI) -> None:
    models = {name: json.loads(client.models.with_raw_response.retrieve(name).text) for name in (MODEL, "acme/exact")}
    assert (
        models[MODEL]["precision"] != "float32" or models[MODEL]["fingerprint"] == models["acme/exact"]["fingerprint"]
    )
    assert models["acme/exact"]["precision"] == "float32"
    answer = client.embeddings.with_raw_response.create(model="acme/exact", input="x")
    assert answer.headers["x-model-fingerprint"] == models["acme/exact"]["fingerprint"]


def test_keys_are_needed_and_one_given_out_or_revoked_counts_at_once(mixed: Service, key: str) -> None:
    def ask(with_key: str) -> str:
        other = openai.OpenAI(base_url=f"{mixed.url}/v1", api_key=with_key, max_retries=0)
        return other.embeddings.create(model=MODEL, input="x").model

    assert httpx.get(f"{mixed.url}/healthz").status_code == 200
    assert httpx.get(f"{mixed.url}/v1/models").status_code == 401
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
        ask("sk-wrong")
    second = keys.add(KEYS_FILE, "second")
    assert ask(second) == ask(key) == MODEL
    KEYS_FILE.write_text(
        "".join(line for line in KEYS_FILE.read_text().splitlines(True) if not line.startswith("second "))
    )
    with pytest.raises(openai.AuthenticationError):
        ask(second)
    assert ask(key) == MODEL


def test_neither_keys_nor_texts_reach_a_log(client: openai.OpenAI, mixed: Service, key: str) -> None:
    client.embeddings.create(model="acme/exact", input=SECRET_TEXT)
    for spoiled in ({"input": [SECRET_TEXT, 5]}, {"input": [SECRET_TEXT, ""]}, {"model": "nil", "input": SECRET_TEXT}):
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as refused:
            client.post("/embeddings", body={"model": MODEL, **spoiled}, cast_to=object)
        assert SECRET_TEXT not in refused.value.message
    logs = [
        mixed.log,
        *Path("/tmp/ray/session_latest/logs").rglob("*.log"),
        *Path("/tmp/ray/session_latest/logs").rglob("worker*"),
    ]
    assert len(logs) > 10
    for log in logs:
        written = log.read_text(errors="replace")
        assert SECRET_TEXT not in written and key not in written, log
