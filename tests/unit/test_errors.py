"""Errors keep their type and message between processes, and each has a status."""

import pickle
from collections.abc import Iterator

import pytest

from serve_app import errors
from serve_app.errors import (
    EmbeddingError,
    EngineBroken,
    EngineError,
    InvalidInput,
    Overloaded,
    TooManyTokens,
    Unauthenticated,
    WeightsError,
)
from serve_app.http import ERRORS


def every_class(base: type[EmbeddingError] = EmbeddingError) -> Iterator[type[EmbeddingError]]:
    yield base
    for child in base.__subclasses__():
        yield from every_class(child)


def example(kind: type[EmbeddingError]) -> EmbeddingError:
    extra: dict[type[EmbeddingError], tuple[object, ...]] = {
        InvalidInput: ("input",),
        Unauthenticated: (True,),
        Overloaded: (2.5,),
    }
    if kind is TooManyTokens:  # which makes its own message
        return TooManyTokens(30, 29)
    return kind("what went wrong", *extra.get(kind, ()))


@pytest.mark.parametrize("kind", list(every_class()))
def test_every_error_survives_pickling_with_type_message_and_fields(kind: type[EmbeddingError]) -> None:
    error = example(kind)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    said = "Requested 30 tokens, max 29 tokens per request" if kind is TooManyTokens else "what went wrong"
    assert str(copy) == said
    assert vars(copy) == vars(error)


@pytest.mark.parametrize("kind", list(every_class()))
def test_every_error_is_drawn_in_the_tree_and_has_a_status_of_its_own_unless_it_is_internal(
    kind: type[EmbeddingError],
) -> None:
    assert errors.__doc__ is not None
    assert kind.__name__ in errors.__doc__
    assert (kind in ERRORS) != (kind in {EngineError, EngineBroken, WeightsError})
