"""API keys: a file of names and hashes, and the check of a request's key against it.

`python -m serve_app.keys new NAME` prints a key once and stores only its SHA-256. The keys are 32 random bytes, so a
plain hash is enough: there is nothing to guess, and the file is of no use to who reads it.
"""

import argparse
import hashlib
import hmac
import logging
import os
import re
import secrets
import sys
from pathlib import Path

from serve_app.errors import Unauthenticated

logger = logging.getLogger("ray.serve")

LINE = re.compile(r"(?P<name>[A-Za-z0-9._@-]{1,64}) sha256:(?P<digest>[0-9a-f]{64})")


class Keys:
    """The keys of one file; read again whenever the file changes, so that adding or revoking needs no restart."""

    def __init__(self, file: Path) -> None:
        """Raises ValueError, with the line's number, if the file can't be read or has a line of another form."""
        self._file = file
        self._stamp = _stamp(file)
        self._digests = read(file)

    def name_of(self, key: str | None) -> str:
        """The name a key was given out under; raises Unauthenticated."""
        if not key:
            raise Unauthenticated(
                "You didn't provide an API key. Send it in an Authorization header using Bearer auth "
                "(i.e. Authorization: Bearer YOUR_KEY).",
                key_was_sent=False,
            )
        self._refresh()
        sent = _digest(key)
        # Every stored digest is compared, each in constant time: the time says nothing of the file.
        names = [name for name, digest in self._digests.items() if hmac.compare_digest(digest, sent)]
        if not names:
            logger.warning(f"refused a key whose SHA-256 begins with {sent.hex()[:12]}")  # says nothing of the key
            raise Unauthenticated("Incorrect API key provided.", key_was_sent=True)
        return names[0]

    def _refresh(self) -> None:
        stamp = _stamp(self._file)
        if stamp == self._stamp:
            return
        self._stamp = stamp  # also where reading fails, so that one fault is one line in the log
        try:
            self._digests = read(self._file)
        except ValueError as error:
            logger.error(f"{error}; the keys read before stay in force")


def _stamp(file: Path) -> tuple[int, int, int]:
    """What changes when a file does; zeros while there is none."""
    try:
        status = file.stat()
    except OSError:
        return (0, 0, 0)
    return (status.st_mtime_ns, status.st_ino, status.st_size)


def read(file: Path) -> dict[str, bytes]:
    """Name -> digest of every key in the file; raises ValueError naming the line that is not `NAME sha256:HEX`, or if
    others may write the file."""
    try:
        if file.stat().st_mode & 0o022:
            raise ValueError(f"keys file {file} can be written by others, who could add keys: `chmod go-w` it")
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"keys file {file} can't be read: {error}") from None
    digests: dict[str, bytes] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.startswith("#"):
            found = LINE.fullmatch(line.strip())
            if found is None:
                raise ValueError(f"keys file {file}, line {number}: expected 'NAME sha256:<64 hex digits>'")
            if found["name"] in digests:
                raise ValueError(f"keys file {file}, line {number}: a second key named {found['name']!r}")
            digests[found["name"]] = bytes.fromhex(found["digest"])
    return digests


def add(file: Path, name: str) -> str:
    """Make a key, append its hash to the file (made readable by its owner alone), and return the key."""
    key = f"sk-{secrets.token_urlsafe(32)}"
    line = f"{name} sha256:{_digest(key).hex()}\n"
    if LINE.fullmatch(line.strip()) is None:
        raise ValueError(f"a key's name has 1 to 64 letters, digits or . _ @ -; {name!r} does not")
    if file.exists() and name in read(file):
        raise ValueError(f"{file} already holds a key named {name!r}; take another name, or delete its line first")
    with os.fdopen(os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "a+") as out:
        out.seek(0)
        written = out.read()
        out.write(line if not written or written.endswith("\n") else f"\n{line}")
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def main() -> None:
    """The command line: `new NAME [--file FILE]`."""
    parser = argparse.ArgumentParser(prog="python -m serve_app.keys", description="Make API keys.")
    commands = parser.add_subparsers(required=True)
    new = commands.add_parser("new", help="print a new key and store its hash")
    new.add_argument("name", help="whose key it is")
    new.add_argument("--file", type=Path, default=Path("keys.txt"), help="the keys file (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        key = add(arguments.file, arguments.name)
    except (OSError, ValueError) as error:
        sys.exit(f"keys: {error}")
    print(key)
    print(f"Shown this once; {arguments.file} holds only its hash. Name the file in `keys_file`.", file=sys.stderr)


if __name__ == "__main__":
    main()
