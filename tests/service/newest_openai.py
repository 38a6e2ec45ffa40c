"""Run by test_clients.py with the newest official client on its path: asks what stdin says, prints the answers."""

import asyncio
import json
import sys

import openai

asked = json.load(sys.stdin)
options = {"base_url": f"{asked['url']}/v1", "api_key": "none"}


async def both_at_once() -> list[list[list[float]]]:
    async with openai.AsyncOpenAI(**options) as client:
        halves = (asked["texts"][:150], asked["texts"][150:])
        answers = await asyncio.gather(*(client.embeddings.create(model=asked["model"], input=half) for half in halves))
    return [[item.embedding for item in answer.data] for answer in answers]


with openai.OpenAI(**options) as client:
    answer = client.embeddings.create(model=asked["model"], input=asked["texts"])
    try:
        client.embeddings.create(model="none", input="x")
    except openai.NotFoundError as error:
        refused = error.code
    print(
        json.dumps(
            {
                "version": openai.__version__,
                "vectors": [item.embedding for item in answer.data],
                "tokens": answer.usage.prompt_tokens,
                "async": [vector for half in asyncio.run(both_at_once()) for vector in half],
                "models": [model.id for model in client.models.list()],
                "retrieved": client.models.retrieve(asked["model"]).id,
                "refused": refused,
            }
        )
    )
