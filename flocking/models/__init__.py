"""Handling a Hugging Face model without changing it.

Loading it, copying its modules, running it, finding out by trial what may be done with it, and
tokenizing for it. Imports no other room but ``artifacts``.
"""

from flocking.models.capabilities import batches, chunks, forcing, refuse_forgetful, traits
from flocking.models.copies import overriding, put, replaced, separate, shadow, unwrap, with_forward
from flocking.models.loading import control, embedded, identity, load
from flocking.models.memo import PerModel
from flocking.models.notices import warn
from flocking.models.running import attention, context, continued, forward, refuse_long, undisturbed
from flocking.models.sandbox import private_randomness, relative_error, tolerance, trial
from flocking.models.tokenization import Prompts, Text, tokenize
from flocking.models.weights import (
    byte_count,
    device_of,
    embeddings_of,
    is_loaded,
    loaded,
    parts,
    without_accelerate,
)

__all__ = [
    "PerModel",
    "Prompts",
    "Text",
    "attention",
    "batches",
    "byte_count",
    "chunks",
    "context",
    "continued",
    "control",
    "device_of",
    "embedded",
    "embeddings_of",
    "forcing",
    "forward",
    "identity",
    "is_loaded",
    "load",
    "loaded",
    "overriding",
    "parts",
    "private_randomness",
    "put",
    "refuse_forgetful",
    "refuse_long",
    "relative_error",
    "replaced",
    "separate",
    "shadow",
    "tokenize",
    "tolerance",
    "traits",
    "trial",
    "undisturbed",
    "unwrap",
    "warn",
    "with_forward",
    "without_accelerate",
]
