"""The clients that people use embed through the running service with their own defaults, 300 texts at a time.

Every vector is held against the one that the service gives for its text alone, as floats, by plain HTTP: a wrong order,
a wrong encoding or a mixed-up batch would show. Imports stand in the tests, since the clients take seconds to import.
"""

import asyncio
import base64
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from tests.model import FOLDER, MODEL
from tests.service.conftest import Keeper, Service

if TYPE_CHECKING:
    import openai
    from langchain_openai import OpenAIEmbeddings
    from llama_index.embeddings.openai import OpenAIEmbedding

pytestmark = [
    pytest.mark.service,
    # LangChain, LlamaIndex and LiteLLM leave it to the garbage collector to close their connections.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

# The model of serve_config.yaml, in whose place `MODEL` is served where no hub can be reached.
ABSENT = "Mihaiii/Ivysaur"
DIMENSIONS = 384
KEY = "none"  # the service is open, but every client wants to send something

# fmt: off
_SUBJECTS = (
    "A tired nurse", "The old tailor", "My neighbour's cat", "Our new manager", "A red tractor", "Die Lehrerin",
    "The orchestra", "An astronaut", "小さな犬", "The tax office",
)
_DEEDS = (
    "lost the only key", "bought 40 kg of flour", "explained photosynthesis", "refused to pay", "slept",
    "won the chess final", "repaired a bicycle", "cancelled the flight", "sang off-key 🎵", "wrote SQL",
)
# fmt: on
_ENDS = (" in Lisbon.", "\nbefore the storm came, and told nobody why", "!" + " It went on and on." * 6)
TEXTS = [f"{who} {did}{end}" for who, did, end in product(_SUBJECTS, _DEEDS, _ENDS)]
LONG = 150
TEXTS[LONG] += " and then the very same happened again" * 200  # the one that is over every model's limit


@dataclass(frozen=True)
class Alone:
    """What the service gives for each of TEXTS alone: vectors float64 [300, 384], and the tokens of each."""

    vectors: NDArray[np.float64]
    tokens: list[int]

    def assert_equal(self, vectors: ArrayLike, rows: slice = slice(None)) -> None:
        """The vectors are those of TEXTS[rows], each at its place."""
        got = np.asarray(vectors, np.float64)
        expected = self.vectors[rows]
        assert got.shape == expected.shape
        assert np.abs(np.linalg.norm(got, axis=1) - 1).max() < 1e-5
        cosines = (got * expected).sum(axis=1)
        assert cosines.min() >= 0.9999, f"text {int(cosines.argmin())} is off: cosine {cosines.min()}"


@pytest.fixture(scope="module")
def alone(keeper: Keeper) -> Alone:
    url = f"{keeper.get().url}/v1/embeddings"
    with httpx.Client(timeout=60) as http, ThreadPoolExecutor(8) as pool:
        asked = ({"model": MODEL, "input": text, "encoding_format": "float"} for text in TEXTS)
        answers = list(pool.map(lambda body: http.post(url, json=body).raise_for_status().json(), asked))
    assert all(len(answer["data"]) == 1 for answer in answers)
    vectors = np.array([answer["data"][0]["embedding"] for answer in answers], np.float64)
    assert vectors.shape == (300, DIMENSIONS) == (len(set(TEXTS)), DIMENSIONS)
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    # No two are alike enough for one to pass for the other.
    assert (vectors @ vectors.T - 2 * np.eye(300)).max() < 0.999
    return Alone(vectors, [answer["usage"]["prompt_tokens"] for answer in answers])


@pytest.fixture(scope="module", autouse=True)
def leftovers() -> Iterator[None]:
    """What the clients leave open is collected here, where its warning is known, and not in a later file's test."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients' own defaults, whatever the shell says, and no client that calls home."""
    for name in os.environ:
        if name.startswith("OPENAI_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")


def openai_client(service: Service) -> "openai.OpenAI":
    import openai

    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY)


def assert_cut(vector: ArrayLike, alone: Alone, row: int) -> None:
    """The vector is the first 8 numbers of TEXTS[row]'s, scaled to length 1 again."""
    head = alone.vectors[row, :8]
    assert np.shape(vector) == (8,)
    assert np.allclose(vector, head / np.linalg.norm(head), atol=2e-3)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


