"""Modules and names that only POSIX systems have are imported or looked up with an alternative beside them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {"resource", "fcntl", "grp", "pwd", "pty", "termios", "tty", "syslog", "readline"}
NAMES = {
    "os": {
        "fork",
        "getuid",
        "geteuid",
        "getgid",
        "killpg",
        "getpgid",
        "setsid",
        "uname",
        "getloadavg",
        "mkfifo",
        "nice",
    }
    | {"sched_getaffinity", "sched_setaffinity", "chown", "statvfs", "sysconf", "wait", "O_DIRECT", "O_NOFOLLOW"},
    "signal": {"SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGCHLD", "alarm", "setitimer", "pause"},
    "time": {"tzset", "clock_gettime"},
}


def only_posix(source: str) -> list[str]:
    """Lines that fail outside of POSIX: not those in a `try`, nor behind `hasattr` of the same name."""
    tree = ast.parse(source)
    guarded: set[ast.AST] = set()
    for node in ast.walk(tree):
        # What stands in a `try` that takes an ImportError or AttributeError, or in `A if hasattr(...) else B`.
        if isinstance(node, ast.Try) and any("Error" in ast.unparse(each.type or node) for each in node.handlers):
            guarded |= {inner for line in node.body for inner in ast.walk(line)}
        elif (isinstance(node, ast.With) and any("suppress(" in ast.unparse(item) for item in node.items)) or (
            isinstance(node, ast.If | ast.IfExp) and "hasattr(" in ast.unparse(node.test)
        ):
            guarded |= set(ast.walk(node))
    found = []
    for node in ast.walk(tree):
        if node in guarded:
            continue
        names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            names = {node.module}
        if names & MODULES:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.attr in NAMES.get(node.value.id, ())
        ):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import resource", ["line 1: import resource"]),
        ("import os\nos.getuid()", ["line 2: os.getuid"]),
        ("try:\n    import fcntl\nexcept ImportError:\n    fcntl = None", []),
        ("import os\nuser = os.getuid() if hasattr(os, 'getuid') else 0", []),
        ("import signal\nsignal.SIGTERM", []),
    ],
)
def test_what_only_posix_has_is_found(source, expected):
    assert only_posix(source) == expected


def test_the_package_imports_nothing_that_only_posix_has():
    files = [path for package in ("align", "reward") for path in (ROOT / package).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): only_posix(path.read_text(encoding="utf-8")) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}
