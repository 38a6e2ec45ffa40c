"""Which replicas to keep to while a rollout mixes them."""

from dataclasses import replace

import pytest

from serve_app.discovery import choose
from tests.hand import served


@pytest.mark.parametrize(
    ("replicas", "current", "chosen"),
    [
        ("", "old", ""),
        ("o", "", "o"),
        ("ooo n", "o", "o"),
        ("oo nn", "o", "o"),
        ("oo nn", "n", "n"),
        ("o nnn", "o", "n"),
        ("nnnn", "o", "n"),
    ],
)
def test_calls_go_to_the_weights_that_most_replicas_have_and_change_no_sooner_than_needed(
    replicas: str, current: str, chosen: str
) -> None:
    models = [replace(served(), weights=weights) for weights in replicas.replace(" ", "")]
    assert choose(models, current) == chosen