# openai


def test_openai(service: Service, alone: Alone) -> None:
    with openai_client(service) as client:
        raw = client.embeddings.with_raw_response.create(model=MODEL, input=TEXTS)
        answer = raw.parse()
        assert json.loads(raw.http_request.content) == {"model": MODEL, "input": TEXTS, "encoding_format": "base64"}
        assert all(isinstance(item["embedding"], str) for item in json.loads(raw.content)["data"])
        alone.assert_equal([item.embedding for item in answer.data])
        assert [item.index for item in answer.data] == list(range(300))
        assert {item.object for item in answer.data} == {"embedding"}
        assert (answer.object, answer.model) == ("list", MODEL)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(alone.tokens)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_openai_with_an_encoding_of_its_own(service: Service, alone: Alone, encoding: Any) -> None:
    with openai_client(service) as client:
        answer = client.embeddings.create(model=MODEL, input=TEXTS[:3], encoding_format=encoding)
    vectors = [item.embedding for item in answer.data]
    if encoding == "base64":  # asked for by name, the client leaves it as it came
        vectors = [np.frombuffer(base64.b64decode(vector), "<f4").tolist() for vector in vectors]
    alone.assert_equal(vectors, slice(3))


async def test_openai_async(service: Service, alone: Alone) -> None:
    import openai

    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=KEY) as client:
        whole = await client.embeddings.create(model=MODEL, input=TEXTS)
        parts = await asyncio.gather(
            *(client.embeddings.create(model=MODEL, input=TEXTS[start : start + 15]) for start in range(0, 300, 15))
        )
    alone.assert_equal([item.embedding for item in whole.data])
    assert whole.usage.prompt_tokens == sum(alone.tokens)
    alone.assert_equal([item.embedding for part in parts for item in part.data])
    assert [part.usage.prompt_tokens for part in parts] == [sum(alone.tokens[s : s + 15]) for s in range(0, 300, 15)]


def test_openai_with_one_text_and_with_a_user(service: Service, alone: Alone) -> None:
    with openai_client(service) as client:
        answer = client.embeddings.create(model=MODEL, input=TEXTS[7], user="u-1")
    alone.assert_equal([answer.data[0].embedding], slice(7, 8))
    assert answer.usage.prompt_tokens == alone.tokens[7]


def test_openai_with_dimensions(service: Service, alone: Alone) -> None:
    import openai

    with openai_client(service) as client:
        answer = client.embeddings.create(model=MODEL, input=TEXTS[:2], dimensions=8)
        for row, item in enumerate(answer.data):
            assert_cut(item.embedding, alone, row)
        with pytest.raises(openai.BadRequestError, match=f"'dimensions' is 385; this model has {DIMENSIONS}") as caught:
            client.embeddings.create(model=MODEL, input="x", dimensions=385)
        assert caught.value.param == "dimensions"


def test_openai_with_token_ids(service: Service, alone: Alone) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = [encoding.ids for encoding in tokenizer.encode_batch(TEXTS)]
    with openai_client(service) as client:
        many = client.embeddings.create(model=MODEL, input=ids)
        one = client.embeddings.create(model=MODEL, input=ids[7])
    alone.assert_equal([item.embedding for item in many.data])
    assert many.usage.prompt_tokens == sum(alone.tokens)
    alone.assert_equal([item.embedding for item in one.data], slice(7, 8))


def test_openai_models(service: Service) -> None:
    import openai

    with openai_client(service) as client:
        listed = list(client.models.list())
        assert [model.id for model in listed] == [MODEL]
        retrieved = client.models.with_raw_response.retrieve(MODEL)
        assert retrieved.http_request.url.raw_path == f"/v1/models/{MODEL.replace('/', '%2F')}".encode()
        model = retrieved.parse()
        assert model == listed[0]
        assert (model.object, model.owned_by) == ("model", MODEL.partition("/")[0])
        assert 1_700_000_000 < model.created < 10_000_000_000, "seconds"
        assert model.model_extra is not None and model.model_extra["dimensions"] == DIMENSIONS
        with pytest.raises(openai.NotFoundError, match=f"`{MODEL}` was loaded in its place"):
            client.models.retrieve(ABSENT)
        with pytest.raises(openai.NotFoundError, match="`nobody/nothing` does not exist here"):
            client.models.retrieve("nobody/nothing")


