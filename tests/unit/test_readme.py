"""What the README says of the code is made from the code."""

from pathlib import Path

import serve_app
from serve_app.settings import ModelSettings, Settings, table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_settings_tables_are_the_codes_own() -> None:
    shown = README.partition("<!-- settings -->")[2].partition("<!-- /settings -->")[0].strip()
    assert shown == f"{table(Settings)}\n\nOf each model:\n\n{table(ModelSettings)}"


def test_the_file_map_names_every_file() -> None:
    package = Path(serve_app.__file__).parent
    for file in (*package.glob("*.py"), *package.glob("*.yaml")):
        assert file.name == "__init__.py" or f"`serve_app/{file.name}`" in README
    for file in (package / "engines").glob("*.py"):
        assert file.name == "__init__.py" or f"`{file.name}`" in README


def test_it_opens_with_the_two_commands() -> None:
    commands = README.partition("```sh\n")[2].partition("```")[0].splitlines()
    assert [line.split("#")[0].strip() for line in commands] == ["make serve", "make test"]
