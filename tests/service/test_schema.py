"""Schemathesis at the real service: what its OpenAPI document allows must be accepted, what it forbids refused.

All of its phases (the document's examples, every boundary of every field, random requests, and chains of them) and all
of its checks run. Those that have nothing to look at here pass by themselves: no header is required, nothing is created
or deleted, and the document names no security scheme, since keys are a setting.

It runs by Schemathesis' own engine: its pytest plugin (4.32) sets a private field that pytest 9.2 no longer has.
"""

from collections import Counter
from typing import Any

import httpx
import pytest
import schemathesis
from schemathesis import HookContext
from schemathesis.checks import CHECKS
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema

from tests.service.conftest import Service

pytestmark = pytest.mark.service

EXAMPLES_AN_OPERATION = 300
VOCABULARY = 30_522


@pytest.mark.parametrize(
    ("narrowed", "accepted"),
    [
        # As it is, the document can't say which names, dimensions and ids the model knows that happens to be loaded.
        (False, ["200", "400", "404"]),
        (True, ["200"]),
    ],
)
def test_the_service_is_as_its_document_says(service: Service, narrowed: bool, accepted: list[str]) -> None:
    document: dict[str, Any] = httpx.get(f"{service.url}/openapi.json").json()
    if narrowed:
        _narrow(document, httpx.get(f"{service.url}/v1/models").json()["data"][0])
    config = {
        "base-url": service.url,
        "continue-on-failure": True,
        "generation": {"max-examples": EXAMPLES_AN_OPERATION},
        "phases": {"stateful": {"generation": {"max-examples": 20}}},
        "checks": {
            "positive_data_acceptance": {"expected-statuses": accepted},
            "negative_data_rejection": {"expected-statuses": ["400", "404", "405", "415"]},
            "max_response_time": 30,
        },
    }
    schema = schemathesis.openapi.from_dict(document, config=SchemathesisConfig.from_dict(config))
    schema.hook("filter_body")(_without_whole_floats)

    sent, checked, faults = Counter[str](), Counter[str](), dict[str, str]()
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            faults[repr(event)] = ""
        if isinstance(event, events.ScenarioFinished):
            sent[event.recorder.label] += len(event.recorder.interactions)
            for check in (check for checks in event.recorder.checks.values() for check in checks):
                checked[check.name] += 1
                if (fault := check.failure_info) is not None:
                    what = f"{event.recorder.label}: {check.name}: {fault.failure.title}. {fault.failure.message}"
                    faults[what] = min(faults.get(what, fault.code_sample), fault.code_sample, key=len)
    assert not faults, "\n".join(f"{what}\n  {sample}" for what, sample in faults.items())
    assert set(checked) >= set(CHECKS.get_all_names())
    for path in ("POST /v1/embeddings", "GET /v1/models/{id}"):
        assert sent[path] > EXAMPLES_AN_OPERATION, sent
    assert set(sent) >= {"GET /v1/models", "GET /healthz", "GET /readyz", "Stateful tests"}


def _narrow(document: dict[str, Any], model: dict[str, Any]) -> None:
    """Write into the document what only the loaded model can tell."""
    schemas = document["components"]["schemas"]
    schemas["EmbeddingRequest"]["properties"]["model"] = {"enum": [model["id"]]}
    schemas["EmbeddingRequest"]["properties"]["dimensions"]["maximum"] = model["dimensions"]
    schemas["TokenIds"]["items"]["maximum"] = VOCABULARY - 1
    document["paths"]["/v1/models/{id}"]["get"]["parameters"][0]["schema"] = {"enum": [model["id"]]}


def _without_whole_floats(context: HookContext, value: Any) -> bool:
    """Leave out bodies with numbers such as 1.0: integers to JSON Schema, and on purpose none to the service."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return all(_without_whole_floats(context, item) for item in items)
    return not (isinstance(value, float) and value.is_integer())