def test_openai_headers(service: Service) -> None:
    with openai_client(service) as client:
        fingerprint = (client.models.retrieve(MODEL).model_extra or {})["fingerprint"]
        first, second = (
            client.embeddings.with_raw_response.create(model=MODEL, input=[TEXTS[0], TEXTS[LONG]]) for _ in range(2)
        )
        mine = client.embeddings.with_raw_response.create(
            model=MODEL, input=TEXTS[0], extra_headers={"x-request-id": "mine-1"}
        )
    for raw in (first, second):
        assert len(raw.headers.get_list("x-request-id")) == 1 and raw.headers["x-request-id"]
        assert raw.request_id == raw.parse()._request_id == raw.headers["x-request-id"]
        assert raw.headers["x-truncated-inputs"] == "1"
    assert first.request_id != second.request_id
    assert mine.headers.get_list("x-request-id") == ["mine-1"]
    assert mine.headers["x-truncated-inputs"] == "0"
    assert mine.headers["x-model-fingerprint"] == first.headers["x-model-fingerprint"] == fingerprint
    took_ms = int(first.headers["openai-processing-ms"])
    stages = dict(part.strip().split(";dur=") for part in first.headers["server-timing"].split(","))
    assert set(stages) == {"tokenize", "queue", "infer"} and all(float(ms) >= 0 for ms in stages.values())
    assert 0 < float(stages["infer"]) <= sum(map(float, stages.values())) <= took_ms + 1
    assert took_ms < first.elapsed.total_seconds() * 1e3 + 1


def test_openai_errors(service: Service) -> None:
    import openai

    def failure(client: openai.OpenAI, kind: type[openai.APIStatusError], **asked: Any) -> openai.APIStatusError:
        with pytest.raises(kind) as caught:
            client.embeddings.create(**({"model": MODEL, "input": "x"} | asked))
        error = caught.value
        assert type(error) is kind
        assert error.type == "invalid_request_error"
        assert len(error.response.headers.get_list("x-request-id")) == 1
        assert error.request_id == error.response.headers["x-request-id"] != ""
        assert isinstance(error.body, dict) and set(error.body) == {"message", "type", "param", "code"}
        return error

    with openai_client(service) as client:
        unknown = failure(client, openai.NotFoundError, model="nobody/nothing")
        assert (unknown.code, unknown.param) == ("model_not_found", None)
        assert f"`nobody/nothing` does not exist here. Models that are served: `{MODEL}`." in unknown.message
        absent = failure(client, openai.NotFoundError, model=ABSENT)
        assert (absent.code, absent.param) == ("model_not_found", None)
        assert f"`{ABSENT}` is not served here" in absent.message
        assert f"`{MODEL}` was loaded in its place" in absent.message
        for empty, said in (
            ("", "Input 0 is an empty string"),
            (["a", ""], "Input 1 is an empty string"),
            ([], "'input' is an empty array"),
            ([[7], []], "Input 1 is an empty array"),
        ):
            refused = failure(client, openai.BadRequestError, input=empty)
            assert (refused.code, refused.param) == (None, "input")
            assert said in refused.message
        for ids, said in (
            ([[101, 2023, 102], [101, 30522, 102]], "Token id 30522 in input 1 is not in this model's vocabulary"),
            ([15339, 100257], "Token id 100257 in input 0"),
            ([-1], "Token id -1 in input 0"),
        ):
            foreign = failure(client, openai.BadRequestError, input=ids)
            assert foreign.param == "input"
            assert said in foreign.message and "check_embedding_ctx_length=False" in foreign.message
        long = failure(client, openai.BadRequestError, input=[TEXTS[LONG]], extra_body={"truncate": "error"})
        assert "maximum context length" in long.message and long.param == "input"
        many = failure(client, openai.BadRequestError, input=["x"] * 2049)
        assert "2049 inputs; at most 2048" in many.message


# langchain-openai


