"""A plain Ray Serve graph, as Ray's documentation teaches it: what the service is measured against within Ray.

FastAPI in front, a tokenizer and a model behind it, `@serve.batch` with its usual numbers, torch by `transformers`.
Nothing is done here to slow it down: lists are sorted by length and computed in batches, as sentence-transformers does.
"""

import base64
from typing import Any, Literal

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle
from transformers import AutoModel, AutoTokenizer

BATCH = 32

app = FastAPI()


class EmbeddingRequest(BaseModel):
    """OpenAI's request, as far as this knows it."""

    model: str
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"


class Embedding(BaseModel):
    """One vector of the answer."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens that were computed."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """OpenAI's answer."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


@serve.deployment
class Tokenizer:
    """Text to token ids."""

    def __init__(self, folder: str, max_tokens: int) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._max_tokens = max_tokens

    async def tokenize(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts, truncation=True, max_length=self._max_tokens)["input_ids"]
        return ids


@serve.deployment
class Model:
    """Token ids to vectors: BERT, the mean over the tokens, length 1."""

    def __init__(self, folder: str) -> None:
        self._model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.01)
    async def embed(self, requests: list[list[list[int]]]) -> list[Any]:
        rows = [row for request in requests for row in request]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        vectors = torch.empty(len(rows), self._model.config.hidden_size)
        for start in range(0, len(rows), BATCH):
            chosen = order[start : start + BATCH]
            vectors[chosen] = self._embed([rows[index] for index in chosen])
        return [part.numpy() for part in vectors.split([len(request) for request in requests])]

    @torch.no_grad()
    def _embed(self, rows: list[list[int]]) -> torch.Tensor:
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = (states * mask[:, :, None]).sum(1) / lengths[:, None]
        return torch.nn.functional.normalize(pooled, dim=1)


@serve.deployment
@serve.ingress(app)
class Ingress:
    """OpenAI's embeddings over HTTP."""

    def __init__(self, tokenizer: DeploymentHandle, model: DeploymentHandle) -> None:
        self._tokenizer = tokenizer
        self._model = model

    @app.post("/v1/embeddings")
    async def embeddings(self, request: EmbeddingRequest) -> EmbeddingResponse:
        texts = [request.input] if isinstance(request.input, str) else request.input
        ids = await self._tokenizer.tokenize.remote(texts)
        vectors = await self._model.embed.remote(ids)
        used = sum(map(len, ids))
        if request.encoding_format == "base64":
            shown = [base64.b64encode(vector.tobytes()).decode() for vector in vectors]
        else:
            shown = vectors.tolist()
        return EmbeddingResponse(
            data=[Embedding(index=index, embedding=vector) for index, vector in enumerate(shown)],
            model=request.model,
            usage=Usage(prompt_tokens=used, total_tokens=used),
        )


def build(args: dict[str, Any]) -> serve.Application:
    """The application that plain_serve.yaml names; `args`: the model's folder and its longest text in tokens."""
    tokenizer = Tokenizer.bind(args["folder"], args["max_tokens"])
    return Ingress.bind(tokenizer, Model.bind(args["folder"]))
