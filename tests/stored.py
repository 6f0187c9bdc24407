"""What several test files do to a folder with a model's files."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import build


def configured(folder: Path, **changes: object) -> None:
    """Change fields of its config, or leave them out."""
    file = folder / "config.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: v for key, v in content.items() if v != "left out"}))


def in_shards(folder: Path) -> list[Path]:
    """Put its weights into several files."""
    (folder / "model.safetensors").unlink()
    build("llama").save_pretrained(folder, max_shard_size="100KB")
    return sorted(folder.glob("model-*.safetensors"))
