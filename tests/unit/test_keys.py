"""The keys file: what is stored, what is refused, and changes that count at once."""

import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.errors import Unauthenticated
from serve_app.keys import Keys, add


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.txt"


def test_the_command_prints_a_key_once_and_stores_only_its_hash(file: Path) -> None:
    command = [sys.executable, "-m", "serve_app.keys", "new", "team-a", "--file", str(file)]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    key = made.stdout.strip()
    assert key.startswith("sk-") and len(key) > 40
    assert key not in file.read_text() and key not in made.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    assert Keys(file).name_of(key) == "team-a"
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "already holds a key named 'team-a'" in again.stderr


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "a\nb"])
def test_a_name_of_another_form_is_refused(file: Path, name: str) -> None:
    with pytest.raises(ValueError, match="a key's name has 1 to 64"):
        add(file, name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense\n", "line 1: expected 'NAME sha256:"),
        ("# made by hand\n\na sha256:12\n", "line 3: expected"),
        (f"a sha256:{'0' * 64}\na sha256:{'1' * 64}\n", "line 2: a second key named 'a'"),
    ],
)
def test_a_file_of_another_form_is_refused_at_the_start(file: Path, content: str, message: str) -> None:
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        Keys(file)


def test_a_missing_file_is_refused_at_the_start(file: Path) -> None:
    with pytest.raises(ValueError, match="can't be read"):
        Keys(file)


def test_keys_come_and_go_without_a_restart(file: Path) -> None:
    first = add(file, "first")
    keys = Keys(file)
    file.write_text(file.read_text().rstrip("\n"))  # an editor that ends a file without a line end
    second = add(file, "second")
    assert (keys.name_of(first), keys.name_of(second)) == ("first", "second")
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("first ")))
    with pytest.raises(Unauthenticated):
        keys.name_of(first)
    assert keys.name_of(second) == "second"


def test_a_file_that_is_spoiled_while_running_changes_nothing_and_is_said_once(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = add(file, "first")
    keys = Keys(file)
    file.write_text("nonsense\n")
    assert [keys.name_of(key) for _ in range(3)] == ["first"] * 3
    assert caplog.text.count("the keys read before stay in force") == 1
    file.write_text("")
    with pytest.raises(Unauthenticated):
        keys.name_of(key)


@pytest.mark.parametrize(("key", "was_sent"), [(None, False), ("", False), ("sk-wrong", True), ("\ud800", True)])
def test_a_missing_and_a_wrong_key_are_told_apart(file: Path, key: str | None, was_sent: bool) -> None:
    add(file, "first")
    with pytest.raises(Unauthenticated) as refused:
        Keys(file).name_of(key)
    assert refused.value.key_was_sent is was_sent


@pytest.mark.parametrize("mode", [0o622, 0o620, 0o602])
def test_a_file_that_others_may_write_is_refused(file: Path, mode: int) -> None:
    add(file, "me")
    file.chmod(mode)
    with pytest.raises(ValueError, match=r"can be written by others, .*chmod go-w"):
        Keys(file)
    file.chmod(0o644)
    Keys(file)
