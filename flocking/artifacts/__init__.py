"""Numbers as files: what they depend on, writing them whole or not at all, reading them again.

Imports no other room, and neither torch nor transformers.
"""

from flocking.artifacts.code import code_digest, sources
from flocking.artifacts.folders import file_digest, folder_digest
from flocking.artifacts.groups import FileGroup
from flocking.artifacts.keys import PARTS, Key, Part
from flocking.artifacts.numbers import UnreadableError, checksum, from_json, read_content, to_json
from flocking.artifacts.writing import (
    BusyError,
    claimed,
    free_bytes,
    noting,
    refuse_unwritable,
    replacing,
    set_aside,
)

__all__ = [
    "PARTS",
    "BusyError",
    "FileGroup",
    "Key",
    "Part",
    "UnreadableError",
    "checksum",
    "claimed",
    "code_digest",
    "file_digest",
    "folder_digest",
    "free_bytes",
    "from_json",
    "noting",
    "read_content",
    "refuse_unwritable",
    "replacing",
    "set_aside",
    "sources",
    "to_json",
]
