"""YAML files as words: no value is interpreted, and nothing is expanded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError
from utils.files import read_text
from utils.logger import one_line


class _PlainLoader(yaml.BaseLoader):
    """Leaves every value as written (`on` stays `on`), also the merge key `<<`; refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError("a key is no word")
            if key.value in seen:
                raise yaml.YAMLError(f"{key.value} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


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
