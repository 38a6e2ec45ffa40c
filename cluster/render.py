"""`python -m cluster.render`: lay overlay.yaml over serve_config.yaml, and write what a cluster is given.

That is cluster/serve_config.yaml, for `serve deploy`, and the same text as `serveConfigV2` of the RayService.
"""

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
SERVE_CONFIG = FOLDER / "serve_config.yaml"
RAY_SERVICE = FOLDER / "kuberay" / "rayservice.yaml"
HEADER = "# Made by `python -m cluster.render` from serve_config.yaml and cluster/overlay.yaml: change those.\n"
# The RayService's last key: all that follows is written here.
KEY = "  serveConfigV2: |\n"


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # the anchors of serve_config.yaml spare its readers repetition; here each part stands by itself


def overlay(base: Any, change: Any) -> Any:
    """`change` laid over `base`; raises ValueError where it names an entry of a list that `base` has not.

    >>> overlay({"port": 1, "models": [{"id": "a", "tokens": 1}]}, {"models": [{"id": "a", "tokens": 2}]})
    {'port': 1, 'models': [{'id': 'a', 'tokens': 2}]}
    """
    if isinstance(base, dict) and isinstance(change, dict):
        return base | {key: overlay(base.get(key), value) for key, value in change.items()}
    if isinstance(base, list) and isinstance(change, list) and (changes := {_name(entry): entry for entry in change}):
        if None in changes:
            return change
        if unknown := changes.keys() - {_name(entry) for entry in base}:
            raise ValueError(f"nothing of serve_config.yaml is called {', '.join(sorted(map(str, unknown)))}")
        return [overlay(entry, changes.get(_name(entry), {})) for entry in base]
    return change


def _name(entry: Any) -> str | None:
    return entry.get("name", entry.get("id")) if isinstance(entry, dict) else None


def render() -> dict[Path, str]:
    """Every file that is made, and its text."""
    base = yaml.safe_load((FOLDER.parent / "serve_config.yaml").read_text())
    merged = overlay(base, yaml.safe_load((FOLDER / "overlay.yaml").read_text()))
    # A key that begins with `x-` holds what others refer to, as in Compose files.
    config = {key: value for key, value in merged.items() if not key.startswith("x-")}
    text = HEADER + yaml.dump(config, Dumper=_Dumper, sort_keys=False, width=120)
    head, _ = RAY_SERVICE.read_text().split(KEY)
    indented = "".join(f"    {line}\n" for line in text.splitlines())
    return {SERVE_CONFIG: text, RAY_SERVICE: head + KEY + indented}


if __name__ == "__main__":
    for path, text in render().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(FOLDER.parent)}")
