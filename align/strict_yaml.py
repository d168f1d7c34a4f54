"""YAML text in, plain values out: nothing twice, nothing that stands for itself, numbers as they are meant."""

from __future__ import annotations

from typing import Any

import yaml

# libyaml's parser, where PyYAML was built with it, takes a tenth of the time.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _StrictLoader(_Loader):
    """Safe YAML that refuses a key given twice and reads 5e-7 as the number it is meant to be."""

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
    _refuse_aliases_within_anchors(text)
    return yaml.load(text, Loader=_StrictLoader)


def _refuse_aliases_within_anchors(text: str) -> None:
    """With those a file of a few lines can stand for more than any memory holds, or for itself."""
    inside: list[bool] = []
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent) and any(inside):
            where: Any = event.start_mark
            raise yaml.composer.ComposerError(None, None, "an alias inside of an anchored value", where)
        if isinstance(event, yaml.CollectionStartEvent):
            inside.append(event.anchor is not None)
        elif isinstance(event, yaml.CollectionEndEvent):
            inside.pop()


def yaml_problem(error: Exception) -> str:
    """What is wrong with a document, and where, in a line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    if isinstance(error, RecursionError) or "nesting depth" in problem:
        return "nested too deep"
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else problem
