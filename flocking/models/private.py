"""The private names of other libraries that the whole package relies on, with reasons.

Nothing imports this list. It is for people who read the code or raise a version, and a test checks
that every name exists in the installed versions and that the package uses no others.
"""

from __future__ import annotations

from typing import NamedTuple


class Private(NamedTuple):
    """A private name, the module that defines or sets it, and what it is used for.

    ``since`` is a version known to have it, if the oldest that we admit lacks it: the package then
    asks for the name with a default.
    """

    name: str
    where: str
    why: str
    since: str | None = None


PRIVATE = (
    # transformers
    Private(
        "_prefill", "transformers.generation.utils", "a twin's prompt is read by the full model"
    ),
    Private(
        "_sample", "transformers.generation.utils", "a twin that drafts counts accepted tokens"
    ),
    Private(
        "_beam_search", "transformers.generation.utils", "a twin forgets which beams it read of"
    ),
    Private(
        "_mask_length",
        "transformers.generation.utils",
        "the length of a mask that was dropped since it has no padding",
        "5.23",
    ),
    Private(
        "_assisted_decoding",
        "transformers.generation.utils",
        "refused where a twin is the main model, which has to check drafts unpruned",
    ),
    Private(
        "_optimize_model_for_decode",
        "transformers.generation.utils",
        "Decoder runs mixtures of experts for single tokens as generate does",
    ),
    Private(
        "_attn_implementation",
        "transformers.configuration_utils",
        "part of what a proof depends on; Decoder asks whether it is sdpa",
    ),
    Private(
        "_attn_implementation_internal",
        "transformers.configuration_utils",
        "Decoder sets another attention for a time, without the checks of the public setter",
    ),
    Private(
        "_experts_implementation",
        "transformers.configuration_utils",
        "which implementation experts run while they are watched",
    ),
    Private(
        "_experts_implementation_internal",
        "transformers.configuration_utils",
        "set in the copy of a config through which experts are watched",
    ),
    Private("_commit_hash", "transformers.configuration_utils", "revision of a model from a hub"),
    Private("_apply_gate", "transformers.integrations.moe", "gives z of experts with a gate"),
    Private(
        "_is_expert_parallel", "transformers.integrations.moe", "such experts are refused", "5.23"
    ),
    Private(
        "_output_capturing_hooks_installed",
        "transformers.utils.output_capturing",
        "not so in a trial copy, which has no hooks",
    ),
    # torch
    Private(
        "_global_forward_hooks", "torch.nn.modules.module", "hooks on all modules, not for trials"
    ),
    Private(
        "_global_forward_pre_hooks",
        "torch.nn.modules.module",
        "hooks on all modules, not for trials",
    ),
    Private("_forward_hooks", "torch.nn.modules.module", "hooks of the user's"),
    Private("_forward_pre_hooks", "torch.nn.modules.module", "hooks of the user's"),
    Private("_modules", "torch.nn.modules.module", "one module of a copy is replaced"),
    Private("_parameters", "torch.nn.modules.module", "a module's parameters, not an adapter's"),
    Private(
        "_buffers", "torch.nn.modules.module", "moved for a model in host memory; twins follow them"
    ),
    Private(
        "_non_persistent_buffers_set",
        "torch.nn.modules.module",
        "which buffers a model may compute anew as it runs",
    ),
    Private(
        "_version", "torch.autograd.graph", "whether a tensor that a copy does not share changed"
    ),
    Private("_apply", "torch.nn.modules.module", "refused on a twin, which shares parameters"),
    Private("_orig_mod", "torch._dynamo.eval_frame", "the model inside of a compiled one"),
    Private(
        "_torchdynamo_orig_callable",
        "torch._dynamo.eval_frame",
        "marks compiled calls, which a copy leaves out",
    ),
    Private("compile_fx", "torch._inductor.compile_fx", "Decoder's backend changes a graph first"),
    Private("_parse_to", "torch._C._nn", "what the arguments of to() mean, for a twin"),
    Private("_cdata", "torch.storage", "tells storages apart, to refuse writes into parameters"),
    Private("_schema", "torch._ops", "which arguments an operation writes"),
    Private("tree_leaves", "torch.utils._pytree", "compares outputs of any structure"),
    Private("tree_map_only", "torch.utils._pytree", "negates outputs of any structure in a proof"),
    Private("TorchDispatchMode", "torch.utils._python_dispatch", "sees every write in a trial"),
    Private(
        "is_traceable_wrapper_subclass",
        "torch.utils._python_dispatch",
        "tells quantised weights, which consist of several tensors",
    ),
    # accelerate
    Private(
        "_hf_hook", "accelerate.hooks", "brings offloaded values; says where a module computes"
    ),
    Private("_old_forward", "accelerate.hooks", "the forward that a hook of accelerate wraps"),
    # PEFT
    # lm-eval
    Private("load_yaml", "lm_eval.tasks._yaml_loader", "tasks run on local files, without a hub"),
    Private(
        "_loglikelihood_tokens", "lm_eval.models.huggingface", "scores with a twin in the harness"
    ),
    Private("_encode_pair", "lm_eval.api.model", "tokens are counted before anything is asked"),
    Private("_instances", "lm_eval.api.task", "a block's answers are filtered as the task has it"),
    Private("_get_config", "lm_eval.models.huggingface", "its errors are told in a sentence"),
    Private("_create_tokenizer", "lm_eval.models.huggingface", "its errors are told in a sentence"),
    Private(
        "_create_model", "lm_eval.models.huggingface", "weights missing from files are refused"
    ),
    # Python
    Private("_getframe", "sys", "warnings point at the user's line"),
)
