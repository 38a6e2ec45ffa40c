"""What sends the requests: plain HTTP, and OpenAI's own client. Each user has a connection of its own; neither client
tries a failed request again, which would hide the failure."""

import functools
import ssl
from collections.abc import Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
import openai
import orjson
from geventhttpclient.client import HTTPClient
from geventhttpclient.response import HTTPParseError
from openai.resources.embeddings import Embeddings  # at its first use it would take half a second of a user's time

from loadtest.traffic.checks import Answer, Fault, parse

CONNECT_TIMEOUT_S = 10.0
# Over the service's own limit (request_timeout_s, 60 s), so that its answer comes first.
ANSWER_TIMEOUT_S = 70.0
READ_BYTES = 65_536


class Client(Protocol):
    """Sends one request at a time."""

    def embed(self, model: str, texts: Sequence[str]) -> Answer:
        """The answer, unchecked; raises Fault where there is none."""

    def close(self) -> None:
        """Close the connection."""


class PlainClient:
    """HTTP with bodies as the benchmark's: one text is sent as such, several as a list."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        self._http = HTTPClient.from_url(
            url,
            headers=headers,
            block_size=READ_BYTES,
            connection_timeout=CONNECT_TIMEOUT_S,
            network_timeout=ANSWER_TIMEOUT_S,
        )
        self._path = urlsplit(url).path

    def embed(self, model: str, texts: Sequence[str]) -> Answer:
        sent = texts if len(texts) > 1 else texts[0]
        return parse(self._ask("POST", "embeddings", {"model": model, "input": sent, "encoding_format": "base64"}))

    def models(self) -> list[dict[str, Any]]:
        """What `/v1/models` lists; raises Fault."""
        try:
            return [{**each, "id": str(each["id"])} for each in orjson.loads(self._ask("GET", "models"))["data"]]
        except (ValueError, KeyError, TypeError):
            raise Fault("body", "not a list of models") from None

    def _ask(self, method: str, name: str, body: dict[str, Any] | None = None) -> bytes:
        try:
            answer = self._http.request(method, f"{self._path}/{name}", orjson.dumps(body) if body else b"")
            content = bytes(answer.read())
        except (OSError, HTTPParseError) as error:  # a timeout is an OSError
            raise Fault("connection", type(error).__name__) from None
        if answer.status_code != 200:
            raise Fault("status", str(answer.status_code))
        return content

    def close(self) -> None:
        self._http.close()


class OpenAIClient:
    """OpenAI's own client, with its defaults but for its retries.

    Its sockets wait as gevent's do, since Locust put those in the standard library's place before this was imported.
    """

    def __init__(self, url: str, key: str | None) -> None:
        http = openai.DefaultHttpxClient(verify=_tls())
        self._client = openai.OpenAI(
            base_url=url, api_key=key or "none", max_retries=0, timeout=ANSWER_TIMEOUT_S, http_client=http
        )
        self._embeddings: Embeddings = self._client.embeddings

    def embed(self, model: str, texts: Sequence[str]) -> Answer:
        try:
            answer = self._embeddings.create(model=model, input=list(texts))
            return Answer(
                [item.index for item in answer.data],
                [np.array(item.embedding, np.float32) for item in answer.data],
                answer.usage.prompt_tokens,
            )
        except openai.APIStatusError as error:
            raise Fault("status", str(error.status_code)) from None
        except openai.APIConnectionError as error:
            raise Fault("connection", type(error.__cause__ or error).__name__) from None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
            raise Fault("body", f"not an embeddings answer ({type(error).__name__})") from None

    def close(self) -> None:
        self._client.close()


@functools.cache
def _tls() -> ssl.SSLContext:
    """One for all users: to read the certificates takes longer than a request."""
    return ssl.create_default_context()
