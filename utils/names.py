"""Names of files for people: short, and without credentials."""

from __future__ import annotations

import re
from collections.abc import Sequence

# https://USER@host, scheme://USER:PASSWORD@host (a port is no password), and parameters such as ?token=SECRET.
CREDENTIALS = re.compile(
    r"""(?:(?<=https)|(?<=http))://[^/\s"'@\\]{0,999}@|://[^/\s"'@:\\]{0,99}:(?!\d+[/"'\s])[^\s"'@\\]{0,999}@"""
)
PARAMETERS = re.compile(
    r"""([?&](?:[\w.-]{0,50}[_.-])?(?:token|sig|signature|secret|(?:api|access|secret|account)?key(?:id)?|awsaccesskeyid"""
    r"""|password|passwd|credentials?|auth|authorization)=)[^&\s"'#\\]+""",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """The text with `***` for user, password and secret parameters of its URLs."""
    if "://" not in text:
        return text
    return PARAMETERS.sub(r"\1***", CREDENTIALS.sub("://***@", text))


def distinct_suffixes(paths: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """The last parts of each path: the smallest number of parts that tells all paths apart.

    Equal paths keep all their parts.

    Args:
        taken: names of other things; a path that is one of them becomes `./path`.
    """
    parts = [path.split("/") for path in paths]
    for count in range(1, max(map(len, parts), default=1)):
        suffixes = ["/".join(each[-count:]) for each in parts]
        if len({*suffixes, *taken}) == len(suffixes) + len(taken):
            return suffixes
    return [f"./{path}" if path in taken else path for path in paths]
