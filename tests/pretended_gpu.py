"""A GPU that is only pretended: tensors that say they lie on one, while their numbers lie on the CPU.

What runs between a request and its picture runs as on a GPU, and what would go wrong there goes wrong here: a tensor of
the host among those of the device, a number that the host waits for, memory that ends in the middle. Speed, rounding
and kernels are the CPU's.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from app.engine import placement
from app.engine.optimization import Optimization
from app.engine.placement import Placement

aten = torch.ops.aten
DEVICE = torch.device("cuda:0")
CPU = torch.device("cpu")
COPIES = ("aten::to", "aten::_to_copy", "aten::copy_", "aten::type_as")
INDEXING = ("getitem", "setitem", "aten::index", "aten::index_put_")
READS = {
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.allclose.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.linalg_solve.default,
    aten.linalg_inv.default,
}
"""What the host cannot go on without."""


class GpuTensor(torch.Tensor):
    """Says that it lies on the GPU. Works only inside `pretended_gpu`, as a GPU's tensors do with a GPU only."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> torch.Tensor:  # type: ignore[misc]
        # What makes parameters of the type of another parameter means no more than this.
        return data if isinstance(data, cls) else torch.nn.Parameter(data, requires_grad)

    @staticmethod
    def of(numbers: torch.Tensor) -> GpuTensor:
        with torch.inference_mode(False):
            made: GpuTensor = torch.Tensor._make_wrapper_subclass(
                GpuTensor,
                numbers.shape,
                strides=numbers.stride(),
                storage_offset=numbers.storage_offset(),
                dtype=numbers.dtype,
                device=DEVICE,
                requires_grad=False,
            )
        made.numbers = numbers
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"GpuTensor({self.numbers})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} for a pretended GPU's tensor where there is none")

    # PyTorch without CUDA cannot make these ready for a GPU, so that they would never get to `Gpu`.

    def __getitem__(self, index: Any) -> Any:
        return Gpu.current.run(operator.getitem, "getitem", (self, index), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        Gpu.current.run(operator.setitem, "setitem", (self, index, value), {})

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
        if self.is_contiguous(memory_format=memory_format):
            return self
        made: torch.Tensor = self.clone(memory_format=memory_format)
        return made

    def record_stream(self, stream: Any) -> None: ...

    def tolist(self) -> Any:
        return self.to(CPU).tolist()


class Mismatch(RuntimeError):
    """Tensors of the host and of the device in one operation, as PyTorch refuses it."""


class Gpu(TorchDispatchMode):
    """Does on the CPU what is asked of the GPU, and notes what the host waits for.

    Attributes:
        waits: for each time, why and in which line of ours or of a library.
        operations: that were done.
        full_at: for the first operation from there on that takes memory there is none, once.
    """

    _mode_key = torch._C._TorchDispatchModeKey.FAKE
    current: Gpu

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.operations = 0
        self.full_at: int | None = None
        self._pinned: set[int] = set()

    def __enter__(self) -> Gpu:
        super().__enter__()
        # What is made of Python's numbers comes by here.
        torch._C._set_only_lift_cpu_tensors(True)
        return self

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name: str = func._schema.name
        if name == "aten::_has_compatible_shallow_copy_type":
            # As of two real devices: `_set_data` sees to it.
            return True
        if name == "aten::is_pinned":
            return self._is_pinned(args[0])
        if name in ("aten::pin_memory", "aten::_pin_memory"):
            copied: torch.Tensor = args[0].clone()
            self._pinned.add(_address(copied))
            return copied
        kwargs, blocking = kwargs or {}, True
        if name in COPIES:
            given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
            blocking = not kwargs.get("non_blocking", given.get("non_blocking", False))
        return self.run(func, name, args, kwargs, blocking)

    def run(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any, blocking: bool = True) -> Any:
        """Run an operation where it belongs.

        Args:
            func: it.
            name: its name in PyTorch.
            args: of it.
            kwargs: of it.
            blocking: where it copies, it waits until that is done.

        Raises:
            Mismatch: it belongs nowhere.
            torch.OutOfMemoryError: as asked for.
        """
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
        others = [tensor for tensor in tensors if not isinstance(tensor, GpuTensor)]
        asked = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        here = asked[-1].type == "cuda" if asked else bool(ours)
        if name == "aten::copy_":
            here = isinstance(args[0], GpuTensor)
        if not here and not ours:
            return func(*args, **kwargs)

        self.operations += 1
        if here and self.full_at is not None and self.operations >= self.full_at:
            self.full_at = None
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
        crosses = name in COPIES and bool(others if here else ours)
        if crosses and not here:
            self._wait("reads a tensor")
        elif crosses and (blocking or not all(map(self._is_pinned, others))):
            self._wait("sends a tensor")
        elif name in INDEXING:
            self._look_up(args[1:])
        elif name not in COPIES and any(other.dim() for other in others):
            shapes = [[tuple(each.shape) for each in side] for side in (ours, others)]
            raise Mismatch(f"{func} of {shapes[0]} on the device and {shapes[1]} on the host")
        elif func in READS:
            self._wait("reads a number")

        plain_args, plain_kwargs = pytree.tree_unflatten([_lower(leaf) for leaf in leaves], structure)
        result = func(*plain_args, **plain_kwargs)
        if crosses and name != "aten::copy_" and _address(result) == _address(plain_args[0]):
            # Of another device it is never the same memory.
            result = result.clone()
        if not here:
            return result
        known = {id(tensor.numbers): tensor for tensor in ours}

        def raised(each: torch.Tensor) -> torch.Tensor:
            return known[id(each)] if id(each) in known else GpuTensor.of(each)

        # Nearly all give one tensor, for which there is no need to look.
        if isinstance(result, torch.Tensor):
            return raised(result)
        return pytree.tree_map_only(torch.Tensor, raised, result)

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        return not isinstance(tensor, GpuTensor) and _address(tensor) in self._pinned

    def _look_up(self, index: Any) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves(index) if isinstance(leaf, torch.Tensor)]
        if any(each.dtype == torch.bool or not each.dim() for each in tensors if isinstance(each, GpuTensor)):
            self._wait("reads where")
        elif any(each.dim() for each in tensors if not isinstance(each, GpuTensor)):
            self._wait("sends where")

    def _wait(self, why: str) -> None:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
            frame = frame.f_back
        where = f"{frame.f_code.co_filename.rpartition('site-packages/')[2]}:{frame.f_lineno}" if frame else "?"
        self.waits.append(f"{why} in {where}")