def langchain_embeddings(service: Service, **settings: Any) -> "OpenAIEmbeddings":
    from langchain_openai import OpenAIEmbeddings

    return OpenAIEmbeddings(model=MODEL, base_url=f"{service.url}/v1", api_key=KEY, **settings)


def test_langchain_with_texts(service: Service, alone: Alone) -> None:
    embeddings = langchain_embeddings(service, check_embedding_ctx_length=False)
    alone.assert_equal(embeddings.embed_documents(TEXTS))
    alone.assert_equal([embeddings.embed_query(TEXTS[7])], slice(7, 8))


async def test_langchain_async(service: Service, alone: Alone) -> None:
    embeddings = langchain_embeddings(service, check_embedding_ctx_length=False)
    alone.assert_equal(await embeddings.aembed_documents(TEXTS))
    alone.assert_equal([await embeddings.aembed_query(TEXTS[7])], slice(7, 8))


def test_langchain_with_the_models_own_tokenizer(service: Service, alone: Alone) -> None:
    # LangChain then tokenizes only to cut, and sends the text that the ids decode to, which has the same ids again.
    embeddings = langchain_embeddings(service, tiktoken_enabled=False, tiktoken_model_name=str(FOLDER))
    alone.assert_equal(embeddings.embed_documents(TEXTS))


def test_langchain_with_dimensions(service: Service, alone: Alone) -> None:
    embeddings = langchain_embeddings(service, check_embedding_ctx_length=False, dimensions=8)
    assert_cut(embeddings.embed_query(TEXTS[0]), alone, 0)


async def test_langchain_by_default_is_told_how_to_send_texts(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LangChain sends OpenAI's token ids for a model it does not know; they mean nothing to any other model."""
    import openai
    import tiktoken

    # tiktoken downloads its vocabulary; LiteLLM carries the same file under the name that tiktoken looks for.
    litellm = importlib.util.find_spec("litellm")
    assert litellm is not None and litellm.origin is not None
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path(litellm.origin).parent / "litellm_core_utils" / "tokenizers"))
    ids = [tiktoken.get_encoding("cl100k_base").encode_ordinary(text) for text in TEXTS]
    row, foreign = next((row, token) for row, tokens in enumerate(ids) for token in tokens if token >= 30522)

    embeddings = langchain_embeddings(service)
    with pytest.raises(openai.BadRequestError, match=r"check_embedding_ctx_length=False") as caught:
        embeddings.embed_documents(TEXTS)
    assert f"Token id {foreign} in input {row} is not in this model's vocabulary" in caught.value.message
    assert caught.value.param == "input"
    with pytest.raises(openai.BadRequestError, match=r"check_embedding_ctx_length=False"):
        await embeddings.aembed_query(TEXTS[row])


# llama-index


def llama_index_embedding(service: Service, model: str = MODEL, **settings: Any) -> "OpenAIEmbedding":
    from llama_index.embeddings.openai import OpenAIEmbedding

    return OpenAIEmbedding(model_name=model, api_base=f"{service.url}/v1", api_key=KEY, **settings)


def test_llama_index(service: Service, alone: Alone) -> None:
    embedding = llama_index_embedding(service)
    alone.assert_equal(embedding.get_text_embedding_batch(TEXTS))
    alone.assert_equal([embedding.get_query_embedding(TEXTS[7])], slice(7, 8))
    assert_cut(llama_index_embedding(service, dimensions=8).get_text_embedding(TEXTS[0]), alone, 0)


async def test_llama_index_async(service: Service, alone: Alone) -> None:
    embedding = llama_index_embedding(service)
    alone.assert_equal(await embedding.aget_text_embedding_batch(TEXTS))
    alone.assert_equal([await embedding.aget_query_embedding(TEXTS[7])], slice(7, 8))


def test_llama_index_errors(service: Service) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="Input 1 is an empty string"):
        llama_index_embedding(service).get_text_embedding_batch(["a", ""])
    with pytest.raises(openai.NotFoundError, match=f"`{MODEL}` was loaded in its place"):
        llama_index_embedding(service, ABSENT).get_text_embedding("a")


