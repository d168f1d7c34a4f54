"""Every `align` command written in the README, in docs/ and in scripts/ is one that the command line understands."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from align.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "scripts").glob("*.s*"))]
SHELL_END = re.compile(r"\s+(?:#|\||&&|;|>|<|->|\\$).*| {2,}.*")


def commands(page):
    """The `align ...` lines of a page's code (indented or fenced blocks, and inline code with an option or argument)."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^(?: {4,}|\$ |srun |exec )?(align [a-z].*)$", text, flags=re.MULTILINE)
    found += [inline for inline in re.findall(r"`(align [a-z][^`\n]*)`", text) if "..." not in inline]
    return [SHELL_END.sub("", line.strip()) for line in found]


CASES = [(page.name, command) for page in PAGES for command in dict.fromkeys(commands(page))]


def test_the_readme_shows_the_main_way():
    shown = {command.split()[1] for name, command in CASES if name == "README.md"}
    assert {"sample", "score", "dpo", "run", "init", "report", "evaluate"} <= shown


@pytest.mark.parametrize(("page", "command"), CASES, ids=[f"{page}:{command}" for page, command in CASES])
def test_a_written_command_is_understood(page, command):
    name, *arguments = shlex.split(command)[1:]
    group = typer.main.get_command(app)
    assert name in group.commands, f"{page}: there is no command align {name}"
    arguments = [re.sub(r"^(N|\$\{?\w+\}?)$", "1", argument) for argument in arguments]
    if "..." not in arguments:
        assert fault_of(group.commands[name], name, arguments) is None


def fault_of(subcommand, name, arguments):
    """What the command line has against it; a command that is only named, without its arguments, is no fault."""
    try:
        subcommand.make_context(name, arguments)
    except Exception as error:
        return None if type(error).__name__ == "MissingParameter" else error
    return None


def test_an_unknown_option_would_be_found():
    assert fault_of(typer.main.get_command(app).commands["sample"], "sample", ["--no-such-option"]) is not None
