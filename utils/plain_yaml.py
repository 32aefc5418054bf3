"""YAML files as words: no value is interpreted, and nothing is expanded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError
from utils.files import read_text
from utils.logger import one_line

MAX_NODES, MAX_DEPTH = 200_000, 40
_CORE_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}


class _PlainLoader(yaml.BaseLoader):
    """Leaves every value as written (`on` stays `on`), also the merge key `<<`.

    Refuses a key that is given twice, tags, and aliases that multiply.
    """

    def get_single_node(self) -> yaml.Node | None:
        root = super().get_single_node()
        if root is not None:
            _check_nodes(root)
        return root

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError("a key is no word")
            if key.value in seen:
                raise yaml.YAMLError(f"{key.value} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _check_nodes(root: yaml.Node) -> None:
    """Refuse tags, deep nesting, and more values than a configuration has; an alias counts each time it is used."""
    waiting, count = [(root, 1)], 0
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if count > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_NODES} values")
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"more than {MAX_DEPTH} levels deep")
        if node.tag not in _CORE_TAGS:
            raise yaml.YAMLError(f"tag {node.tag}")
        if isinstance(node, yaml.MappingNode):
            waiting += [(part, depth + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(part, depth + 1) for part in node.value]


def read_mapping(path: Path, where: str, what: str = "keys to values") -> dict[str, Any]:
    """`read_yaml` of a file that holds a mapping; an empty file is an empty mapping.

    Args:
        what: completes "must be a mapping of" in a refusal.
    """
    loaded = read_yaml(path, where) or {}
    if not isinstance(loaded, dict):
        raise UserError(f"{where}: must be a mapping of {what}")
    return loaded


def read_yaml(path: Path, where: str) -> Any:
    """Dicts, lists and words of a YAML file; an empty file is an empty word.

    Args:
        where: begins the message of a refusal, such as `--config FILE`.

    Raises:
        UserError: the file cannot be read, or is not YAML.
    """
    try:
        return yaml.load(read_text(path.resolve()), Loader=_PlainLoader) or ""
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not YAML ({one_line(error)})") from error
