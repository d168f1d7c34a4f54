"""YAML text in, plain values out: nothing twice, nothing that stands for itself, numbers as they are meant."""

from __future__ import annotations

from typing import Any

import yaml

_Loader: Any = yaml.SafeLoader
if hasattr(yaml, "CSafeLoader"):

    class _Loader(yaml.composer.Composer, yaml.CSafeLoader):  # type: ignore[no-redef]
        """libyaml reads, in a tenth of the time; nodes are composed here, where aliases are seen."""

        def __init__(self, stream: str) -> None:
            yaml.CSafeLoader.__init__(self, stream)
            yaml.composer.Composer.__init__(self)


class _StrictLoader(_Loader):
    """Safe YAML that reads 5e-7 as the number it is meant to be.

    It refuses a key given twice, and an alias inside of an anchored value: with those a file of a few lines can stand
    for more than any memory holds, or for itself.
    """

    _anchored = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node of the document; raises ComposerError for an alias within an anchor."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if self._anchored:
                raise yaml.composer.ComposerError(
                    None,
                    None,
                    "an alias inside of an anchored value",
                    event.start_mark,  # type: ignore[arg-type]
                )
            return super().compose_node(parent, index)
        anchored = getattr(event, "anchor", None) is not None
        self._anchored += anchored
        try:
            return super().compose_node(parent, index)
        finally:
            self._anchored -= anchored

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Keys and values; raises ConstructorError for a key that is given twice or is no name."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                raise yaml.constructor.ConstructorError(None, None, "a key is no name", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is duplicated", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _add_float_resolver() -> None:
    import re

    # YAML 1.1 takes 5e-7 for text, since it has no dot: https://github.com/yaml/pyyaml/issues/173
    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    _StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))


_add_float_resolver()


# What PyYAML raises: of its own, for a date that is none (ValueError), for what is nested too deep.
BAD_YAML = (yaml.YAMLError, ValueError, RecursionError)


def parse_yaml(text: str) -> Any:
    """The value of a document. Raises one of BAD_YAML."""
    return yaml.load(text, Loader=_StrictLoader)


def yaml_problem(error: Exception) -> str:
    """What is wrong with a document, and where, in a line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    if isinstance(error, RecursionError) or "nesting depth" in problem:
        return "nested too deep"
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else problem
