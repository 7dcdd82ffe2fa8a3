"""Text that we wrote, told from what somebody edited by a digest in its last line."""

import hashlib
import re
from pathlib import Path

from dsa_jax.run.files import read_regular

_LAST_LINE = re.compile(rb"<!-- dsa-jax wrote this: sha256 ([0-9a-f]{64}); a changed file is kept -->\n?\Z")


def signed(text: str) -> str:
    """`text`, which ends in a newline, with its digest as an HTML comment below."""
    digest = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
    return f"{text}<!-- dsa-jax wrote this: sha256 {digest}; a changed file is kept -->\n"


def is_signed(path: Path) -> bool:
    """Whether a file is as `signed` made it; one that cannot be read, a link or a directory is not."""
    try:
        content = read_regular(path)
    except OSError:
        return False
    last = _LAST_LINE.search(content)
    return last is not None and hashlib.sha256(content[: last.start()]).hexdigest() == last[1].decode()
