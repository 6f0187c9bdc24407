"""A step that is compiled once and, on CUDA devices, replayed as a graph."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flocking.feedforward import anything_is_watched
from flocking.models import attention, config_marks, modules_of, parts, settings

_COMPILER = "inductor"
_WARM_UP = 3  # runs before a graph is captured
# Functions that multiply activations by a weight, and which argument the activations are.
_PRODUCTS = {nn.functional.linear: 0, torch.bmm: 0, torch.addmm: 1}


class CompiledStep:
    """A step of a model, over memory that never moves: compiled once; on CUDA devices a graph.

    Parameters
    ----------
    step : bound method
        Takes and returns nothing, and never waits for the device.
    model : transformers.PreTrainedModel
        What the step runs.
    device : torch.device
    implementation : str or None
        The attention implementation that the step runs with; None for the model's own.
    """

    def __init__(
        self,
        step: Callable[[], None],
        model: PreTrainedModel,
        device: torch.device,
        implementation: str | None,
    ) -> None:
        self._model: Any = model  # (transformers types generation apart from models)
        self._device, self._implementation = device, implementation
        self._is_cuda = device.type == "cuda"
        # (Of the step's object, which holds this, there is only a weak reference: a cycle would
        # keep caches and graphs until the garbage collector runs.)
        function, owner = (getattr(step, name) for name in ("__func__", "__self__"))
        self._compiled, self._owner = _compiled(function), weakref.ref(owner)
        self._has_run = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._reads: tuple[Any, ...] = ()  # addresses that the graph reads, and settings
        self._side: torch.cuda.Stream | None = None  # where steps are run and captured
        self._warm = 0  # steps that ran without a graph

    def __call__(self) -> None:
        """Run the step.

        Raises
        ------
        RuntimeError
            If it does not compile in one piece.
        """
        if not self._is_cuda or anything_is_watched():  # a graph would not call the hooks
            self._run()
        elif self._graph is not None:
            self._graph.replay()
        elif self._warm < _WARM_UP:
            self._warm_up()
        else:
            self._graph = self._captured()
            self._graph.replay()  # capturing computes nothing

    def forget_graph(self) -> None:
        """Warm up and capture again, because the step's own memory moved."""
        self._graph, self._warm = None, 0

    def follow_parameters(self) -> None:
        """Warm up and capture again if a parameter or buffer of the model moved.

        Or if a plain value of a module changed, such as which adapter is active, or of a config.
        """
        reads = self.addresses(), settings(self._model), config_marks(self._model)
        if reads != self._reads:
            self._reads = reads
            self.forget_graph()

    def addresses(self) -> tuple[int, ...]:
        """Where the parameters and buffers are that a graph reads."""
        return tuple(
            part.data_ptr()
            for module in modules_of(self._model)
            for held in (module._parameters, module._buffers)
            for weight in held.values()
            if weight is not None
            for part in parts(weight)
        )

    def _warm_up(self) -> None:
        """Run on the side stream: compiled, tuned and with workspaces allocated, for the graph."""
        self._side = self._side or torch.cuda.Stream(self._device)
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            self._run()
        torch.cuda.current_stream(self._device).wait_stream(self._side)
        self._warm += 1

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._side):
            self._run()
        return graph

    def _run(self) -> None:
        model = self._model
        try:
            # (On a GPU, mixtures of experts are computed for single tokens as in generate.)
            with attention(model, self._implementation), model._optimize_model_for_decode():
                self._compiled(self._owner())
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # of any kind that tracing and compilers raise
            if self._has_run:
                raise
            why = " ".join(str(problem).split("\n")[:2]).strip()  # a backend's name, then its words
            raise RuntimeError(
                f"{type(model).__name__} does not compile in one piece ({why}): use generate."
            ) from problem
        self._has_run = True


def _compiled(function: types.FunctionType) -> Callable[[object], None]:
    """A method compiled; with a new code object, because recompilations are limited for each."""
    copied = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__
    )
    return torch.compile(
        copied,
        fullgraph=True,
        dynamic=False,
        backend=_inductor if _COMPILER == "inductor" else _COMPILER,
    )


def _inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """Compile a step: on CUDA devices, products with one token become inductor's own kernels.

    They read a matrix faster than cuBLAS does, and fuse what precedes them, such as norms. The
    result of an activation function is written to memory first nevertheless: a kernel that fused
    it would compute it again for every output of the down-projection, which takes longer than
    reading the weights.
    """
    from torch._inductor.compile_fx import compile_fx  # slow to import, and seldom needed

    for node in list(graph.graph.nodes):
        z = node.args[_PRODUCTS[node.target]] if node.target in _PRODUCTS else None
        if z is None or z.target in _PRODUCTS or not _is_of_products_alone(z):
            continue
        value = z.meta["example_value"]
        with graph.graph.inserting_before(node):
            # A view that inductor writes its input to memory for, and that costs nothing else.
            written = graph.graph.call_function(
                torch.as_strided, (z, tuple(value.shape), tuple(value.stride()))
            )
        node.replace_input_with(z, written)
    graph.recompile()
    tuned = {"coordinate_descent_tuning": True}
    is_cuda = any(isinstance(x, Tensor) and x.is_cuda for x in inputs)
    return compile_fx(graph, inputs, config_patches=tuned if is_cuda else None)


def _is_of_products_alone(node: torch.fx.Node) -> bool:
    """Whether a value is computed from the results of matrix products, and from no other tensor.

    The input of a down-projection is: norms also read weights, and attention its cache.
    """
    seen, rest = set(), [node]
    while rest:
        node = rest.pop()
        if node.op in ("placeholder", "get_attr"):
            return False
        if node not in seen and node.target not in _PRODUCTS:
            seen.add(node)
            rest.extend(node.all_input_nodes)
    return True