# litellm


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm(service: Service, alone: Alone, provider: str) -> None:
    import litellm

    where = {"api_base": f"{service.url}/v1", "api_key": KEY}
    answer = litellm.embedding(model=f"{provider}/{MODEL}", input=TEXTS, **where)
    alone.assert_equal([item["embedding"] for item in answer.data])
    assert [item["index"] for item in answer.data] == list(range(300))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(alone.tokens)
    one = litellm.embedding(model=f"{provider}/{MODEL}", input=TEXTS[7], **where)
    alone.assert_equal([one.data[0]["embedding"]], slice(7, 8))
    # LiteLLM itself refuses `dimensions` for a name that is not OpenAI's, unless it is told that the model takes it.
    cut = litellm.embedding(
        model=f"{provider}/{MODEL}", input=TEXTS[0], dimensions=8, allowed_openai_params=["dimensions"], **where
    )
    assert_cut(cut.data[0]["embedding"], alone, 0)


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
async def test_litellm_async(service: Service, alone: Alone, provider: str) -> None:
    import litellm

    answer = await litellm.aembedding(
        model=f"{provider}/{MODEL}", input=TEXTS, api_base=f"{service.url}/v1", api_key=KEY
    )
    alone.assert_equal([item["embedding"] for item in answer.data])
    assert answer.usage.prompt_tokens == sum(alone.tokens)


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm_errors(service: Service, provider: str) -> None:
    import litellm

    where = {"api_base": f"{service.url}/v1", "api_key": KEY}
    with pytest.raises(litellm.NotFoundError, match=f"`{MODEL}` was loaded in its place"):
        litellm.embedding(model=f"{provider}/{ABSENT}", input=["a"], **where)
    with pytest.raises(litellm.BadRequestError, match="Input 1 is an empty string"):
        litellm.embedding(model=f"{provider}/{MODEL}", input=["a", ""], **where)


# haystack


