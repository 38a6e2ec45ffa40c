"""The documents of cluster/, and `check`, which holds one against the schema of its kind, unknown names included."""

import json
import warnings
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import kubernetes_validate
import pytest
import ray.autoscaler
import yaml
from botocore.validate import ParamValidator
from cloudcoil.models.prometheus_operator.v1 import PodMonitor
from pydantic import BaseModel, ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from serve_app.settings import Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of pydantic's, on import
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import ServeDeploySchema

Document = dict[str, Any]

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
# KubeRay's own definitions lie beside the repository where it is developed; they are not part of it.
DEFINITIONS = ROOT.parent / "shared" / "crds"
KUBERNETES = "1.32"


class Refused(Exception):
    """A document does not fit its schema; the message says where."""


def load(file: str) -> list[Document]:
    """The documents of a file under cluster/."""
    return [deepcopy(document) for document in _load(CLUSTER / file)]


@cache
def _load(path: Path) -> list[Document]:
    return list(yaml.load_all(path.read_text(), yaml.CSafeLoader))


def find(file: str, kind: str, name: str) -> Document:
    """One of Kubernetes' documents."""
    [found] = [each for each in load(file) if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def check(document: Document) -> None:
    """Raises Refused where the document does not fit."""
    try:
        match document.get("kind"):
            case "RayService":
                _check_defined(document, "ray.io_rayservices.yaml")
                check(yaml.safe_load(document["spec"]["serveConfigV2"]))
            case "PodMonitor":
                _check_model(document, PodMonitor)
            case str():
                kubernetes_validate.validate(document, KUBERNETES, strict=True)
            case None if "applications" in document:
                _check_model(document, ServeDeploySchema)
                for application in document["applications"]:
                    Settings.model_validate(application["args"])
                    for deployment in application["deployments"]:
                        # Which Serve reads into this only when it starts the deployment.
                        _check_model(deployment["autoscaling_config"], AutoscalingConfig)
            case _:
                _check_launchable(document)
    except (jsonschema.ValidationError, ValidationError, ValueError, KeyError) as error:
        raise Refused(str(error)) from error
    except kubernetes_validate.SchemaNotFoundError as error:
        raise Refused(error.message) from error


def _check_model(document: Document, model: type[BaseModel]) -> None:
    """Pydantic's models drop what they don't know; here it is an error."""
    parsed = model.model_validate(document).model_dump(mode="json", by_alias=True, exclude_unset=True)
    if lost := sorted(set(_paths(document)) - set(_paths(parsed))):
        raise ValueError(f"{lost[0]} is not known")


def _paths(value: Any, path: str = "") -> Iterator[str]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in entries:
        yield f"{path}.{key}"
        yield from _paths(below, f"{path}.{key}")


def _check_launchable(document: Document) -> None:
    """A file for `ray up`: before Ray's defaults are filled in, and after; and what it asks of EC2."""
    jsonschema.validate(document, json.loads((Path(ray.autoscaler.__file__).with_name("ray-schema.json")).read_text()))
    validate_config(prepare_config(document))
    if document["provider"]["type"] == "aws":
        operation = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
        for each in document["available_node_types"].values():
            count = {"MinCount": 1, "MaxCount": 1}
            errors = ParamValidator().validate(each["node_config"] | count, operation.input_shape)
            if errors.has_errors():
                raise ValueError(errors.generate_report())


def _check_defined(document: Document, definition: str) -> None:
    if not DEFINITIONS.is_dir():
        pytest.skip(f"{DEFINITIONS}, with KubeRay's definitions, is not there")
    group, validators = _definition(definition)
    if document.get("apiVersion") not in validators:
        raise ValueError(f"apiVersion {document.get('apiVersion')} is not of {group}")
    validators[document["apiVersion"]].validate(document)


@cache
def _definition(name: str) -> tuple[str, dict[str, jsonschema.Draft7Validator]]:
    """The group that a CustomResourceDefinition belongs to, and what validates each apiVersion of it."""
    [definition] = _load(DEFINITIONS / name)
    spec = definition["spec"]
    validators = {}
    for version in spec["versions"]:
        schema = _closed(version["schema"]["openAPIV3Schema"])
        validators[f"{spec['group']}/{version['name']}"] = jsonschema.Draft7Validator(schema)
    return spec["group"], validators


def _closed(schema: Any) -> Any:
    """A structural schema as kubectl takes it, to which a field that it does not name is an error."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and not closed.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed
