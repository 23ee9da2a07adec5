"""Parts of a model compiled for the shapes that they met while warming; with any other shape they run as written.

So no request ever waits for a compiler. Knows no model family.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as symbolic_shapes
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError
from torch.utils import _pytree as pytree

from app.errors import ModelLoadFailed, first_line

logger = logging.getLogger(__name__)

Function = Callable[..., Any]
MOST_SHAPES = 256
"""Shapes of one function that torch keeps compiled; its own limit of 8 is for those who did not choose theirs."""

WITHOUT_ROWS = frozenset({"img_ids", "txt_ids"})
"""Arguments that all rows share, though they may have as many of something else."""
RUNS_OF_A_GRAPH = 3
"""The first compiles, the second records, and the third shows that it can be replayed."""

FAILURES = (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError, ConstraintViolationError)
NO_GRAPHS = {"triton.cudagraph_capture_sizes": ()}
"""Of Inductor's options: run what was compiled without recording it."""
REFUSAL = "fail_on_recompile"
"""How torch shall meet what it would have to compile anew, and a word of what it says then."""
TRIES = 3
"""Where several threads run what was compiled of one function, torch may by chance take it for unfit."""
_warming = threading.Lock()
"""That is one for all threads of a process, so the workers of several GPUs warm one after the other."""


