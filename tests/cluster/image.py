"""Builds a Dockerfile without Docker: the same commands in folders that each begin as a bare Debian.

What it knows is what cluster/Dockerfile uses: FROM, ARG, ENV, WORKDIR, COPY, RUN, USER. Needs root and Debian's
debootstrap. The base image, python:3.11-slim-bookworm, is stood in for by the same Debian with this machine's Python.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from dockerfile_parse import DockerfileParser
from pathspec import PathSpec

RELEASE = "bookworm"
# Of the libraries that Python's own modules load, those that the base image has too.
LIBRARIES = "ca-certificates,libbz2-1.0,libffi8,libsqlite3-0,libssl3,zlib1g"


def bare_python(root: Path) -> None:
    """Fill `root` with Debian and, under /usr/local, with this Python and pip, as the base image has them."""
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={LIBRARIES}", RELEASE, str(root)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    # The certificates and the resolver of this machine, as Docker gives a build those of its host.
    for name in ("/etc/ssl/certs/ca-certificates.crt", "/etc/resolv.conf", "/etc/hosts"):
        shutil.copy(name, root / name.lstrip("/"))
    here, there = Path(sys.base_prefix), root / "usr" / "local"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(here / "bin" / version, there / "bin")
    skipped = shutil.ignore_patterns("site-packages", "test", "__pycache__")
    shutil.copytree(here / "lib" / version, there / "lib" / version, ignore=skipped)
    for library in (here / "lib").glob("libpython3*.so*"):
        shutil.copy(library, there / "lib")
    (there / "bin" / "python").symlink_to(version)
    run_in(root, f"ldconfig && {version} -m ensurepip --default-pip", {})


def run_in(
    root: Path, command: str, environment: Mapping[str, str], folder: str = "/", user: str = "0", timeout_s: float = 600
) -> str:
    """What a shell command prints inside `root`; raises CalledProcessError, with its output, if it fails."""
    shell = [
        *("unshare", "--mount", "--pid", "--fork", "--kill-child", f"--root={root}", "--mount-proc"),
        *(f"--wd={folder}", f"--setuid={user}", f"--setgid={user}", "/bin/sh", "-c", command),
    ]
    done = subprocess.run(
        shell,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout_s,
    )
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout)
    return done.stdout


class Image:
    """One stage as it is being built."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment: dict[str, str] = {}
        self.arguments: dict[str, str] = {}  # of this stage alone
        self.folder = "/"
        self.user = "0"

    def run(self, command: str) -> str:
        """What a container of this image prints for a command."""
        return run_in(self.root, command, self.environment, self.folder, self.user)

    def path(self, name: str) -> Path:
        """Where a path of the image is on this machine."""
        return self.root / os.path.join(self.folder, name).lstrip("/")


def context_spec(ignore_file: Path) -> PathSpec:
    """Matches the paths of a build context that .dockerignore keeps from it."""
    return PathSpec.from_lines("gitignore", ignore_file.read_text().splitlines())


def build(dockerfile: Path, context: Path, base: Path, work: Path, arguments: Mapping[str, str]) -> Image:
    """Run every instruction; the last stage. `base` is a filled root, `work` an empty folder for the stages."""
    stages: dict[str, Image] = {}
    image = Image(base)
    ignored = context_spec(context / ".dockerignore")
    for step in DockerfileParser(str(dockerfile)).structure:
        value = step["value"]
        match step["instruction"]:
            case "FROM":
                source, _, name = value.partition(" AS ")
                image = Image(work / (name or "final"))
                copy(stages[source].root if source in stages else base, image.root)
                if source in stages:
                    image.environment |= stages[source].environment
                    image.folder = stages[source].folder
                stages[name] = image
            case "ARG":
                name, _, default = value.partition("=")
                image.arguments[name] = arguments.get(name, default)
            case "ENV":
                image.environment |= dict(pair.split("=", 1) for pair in shlex.split(value))
            case "WORKDIR":
                image.folder = value
                image.path(".").mkdir(parents=True, exist_ok=True)
            case "USER":
                image.user = value
            case "RUN":
                # Pip's settings of this machine; a user's build has them from build arguments or pip.conf.
                pip = {name: text for name, text in os.environ.items() if name.startswith("PIP_")}
                run_in(image.root, value, pip | image.environment | image.arguments, image.folder, image.user)
            case "COPY":
                flags = [word for word in shlex.split(value) if word.startswith("--from=")]
                *sources, target = [word for word in shlex.split(value) if not word.startswith("--")]
                origin = stages[flags[0].removeprefix("--from=")].root if flags else context
                for source in sources:
                    into = image.path(target) / (Path(source).name if target.endswith("/") else "")
                    copy(origin / source.lstrip("/"), into, None if flags else (context, ignored))
            case "COMMENT":
                pass
            case other:
                raise ValueError(f"{dockerfile}: can't do {other}: {json.dumps(step['content'])}")
    return image


def copy(source: Path, target: Path, only: tuple[Path, PathSpec] | None = None) -> None:
    """A file into a file or folder, a folder's content into a folder; of a context, what it lets through."""
    if source.is_dir() and only is None:
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "--archive", "--reflink=auto", f"{source}/.", str(target)], check=True)
        return
    for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
        if only is not None and only[1].match_file(file.relative_to(only[0])):
            if file == source:
                raise FileNotFoundError(f".dockerignore keeps {file} from the build")
            continue
        if file.is_file():
            place = target / file.relative_to(source) if source.is_dir() else target
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
