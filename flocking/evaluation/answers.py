"""The harness's own cache of answers (``--use_cache``), one table for each model and setting.

Its keys are the requests alone, so that it would answer one model, or one density, with the
results of another.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flocking.models import loaded, parts


def use_table(store: Any, name: str) -> None:
    """Let a ``sqlitedict.SqliteDict`` read and write this table of its file from now on."""
    type(store)(store.filename, tablename=name).close()  # which makes the table
    store.tablename = name


def digest_of_weights(model: PreTrainedModel) -> str:
    """SHA-256 of a model's architecture, parameters and buffers, wherever they are kept."""
    digest = hashlib.sha256(type(model).__name__.encode())
    digest.update(model.config.to_json_string().encode())
    for path, module in model.named_modules():
        with loaded(module):
            own = [*module.named_parameters(path, False), *module.named_buffers(path, False)]
            for name, tensor in own:
                for part in parts(tensor):
                    digest.update(f"{name} {part.dtype} {tuple(part.shape)}\n".encode())
                    digest.update(_bytes(part))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().flatten().contiguous().cpu()
    return flat.view(torch.uint8).numpy().data
