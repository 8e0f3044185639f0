"""YAML without surprises: plain data only, and a key given twice is an error."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from ..spec.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """The safe loader, with a mapping's keys checked for repetition."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping whose keys are all different."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                mark = node.value[index][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", mark)
        return super().construct_mapping(node, deep)


def load_yaml(text: str, where: str) -> Any:
    """The data in a YAML text. Raises RecipeError naming the line of the first problem."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it is not YAML"
        raise RecipeError(
            "recipe.yaml",
            f"Recipe {where} cannot be parsed{line}.",
            f"The YAML reader says: {problem}.",
            "Correct that line; texts with a * or : need quotes.",
        ) from error
