"""Handling a Hugging Face model without changing it.

Loading a model, copying its modules, running it, finding out by trial in which ways it can be
run, and tokenizing for it. Of the other rooms, it imports ``artifacts`` and ``texts`` only.
"""

from flocking.models.capabilities import (
    batches,
    chunks,
    forcing,
    refuse_forgetful,
    traits,
    with_inputs,
)
from flocking.models.checkpoints import located, prepared, read_model, trusted
from flocking.models.copies import (
    hooks_on,
    overriding,
    put,
    replaced,
    separate,
    trial_copy,
    with_forward,
    working_copy,
)
from flocking.models.forms import Text, require_tokenizer
from flocking.models.inputs import continued_inputs
from flocking.models.loading import embedded, identity, load
from flocking.models.locks import exclusive
from flocking.models.memo import PerModel
from flocking.models.notices import warn
from flocking.models.problems import reading
from flocking.models.running import attention, context, continued, forward, refuse_long, undisturbed
from flocking.models.sampling import opening_token, require_writer, sampled
from flocking.models.sandbox import private_randomness, relative_error, tolerance, trial
from flocking.models.tokenization import Prompts, tokenize
from flocking.models.untrained import control
from flocking.models.weights import (
    byte_count,
    device_of,
    embeddings_of,
    is_loaded,
    loaded,
    parameter_of,
    parts,
    tensor_of,
    vocabulary_of,
    without_accelerate,
)
from flocking.models.wrapping import require_model, unwrap

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
    "continued_inputs",
    "control",
    "device_of",
    "embedded",
    "embeddings_of",
    "exclusive",
    "forcing",
    "forward",
    "hooks_on",
    "identity",
    "is_loaded",
    "load",
    "loaded",
    "located",
    "opening_token",
    "overriding",
    "parameter_of",
    "parts",
    "prepared",
    "private_randomness",
    "put",
    "read_model",
    "reading",
    "refuse_forgetful",
    "refuse_long",
    "relative_error",
    "replaced",
    "require_model",
    "require_tokenizer",
    "require_writer",
    "sampled",
    "separate",
    "tensor_of",
    "tokenize",
    "tolerance",
    "traits",
    "trial",
    "trial_copy",
    "trusted",
    "undisturbed",
    "unwrap",
    "vocabulary_of",
    "warn",
    "with_forward",
    "with_inputs",
    "without_accelerate",
    "working_copy",
]