def test_haystack(service: Service, alone: Alone) -> None:
    from haystack import Document
    from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
    from haystack.utils import Secret

    where = {"model": MODEL, "api_base_url": f"{service.url}/v1", "api_key": Secret.from_token(KEY)}
    answer = OpenAIDocumentEmbedder(**where).run([Document(content=text) for text in TEXTS])
    assert [document.content for document in answer["documents"]] == TEXTS
    alone.assert_equal([document.embedding for document in answer["documents"]])
    tokens = sum(alone.tokens)
    assert answer["meta"] == {"model": MODEL, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    answer = OpenAITextEmbedder(**where).run(TEXTS[7])
    alone.assert_equal([answer["embedding"]], slice(7, 8))
    tokens = alone.tokens[7]
    assert answer["meta"] == {"model": MODEL, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    assert_cut(OpenAITextEmbedder(**where, dimensions=8).run(TEXTS[0])["embedding"], alone, 0)


async def test_haystack_async(service: Service, alone: Alone) -> None:
    from haystack import Document
    from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
    from haystack.utils import Secret

    where = {"model": MODEL, "api_base_url": f"{service.url}/v1", "api_key": Secret.from_token(KEY)}
    documents, texts = OpenAIDocumentEmbedder(**where), OpenAITextEmbedder(**where)
    answer = await documents.run_async([Document(content=text) for text in TEXTS])
    alone.assert_equal([document.embedding for document in answer["documents"]])
    alone.assert_equal([(await texts.run_async(TEXTS[7]))["embedding"]], slice(7, 8))
    await documents.close_async()
    await texts.close_async()


def test_haystack_errors(service: Service) -> None:
    import openai
    from haystack import Document
    from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
    from haystack.utils import Secret

    where = {"model": ABSENT, "api_base_url": f"{service.url}/v1", "api_key": Secret.from_token(KEY)}
    with pytest.raises(openai.NotFoundError, match=f"`{MODEL}` was loaded in its place"):
        OpenAITextEmbedder(**where).run("a")
    with pytest.raises(openai.BadRequestError, match="Input 1 is an empty string"):
        # By default Haystack only logs what was refused.
        OpenAIDocumentEmbedder(**where | {"model": MODEL}, raise_on_failure=True).run(
            [Document(content="a"), Document(content="")]
        )


# openai for Node


@pytest.fixture(scope="module")
def node(keeper: Keeper, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What clients.mjs printed. The client is installed once, into pytest's cache where there is one."""
    here = Path(__file__).parent
    if missing := [tool for tool in ("node", "npm") if shutil.which(tool) is None]:
        pytest.skip(f"{' and '.join(missing)} not found")
    cache = getattr(pytestconfig, "cache", None)
    folder = cache.mkdir("openai-node") if cache else tmp_path_factory.mktemp("openai-node")
    for file in ("clients.mjs", "package.json", "package-lock.json"):
        shutil.copy(here / file, folder)
    install = ["npm", "install", "--no-audit", "--no-fund", "--prefer-offline", "--fetch-retries=1"]
    try:
        subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=120, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"npm could not install openai: {str(error.stderr)[-500:]}")
    asked = {"url": keeper.get().url, "model": MODEL, "absent": ABSENT, "texts": TEXTS}
    ran = subprocess.run(
        ["node", "clients.mjs"], cwd=folder, input=json.dumps(asked), capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    answers: dict[str, Any] = json.loads(ran.stdout)
    return answers


def test_node(node: dict[str, Any], alone: Alone) -> None:
    assert node["defaultsSent"] == {"model": MODEL, "input": 300, "encoding_format": "base64"}
    alone.assert_equal(node["vectors"])
    assert node["indices"] == list(range(300)) and node["named"] == MODEL
    assert node["usage"] == {"prompt_tokens": sum(alone.tokens), "total_tokens": sum(alone.tokens)}
    alone.assert_equal(node["inParts"])
    alone.assert_equal([node["floats"]], slice(1))
    assert_cut(node["cut"], alone, 0)


def test_node_headers_and_models(node: dict[str, Any]) -> None:
    assert node["requestId"] == node["headers"]["x-request-id"] == "from-node"  # two would come as "a, b"
    assert node["headers"]["x-truncated-inputs"] == "1"
    assert node["headers"]["x-model-fingerprint"] == node["retrieved"]["fingerprint"]
    assert node["listed"] == [node["retrieved"]["id"]] == [MODEL]


@pytest.mark.parametrize(
    ("which", "name", "status", "code", "param", "said"),
    [
        ("absent", "NotFoundError", 404, "model_not_found", None, f"`{MODEL}` was loaded in its place"),
        ("retrieved", "NotFoundError", 404, "model_not_found", None, f"`{MODEL}` was loaded in its place"),
        ("unknown", "NotFoundError", 404, "model_not_found", None, f"Models that are served: `{MODEL}`"),
        ("empty", "BadRequestError", 400, None, "input", "Input 0 is an empty string"),
        ("foreignId", "BadRequestError", 400, None, "input", "check_embedding_ctx_length=False"),
    ],
)
def test_node_errors(
    node: dict[str, Any], which: str, name: str, status: int, code: str | None, param: str | None, said: str
) -> None:
    error = node["failures"][which]
    assert (error["name"], error["status"], error["code"], error["param"]) == (name, status, code, param)
    assert error["type"] == "invalid_request_error" and error["requestID"]
    assert said in error["message"]


# openai (Python) of the newest release, in a folder of its own: the other clients hold it below 3

NEWEST = "openai==3.54.0"


def test_the_newest_openai(keeper: Keeper, alone: Alone, pytestconfig: pytest.Config) -> None:
    folder = Path(str(pytestconfig.rootpath), ".pytest_cache", NEWEST.replace("==", "-"))
    if not (folder / "openai").is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), NEWEST]
        try:
            subprocess.run(install, capture_output=True, text=True, timeout=300, check=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            shutil.rmtree(folder, ignore_errors=True)
            pytest.skip(f"pip could not install {NEWEST}: {str(error.stderr)[-500:]}")
    asked = {"url": keeper.get().url, "model": MODEL, "texts": TEXTS}
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("newest_openai.py"))],
        env=os.environ | {"PYTHONPATH": str(folder)},
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    answers = json.loads(ran.stdout)
    assert answers["version"] == NEWEST.partition("==")[2]
    alone.assert_equal(answers["vectors"])
    alone.assert_equal(answers["async"])
    assert answers["tokens"] == sum(alone.tokens)
    assert answers["models"] == [MODEL] and answers["retrieved"] == MODEL
    assert answers["refused"] == "model_not_found"
