"""The shape of the house: imports go one way, and each heavy library lives in one file."""

import ast
from pathlib import Path

import pytest

import serve_app

PACKAGE = Path(serve_app.__file__).parent
# From the leaves up: a file may import only what stands before it.
ORDER = (
    "errors", "settings", "autoscale", "rate", "threads", "packing", "answers", "scheduler", "channel", "pool",
    "engines.bert", "engines", "engines.guard", "engines.openvino", "engines.torch", "engines.sleep", "words",
    "tokens", "weights", "pipeline", "catalog", "discovery", "stages", "wire", "keys", "scope", "bodies", "http",
    "leash", "haproxy", "controller", "replicas", "deployments", "session", "__main__",
)  # fmt: skip
HOMES = {
    "ray": {"controller", "deployments", "haproxy", "replicas"},
    "fastapi": {"http"},
    "torch": {"engines.torch"},
    "openvino": {"engines.openvino"},
    "tokenizers": {"tokens"},
    "huggingface_hub": {"weights"},
    "pydantic": {"settings", "__main__"},
}
# `engines` picks a backend and opens it there and then, so that the others are never loaded.
LATE = {("engines", "engines.openvino"), ("engines", "engines.torch"), ("engines", "engines.sleep")}


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py")) if module_name(file)}


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_every_file_has_its_place_in_the_order() -> None:
    assert set(FILES) == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_one_way(module: str) -> None:
    ours = {name.removeprefix("serve_app.") for name in imported(FILES[module]) if name.startswith("serve_app.")}
    upward = {name for name in ours & set(ORDER) if ORDER.index(name) >= ORDER.index(module)}
    assert {(module, name) for name in upward} <= LATE


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_lives_in_one_file(library: str) -> None:
    users = {module for module, file in FILES.items() if library in {name.split(".")[0] for name in imported(file)}}
    assert users == HOMES[library]


def test_the_file_of_the_builder_keeps_its_annotations_as_classes() -> None:
    """A future import there would silently turn off the validation of the application's args."""
    assert "from __future__" not in FILES["deployments"].read_text().replace("`from __future__", "")


@pytest.mark.parametrize("module", ORDER)
def test_no_file_is_longer_than_it_can_be_read(module: str) -> None:
    assert len(FILES[module].read_text().splitlines()) <= 300