class Compiler:
    """Compiles the parts of one model, on the thread that runs it.

    Args:
        backend: of ``torch.compile``.

    Attributes:
        warming: whether new shapes are compiled, and not run as written.
        unexpected: passes through a compiled part in a shape that it was not warmed with.
        graphs: whether a part is replayed as a CUDA graph.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self._backend = backend
        self.warming = False
        self.unexpected = 0
        self.graphs = False
        torch._dynamo.config.recompile_limit = MOST_SHAPES
        # Two lengths that happen to be equal while warming would be taken for the same one for ever.
        symbolic_shapes.use_duck_shape = False
        # Code for wide vectors computes anything with narrow ones, and torch does not ask which CPU it was kept for.
        torch.compiler.config.cache_key_tag = torch.backends.cpu.get_cpu_capability()

    @contextlib.contextmanager
    def warm(self) -> Iterator[None]:
        """Inside, whatever shape comes is compiled for.

        Raises:
            ModelLoadFailed: this machine cannot compile.
        """
        with _warming:
            if self.graphs:
                _make_room_for_graphs()
            self.warming = True
            torch.compiler.set_stance("default")
            try:
                yield
            except FAILURES as error:
                reason = getattr(error, "inner_exception", error)
                raise ModelLoadFailed(
                    f"The model cannot be compiled here ({first_line(reason)}); take --optimize safe or off."
                ) from error
            finally:
                self.warming = False
                torch.compiler.set_stance(REFUSAL)

    @property
    def runs(self) -> int:
        """How often each shape is to be met while warming."""
        return RUNS_OF_A_GRAPH if self.graphs else 1

    def compile_encoder(self, module: nn.Module) -> None:
        """A text encoder of transformers, in place; once, however many pipelines it belongs to.

        Not as a whole: how it collects hidden states cannot be compiled.
        """
        if not isinstance(module.forward, Compiled):
            forward = module.forward
            module.forward = Compiled(self, forward, torch.compile(forward, backend=self._backend), {}, graphs=False)

    def compile(
        self, function: Function, *, lengths: Mapping[str, int] | None = None, graphs: bool = False
    ) -> Function:
        """`function` as a whole.

        Args:
            function: of tensors that have the rows of a batch as their first dimension, or have none.
            lengths: dimension that may have any length, by argument.
            graphs: replay each number of rows as a CUDA graph.
        """
        options: Any = {"triton.cudagraphs": True} if graphs and self._backend == "inductor" else None
        self.graphs = self.graphs or graphs
        if graphs:
            # As many as were asked for are none too many.
            torch._inductor.config.triton.cudagraph_dynamic_shape_warn_limit = None
        compiled = torch.compile(function, fullgraph=True, backend=self._backend, options=options)
        return Compiled(self, function, compiled, lengths or {}, graphs)

    def compile_blocks(self, module: Any) -> Function:
        """The blocks that `module` repeats, which are compiled once for all; in place."""
        module.compile_repeated_blocks(fullgraph=True, backend=self._backend)
        compiled = {block: block._compiled_call_impl for block in module.modules() if block._compiled_call_impl}

        def as_written(*args: Any, **kwargs: Any) -> Any:
            for block in compiled:
                block._compiled_call_impl = None
            try:
                return module(*args, **kwargs)
            finally:
                for block, call in compiled.items():
                    block._compiled_call_impl = call

        return Compiled(self, as_written, module, {}, graphs=False)


class Compiled:
    """One function in both forms. Its inputs are brought into one layout, as another would be compiled anew."""

    def __init__(
        self, compiler: Compiler, as_written: Function, compiled: Function, lengths: Mapping[str, int], graphs: bool
    ) -> None:
        self._compiler = compiler
        self._as_written = as_written
        self._compiled = compiled
        self._lengths = lengths
        self._graphs = graphs
        self._warm: set[Hashable] = set()
        self._recorded: set[Hashable] = set()
        self._refused: set[Hashable] = set()
        self._told: set[Hashable] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result, whichever form gives it.

        While warming, the compiled form, and the shape counts as warmed. Later, for a shape that

        - was warmed: the compiled form; of CUDA graphs the one that was recorded for these exact lengths, if any,
        - was not: the function as written, counted as unexpected,
        - was warmed, and torch would compile anew all the same: likewise, from then on for these exact lengths.
        """
        args, kwargs = pytree.tree_map_only(torch.Tensor, _settle, (args, kwargs))
        exact = tuple(leaf.shape for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        rows = exact[0][0]
        shape = self._shape(args, kwargs, rows)
        if self._compiler.warming:
            self._mark(args, kwargs, rows)
            self._recorded.discard(exact)  # memory may also end in the second run, which is the one that records
            result = self._run(args, kwargs)
            # Not before: where memory ends in between, a request would be the first to meet it, and record its graph.
            self._warm.add(shape)
            self._recorded.add(exact)
            return result
        if shape in self._warm and (shape, exact) not in self._refused:
            # A graph holds for exact lengths, takes a second to record, and stays for ever.
            known = not self._graphs or exact in self._recorded
            for _ in range(TRIES):
                try:
                    with contextlib.nullcontext() if known else torch._inductor.config.patch(NO_GRAPHS):
                        return self._run(args, kwargs)
                except RuntimeError as error:
                    if REFUSAL not in str(error):
                        raise
            # What was compiled asks for more than the shape tells, and will of these lengths each time.
            self._refused.add((shape, exact))
            if len(self._refused) > MOST_SHAPES:
                self._warm.remove(shape)
        self._compiler.unexpected += 1
        self._tell(shape, exact)
        return self._as_written(*args, **kwargs)

    def _tell(self, shape: Hashable, exact: Sequence[torch.Size]) -> None:
        if shape not in self._told and len(self._told) < MOST_SHAPES:
            self._told.add(shape)
            sizes = ", ".join("x".join(map(str, each)) for each in exact if each)
            logger.info("nothing was compiled for tensors of %s: they run as written, see --warm_sizes", sizes)

    def _run(self, args: Any, kwargs: Any) -> Any:
        result = self._compiled(*args, **kwargs)
        # The next replay writes to the same memory.
        return pytree.tree_map_only(torch.Tensor, torch.clone, result) if self._graphs else result

    def _shape(self, args: Any, kwargs: Any, rows: int) -> Hashable:
        """What a compiled form is good for. One row is compiled apart, as torch does in any case."""
        leaves = []
        for path, leaf in pytree.tree_leaves_with_path((args, kwargs)):
            if not isinstance(leaf, torch.Tensor):
                leaves.append(leaf)
                continue
            sizes: list[int | None] = list(leaf.shape)
            for dimension in self._any_length(path, leaf, rows):
                sizes[dimension] = None
            leaves.append((leaf.dtype, *sizes))
        return (rows if self._graphs else rows == 1, tuple(leaves))

    def _mark(self, args: Any, kwargs: Any, rows: int) -> None:
        for path, leaf in pytree.tree_leaves_with_path((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                for dimension in self._any_length(path, leaf, rows):
                    torch._dynamo.mark_dynamic(leaf, dimension)

    def _any_length(self, path: Any, leaf: torch.Tensor, rows: int) -> list[int]:
        """Dimensions in which one compiled form takes any length."""
        name = str(getattr(path[-1], "key", ""))
        found = [0] if leaf.ndim and leaf.shape[0] == rows > 1 and name not in WITHOUT_ROWS else []
        return [*found, self._lengths[name]] if name in self._lengths else found


def _make_room_for_graphs() -> None:
    """Torch before 2.13 has room for the CUDA graphs of the thread that imported them, and for no other's."""
    from torch._inductor import cudagraph_trees as trees

    if not hasattr(trees, "_initialize_tls") and not hasattr(trees.local, "tree_manager_containers"):
        trees.local.tree_manager_containers = {}
        trees.local.tree_manager_locks = collections.defaultdict(threading.Lock)


def _settle(tensor: torch.Tensor) -> torch.Tensor:
    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    return tensor.contiguous(memory_format=layout)