def _lower(leaf: Any) -> Any:
    if isinstance(leaf, GpuTensor):
        return leaf.numbers
    return CPU if isinstance(leaf, torch.device) and leaf.type == "cuda" else leaf


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# --- What PyTorch says of it -----------------------------------------------------------------------------------


class _Event:
    def __init__(self, **_: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


class _Stream(contextlib.nullcontext[None]):
    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def synchronize(self) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


def _says(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer


_CUDA = {
    "is_available": _says(True),
    "device_count": _says(1),
    "get_device_capability": _says((8, 0)),
    "get_device_name": _says("a pretended GPU"),
    "is_bf16_supported": _says(True),
    "current_device": _says(0),
    "set_device": _says(None),
    "synchronize": _says(None),
    "empty_cache": _says(None),
    "current_stream": lambda *_: _Stream(),
    "default_stream": lambda *_: _Stream(),
    "stream": _says(contextlib.nullcontext()),
    "Stream": _Stream,
    "Event": _Event,
}
_data: Any = torch._C.TensorBase.data


def _get_data(tensor: torch.Tensor) -> Any:
    return tensor.detach() if isinstance(tensor, GpuTensor) else _data.__get__(tensor)


def _set_data(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """As assigning to ``parameter.data``, with the other device's tensor too."""
    if isinstance(parameter, GpuTensor) or isinstance(value, GpuTensor):
        fresh = value.detach() if isinstance(value, GpuTensor) else torch.nn.Parameter(value, requires_grad=False)
        vars(fresh).update({name: kept for name, kept in vars(parameter).items() if name != "numbers"})
        if isinstance(fresh, GpuTensor) and isinstance(parameter, torch.nn.Parameter):
            fresh._is_param = True
        torch.utils.swap_tensors(parameter, fresh)
    else:
        _data.__set__(parameter, value)


def _in_inference(function: Callable[..., Any]) -> Callable[..., Any]:
    """Outside of it, PyTorch without CUDA asks for the CUDA that it lacks before it asks us."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode():
            return function(*args, **kwargs)

    return wrapper


@contextlib.contextmanager
def pretended_gpu() -> Iterator[Gpu]:
    """Inside, this thread has one GPU, ``cuda:0``, on which weights come from the CPU and not from their files."""
    with contextlib.ExitStack() as stack:
        for name, value in _CUDA.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.Tensor, "data", property(_get_data, _set_data)))
        stack.enter_context(mock.patch.object(Placement, "read_to", None))
        for owner, name in ((placement, "place"), (Optimization, "arrange")):
            stack.enter_context(mock.patch.object(owner, name, _in_inference(getattr(owner, name))))
        Gpu.current = stack.enter_context(Gpu())
        yield Gpu.current
