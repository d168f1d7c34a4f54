"""A file of another trainer in, its keys and values out: YAML or JSON, or a script with a command.

Of a script every `--option` counts, and the variables in capitals before a command. Variables that the script sets
itself are put in, also within ``$(( ))`` and ``$(expr )``; nothing of it is ever run.
"""

from __future__ import annotations

import ast
import operator
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.strict_yaml import BAD_YAML, parse_yaml, yaml_problem

_SET = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
_SUMS = re.compile(r"\$\(\(([^()]*(?:\([^()]*\)[^()]*)*)\)\)|\$\(\s*expr ([^()]*)\)")
_OTHERS = re.compile(r"\$\([^()]*\)")
# What a shell alone works out; a `$` at the end belongs to a pattern.
_LEFT = re.compile(r"\$[\w{(]")
# Pipes, redirections and the ends of commands.
_ENDS = re.compile(r"\|\|?|&&?|;|\d?>.*|<.*")
# Options that take several words.
SEVERAL = {
    "dataset", "val_dataset", "target_modules", "modules_to_save", "lora_target_modules", "lora_modules_to_save",
    "lora_target_parameters", "target_parameters", "loss_type", "loss_weights", "report_to",
}  # fmt: skip
# A remark begins with a word of its own: `name#20000` is a name.
_REMARK = re.compile(r"(?:^|\s)#.*")
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+))")
_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv,
}


def read_settings(path: Path) -> dict[str, Any]:
    """The keys of a file and their values, as YAML understands them.

    Raises:
        UserError: the file cannot be read, holds no keys, or uses a variable that it does not set.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(path)) from None
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text", where=str(path), fix="save it as UTF-8") from None
    try:
        found = (
            parse_yaml(text)
            if path.suffix.lower() in (".yaml", ".yml", ".json")
            else settings_of_script(text, str(path))
        )
    except BAD_YAML as error:
        problem = yaml_problem(error)
        raise UserError(f"cannot be understood: {problem}", where=str(path)) from None
    if not isinstance(found, dict) or not found:
        raise UserError("holds no keys and values", where=str(path), fix="name a YAML file or a script with a command")
    return {str(key): value for key, value in found.items()}


def settings_of_script(text: str, where: str = "the script") -> dict[str, Any]:
    """The options of the commands in a script, and the variables in capitals.

    Raises:
        UserError: an option or a variable has two values, as with two commands; or a value uses a variable that the
            script does not set, or something else that only a shell works out.

    >>> settings_of_script("n=2\\nMAX_PIXELS=9 swift rlhf --lr 1e-4 --steps $(expr 16 / $n) --bf16  # a remark")
    {'MAX_PIXELS': 9, 'lr': 0.0001, 'steps': 8, 'bf16': True}
    """
    variables: dict[str, str] = {}
    found: dict[str, list[list[str]]] = {}
    for line in text.replace("\\\n", " ").splitlines():
        option: str | None = None
        line = _SUMS.sub(_as_sum, _REMARK.sub("", line))
        for word in shlex.split(_OTHERS.sub(lambda each: re.sub(r"\s", "", each[0]), line)):
            setting = _SET.fullmatch(word)
            if word.startswith("--") and len(word) > 2:
                name, _, value = word[2:].partition("=")
                option = name.replace("-", "_")
                found.setdefault(option, []).append([value] if value else [])
            elif _ENDS.fullmatch(word):
                option = None
            elif option is not None:
                found[option][-1].append(word)
                option = option if option in SEVERAL else None
            elif setting is not None:
                variables[setting[1]] = setting[2]
                if setting[1].isupper():
                    found.setdefault(setting[1], []).append([setting[2]])
    settings: dict[str, Any] = {}
    for name, each in found.items():
        values = [_value([parse_yaml(_filled(word, variables, where)) for word in words]) for words in each]
        if any(value != values[0] for value in values):
            said = " and ".join(map(str, values))
            raise UserError(f"{name} is given more than once: {said}", where=where, fix="keep one command in the file")
        settings[name] = values[0]
    return settings


def _value(words: list[Any]) -> Any:
    return True if not words else words[0] if len(words) == 1 else words


def _as_sum(match: re.Match[str]) -> str:
    return "$((" + re.sub(r"\s", "", match[1] or match[2]) + "))"


def _filled(text: str, variables: dict[str, str], where: str) -> str:
    """The text with the values of variables in their places, and of sums."""

    def value_of(match: re.Match[str]) -> str:
        name, otherwise = match[1] or match[3], match[2]
        if name in variables:
            return _filled(variables[name], {**variables, name: ""}, where)
        if otherwise is None:
            raise UserError(f"${name} is not set in the script", where=where, fix="write its value in its place")
        return otherwise

    def sum_of(match: re.Match[str]) -> str:
        words = _VARIABLE.sub(value_of, match[1])
        words = re.sub(r"(?<![\w$])([A-Za-z_]\w*)", lambda each: variables.get(each[1], each[1]), words)
        try:
            return str(_sum(ast.parse(words, mode="eval").body))
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
            return match[0]

    done = _VARIABLE.sub(value_of, _SUMS.sub(sum_of, text))
    if _LEFT.search(done):
        raise UserError(f"only a shell works out {done}", where=where, fix="write the value in its place")
    return done


def _sum(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_sum(node.left), _sum(node.right))
    raise ValueError("no sum")
