"""Handling a Hugging Face model without changing it.

Loading a model, copying its modules, running it, finding out by trial in which ways it can be
run, and tokenizing for it. Of the other rooms, it imports ``artifacts`` and ``texts`` only.
"""

from flocking.models.attributes import config_marks, settings
from flocking.models.capabilities import (
    Traits,
    batches,
    chunks,
    forcing,
    refuse_forgetful,
    traits,
    with_inputs,
)
from flocking.models.chats import Chats, conversations
from flocking.models.checkpoints import (
    folder_of,
    located,
    prepared,
    read_config,
    read_model,
    read_tokenizer,
    said_of,
    trusted,
)
from flocking.models.continuing import check_generation, continued
from flocking.models.copies import (
    forward_of,
    hooks_on,
    hooks_on_everything,
    overriding,
    put,
    replaced,
    separate,
    trial_copy,
    with_forward,
    working_copy,
)
from flocking.models.dequantising import read_gguf
from flocking.models.following import Original
from flocking.models.forms import (
    Text,
    held,
    is_lasting,
    refuse_container,
    require_tokenizer,
    unreadable,
)
from flocking.models.gguf import contents_of
from flocking.models.gguf_support import is_readable
from flocking.models.inputs import continued_inputs
from flocking.models.loading import embedded, embedded_file, identity, load, resolved
from flocking.models.locks import exclusive
from flocking.models.memo import PerModel
from flocking.models.memory import mapped_bytes, usable_memory
from flocking.models.naming import name_and_path, split_place
from flocking.models.notices import warn
from flocking.models.origins import NOTE
from flocking.models.precision import full_precision
from flocking.models.problems import is_out_of_memory, listed, reading
from flocking.models.rewinding import Bookmark, Seal, is_even, refuse_unknown, rewinds
from flocking.models.rotary import forget_lengths
from flocking.models.running import attention, context, forward, refuse_long, undisturbed
from flocking.models.sampling import opening_token, require_writer, sampled
from flocking.models.sandbox import private_randomness, relative_error, tolerance, trial
from flocking.models.tables import html_table, text_table
from flocking.models.tokenization import (
    AS_GIVEN,
    CHATS,
    Prompts,
    special_tokens_around,
    tokenize,
    tokenize_chats,
    tokenizer_beside,
)
from flocking.models.trees import modules_of, named_modules_of
from flocking.models.untrained import control
from flocking.models.weights import (
    any_tensor_of,
    byte_count,
    device_of,
    embeddings_of,
    is_loaded,
    loaded,
    parameter_of,
    parts,
    tensor_of,
    vocabulary_of,
    why_not_finite,
    without_accelerate,
)
from flocking.models.wrapping import require_model, unwrap

__all__ = [
    "AS_GIVEN",
    "CHATS",
    "NOTE",
    "Bookmark",
    "Chats",
    "Original",
    "PerModel",
    "Prompts",
    "Seal",
    "Text",
    "Traits",
    "any_tensor_of",
    "attention",
    "batches",
    "byte_count",
    "check_generation",
    "chunks",
    "config_marks",
    "contents_of",
    "context",
    "continued",
    "continued_inputs",
    "control",
    "conversations",
    "device_of",
    "embedded",
    "embedded_file",
    "embeddings_of",
    "exclusive",
    "folder_of",
    "forcing",
    "forget_lengths",
    "forward",
    "forward_of",
    "full_precision",
    "held",
    "hooks_on",
    "hooks_on_everything",
    "html_table",
    "identity",
    "is_even",
    "is_lasting",
    "is_loaded",
    "is_out_of_memory",
    "is_readable",
    "listed",
    "load",
    "loaded",
    "located",
    "mapped_bytes",
    "modules_of",
    "name_and_path",
    "named_modules_of",
    "opening_token",
    "overriding",
    "parameter_of",
    "parts",
    "prepared",
    "private_randomness",
    "put",
    "read_config",
    "read_gguf",
    "read_model",
    "read_tokenizer",
    "reading",
    "refuse_container",
    "refuse_forgetful",
    "refuse_long",
    "refuse_unknown",
    "relative_error",
    "replaced",
    "require_model",
    "require_tokenizer",
    "require_writer",
    "resolved",
    "rewinds",
    "said_of",
    "sampled",
    "separate",
    "settings",
    "special_tokens_around",
    "split_place",
    "tensor_of",
    "text_table",
    "tokenize",
    "tokenize_chats",
    "tokenizer_beside",
    "tolerance",
    "traits",
    "trial",
    "trial_copy",
    "trusted",
    "undisturbed",
    "unreadable",
    "unwrap",
    "usable_memory",
    "vocabulary_of",
    "warn",
    "why_not_finite",
    "with_forward",
    "with_inputs",
    "without_accelerate",
    "working_copy",
]
