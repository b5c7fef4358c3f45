"""Which code serves an op: the compiled library, Triton, or eager torch.

If the compiled library loads, it defines the schemas and serves the devices it was built for;
otherwise the same schemas are defined here. Whatever the library does not serve is served by
Triton (on CUDA, where it can be imported) or by eager torch. Nothing falls back silently when a
backend was asked for by name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cosmos3_fast.ops import _torch
from cosmos3_fast.ops._torch import PLAIN_TENSORS

BACKENDS = ("cpp", "triton", "eager")
DEVICES = ("cpu", "cuda")

Kernel = Callable[..., Any]

# Filled by `register`: the schemas, the names in them, and by name `torch.ops.cosmos3.<op>`, its
# check, its specification and the arguments of an example; the (name, device) of the library.
SCHEMAS: list[str] = []
OPS: list[str] = []
REGISTERED: dict[str, Any] = {}
CHECKS: dict[str, Kernel] = {}
REFERENCES: dict[str, Kernel] = {}
EXAMPLES: dict[str, Callable[[str], tuple[Any, ...]]] = {}
LIBRARY_KERNELS: set[tuple[str, str]] = set()
_DIRECT: dict[str, Kernel] = {}


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot serve here."""


def build_info() -> dict[str, str]:
    """Says how the op library was built; empty when this install has none."""
    try:
        module = importlib.import_module("cosmos3_fast._build_info")
    except ImportError:
        return {}
    return dict(module.build_info())


def _built_and_found() -> str:
    built = build_info()
    return (
        f"built with torch {built.get('torch')} for torch >= {built.get('torch_abi_target')}, "
        f"CUDA {built.get('cuda') or 'none'}; found torch {torch.__version__}, "
        f"CUDA {torch.version.cuda or 'none'}"
    )


def _load_library() -> str | None:
    """Loads the compiled library; returns None, or why there is none."""
    folder = Path(__file__).parent.parent
    libraries = sorted(folder.glob("_C*.so"))
    if not libraries:
        reason = folder / "_not_built.txt"
        return reason.read_text().strip() if reason.exists() else "this install has no library"
    path = str(libraries[0])
    # Loading it all the same ends the process: the second copy's initialisation is left half done.
    if path not in torch.ops.loaded_libraries and hasattr(torch.ops.cosmos3, "prepare_latents"):
        raise ImportError(
            f"{path} cannot define torch.ops.cosmos3, which this process has already: another copy "
            "of cosmos3_fast is loaded. Remove one of the two"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{libraries[0].name} does not load: {error} ({_built_and_found()})"
    return None


LIBRARY_ERROR = _load_library()
_definitions = torch.library.Library("cosmos3", "DEF" if LIBRARY_ERROR else "FRAGMENT")


def _overload(op: str) -> Any:
    name, _, overload = op.partition(".")
    return getattr(getattr(torch.ops.cosmos3, name), overload or "default")


def _is_defined(op: str) -> bool:
    name, _, overload = op.partition(".")
    packet = getattr(torch.ops.cosmos3, name, None)
    return packet is not None and (overload or "default") in packet.overloads()


_python_kernels: dict[tuple[str, str], Kernel] = {}


def _library_serves(op: str, device: str) -> bool:
    return LIBRARY_ERROR is None and REGISTERED[op].has_kernel_for_dispatch_key(device.upper())


def _define_keep_memory() -> Kernel:
    """Gives the op that `unobserved` calls; one that does nothing where the library has none."""
    schema = "keep_memory(bool keep) -> ()"
    SCHEMAS.append(schema)
    if not _is_defined("keep_memory"):
        _definitions.define(schema)
        _definitions.impl("keep_memory", lambda keep: None, "CompositeExplicitAutograd")
    return _torch.callable_of(_overload("keep_memory"))


_keep_memory = _define_keep_memory()


def register(
    schema: str,
    check: Kernel,
    *,
    eager: Kernel,
    triton: str | None = None,
    example: Callable[[str], tuple[Any, ...]] | None = None,
) -> None:
    """Gives an op its Python backends, for use by name and where the library does not serve.

    Args:
        schema: as beside the op's CPU kernel, for installs without the library; a test compares
            the two.
        check: takes the op's arguments; raises if they do not fit.
        eager, triton: take the same arguments; `triton` as "module:function" below
            `cosmos3_fast.ops.triton`, imported at the first call, or None if there is none.
        example: takes a device and gives the arguments of a small call, floats in float64 where
            the op takes it: what the tests of all ops at once call it with.
    """
    op = schema.split("(", maxsplit=1)[0]
    if not _is_defined(op):  # no library, or one that was built before the op came
        _definitions.define(schema)
    SCHEMAS.append(schema)
    OPS.append(op)
    REGISTERED[op] = _overload(op)
    _DIRECT[op] = _torch.callable_of(REGISTERED[op])
    CHECKS[op] = check
    REFERENCES[op] = eager
    if example is not None:
        EXAMPLES[op] = example
    LIBRARY_KERNELS.update((op, device) for device in DEVICES if _library_serves(op, device))

    def run_eager(*args: Any) -> Any:
        check(*args)
        with torch.no_grad():
            return eager(*args)

    _python_kernels[op, "eager"] = run_eager
    if triton is not None:
        module, function = triton.split(":")

        @functools.cache
        def triton_kernel() -> Kernel:
            return getattr(importlib.import_module(f"cosmos3_fast.ops.triton.{module}"), function)

        def run_triton(*args: Any) -> Any:
            check(*args)
            # Triton launches on the current device, which need not be the tensors'.
            device = args[0].device
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                return triton_kernel()(*args)

        _python_kernels[op, "triton"] = run_triton

    def run_cuda(*args: Any) -> Any:
        # Chosen at the call: until then Triton is not imported.
        return _python_kernels[op, default_backend("cuda", op)](*args)

    if (op, "cpu") not in LIBRARY_KERNELS:
        _definitions.impl(op, run_eager, "CPU")
    if (op, "cuda") not in LIBRARY_KERNELS:
        _definitions.impl(op, run_cuda, "CUDA")


def example_tensor(device: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Makes values in (-1, 1), none like its neighbors, for the `example` of `register`."""
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1, dtype=dtype, device=device).sin().reshape(shape) * 0.9


def register_kernel(op: str, kernel: Kernel, key: str) -> None:
    """Registers what runs above every backend, at the dispatch key `key`.

    Args:
        op: name in the schema, with its overload.
        kernel: takes the keyset of the call, for `_torch.redispatch`, and the op's arguments.
        key: name of the dispatch key.
    """
    _definitions.impl(op, kernel, key, with_keyset=True)


def _tensors(args: Iterable[Any]) -> list[Tensor]:
    """The tensors among the arguments of an op, and those of its lists of tensors."""
    found: list[Tensor] = []
    for x in args:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list) and x and isinstance(x[0], Tensor):
            found += x
    return found


def requires_grad(*args: Any) -> bool:
    """Tells whether reverse-mode AD follows one of `args`."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(args))


def has_tangent(*args: Any) -> bool:
    """Tells whether forward-mode AD follows one of `args`."""
    return _torch.forward_mode_is_on() and any(
        forward_ad.unpack_dual(x).tangent is not None for x in _tensors(args)
    )


class _Thread(threading.local):
    """Attributes: unobserved: see `unobserved`."""

    unobserved = False


_thread = _Thread()


class unobserved:
    """Inside, in this thread, ops are called without a question: their arguments are a network's.

    Who enters it has seen that they are plain tensors, that none is differentiated, that nothing is
    compiled, no mode and no transform is on (`_torch.is_watched`), and that no code of a user's
    runs inside.

    Args:
        device: of the network. On a CPU, results of the library's kernels lie where earlier ones
            lay that are gone, until the outermost such context is left (`csrc/cpu/results.cpp`).
    """

    def __init__(self, device: torch.device) -> None:
        self._keeps_memory = device.type == "cpu"

    def __enter__(self) -> None:
        self._before, _thread.unobserved = _thread.unobserved, True
        self._below = _torch.below_autograd()
        self._below.__enter__()
        if self._keeps_memory:
            _keep_memory(True)

    def __exit__(self, *error: object) -> None:
        if self._keeps_memory:
            _keep_memory(False)
        self._below.__exit__(*error)
        _thread.unobserved = self._before


def is_unobserved() -> bool:
    """Tells whether `unobserved` is entered in this thread."""
    return _thread.unobserved


def is_differentiated(*args: Any) -> bool:
    """Tells whether one of `args` is differentiated, in either mode, or a transform runs.

    Then an op that has none cannot be called, nor an `out=` form of torch's.
    """
    if _thread.unobserved:
        return False
    # Of a tensor that a transform batches, torch refuses to say whether it has a tangent.
    return requires_grad(*args) or _torch.in_transform(*_tensors(args)) or has_tangent(*args)


def register_autograd(
    op: str,
    backward: Kernel,
    setup_context: Kernel,
    reference: Kernel,
    signature: Kernel | None = None,
) -> None:
    """Makes `op` differentiable.

    Args:
        op: name in the schema, with its overload.
        backward, setup_context: as `torch.library.register_autograd` takes them; but in
            `ctx.needs_input_grad`, and in what `backward` returns, the tensors of a list stand one
            by one.
        reference: the op in plain torch. It runs in the op's place under forward-mode AD, for
            which `torch.library` has no formula (without it every tangent would be zero), and
            inside nested function transforms.
        signature: what has the op's arguments and their defaults, if `reference` has not.
    """
    overload = REGISTERED[op]
    defaults = [
        each.default for each in inspect.signature(signature or reference).parameters.values()
    ]

    def forward(ctx: Any, *given: Any) -> Any:
        *flat, sizes, keyset = given
        args = _gathered(flat, sizes)
        output = _torch.redispatch(overload, keyset, *args)
        setup_context(ctx, args, output)
        return output

    def gradients(ctx: Any, *of_outputs: Any) -> tuple[Any, ...]:
        found = backward(ctx, *of_outputs)
        return *found, None, None

    function: Any = type(
        op.replace(".", "_"),
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(gradients)},
    )

    def kernel(keyset: Any, *args: Any) -> Any:
        # What equals its default does not come.
        args = (*args, *defaults[len(args) :])
        if _torch.in_transform(*_tensors(args)) or has_tangent(*args):
            CHECKS[op](*args)
            return reference(*args)
        if requires_grad(*args):
            # torch follows what stands by itself, and not in a list.
            flat, sizes = _spread(args)
            return function.apply(*flat, sizes, keyset)
        return _torch.redispatch(overload, keyset, *args)

    register_kernel(op, kernel, "Autograd")


def _spread(args: tuple[Any, ...]) -> tuple[list[Any], list[int | None]]:
    """The arguments with the tensors of each list one by one, and the lists' lengths."""
    flat: list[Any] = []
    sizes: list[int | None] = []
    for x in args:
        is_list = isinstance(x, list) and bool(x) and isinstance(x[0], Tensor)
        flat += x if is_list else [x]
        sizes.append(len(x) if is_list else None)
    return flat, sizes


def _gathered(flat: list[Any], sizes: list[int | None]) -> tuple[Any, ...]:
    """What `_spread` was given."""
    rest = iter(flat)
    return tuple(
        next(rest) if size is None else [next(rest) for _ in range(size)] for size in sizes
    )


def refuse_autograd(op: str, reason: str) -> None:
    """Makes `op` raise a RuntimeError, which says `reason`, where an argument is differentiated."""

    def kernel(keyset: Any, *args: Any) -> Any:
        if requires_grad(*args) or has_tangent(*args):
            raise RuntimeError(f"{op}: {reason}")
        return _torch.redispatch(REGISTERED[op], keyset, *args)

    register_kernel(op, kernel, "Autograd")


@functools.cache
def triton_error() -> str | None:
    """Says why Triton cannot be imported; None if it can."""
    try:
        importlib.import_module("triton")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def default_backend(device: torch.device | str = "cpu", op: str = "prepare_latents") -> str:
    """Names the backend behind `torch.ops.cosmos3.<op>` on `device`: "cpp", "triton" or "eager"."""
    kind = torch.device(device).type
    if (op, kind) in LIBRARY_KERNELS:
        return "cpp"
    has_triton = (op, "triton") in _python_kernels
    return "triton" if kind == "cuda" and has_triton and triton_error() is None else "eager"


def backend_error(
    backend: str, device: torch.device | str = "cpu", op: str = "prepare_latents"
) -> str | None:
    """Says why `backend` cannot serve `op` on `device`, with the original error; None if it can.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
    """
    kind = torch.device(device).type
    if backend == "eager":
        return None
    if backend == "cpp":
        if LIBRARY_ERROR is not None or (op, kind) in LIBRARY_KERNELS:
            return LIBRARY_ERROR
        return f"the library was built without a {kind} kernel of {op} ({_built_and_found()})"
    if backend == "triton":
        if (op, "triton") not in _python_kernels:
            return f"there is no Triton kernel of {op}"
        if triton_error() is None and kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton runs on the CPU only under TRITON_INTERPRET=1"
        return triton_error()
    raise ValueError(f"backend must be None or one of {BACKENDS}, got {backend!r}")


def _needs_all_layers(args: tuple[Any, ...]) -> bool:
    """Tells whether gradients, tracing or modes have to see the call, besides its kernel."""
    return (
        _torch.is_watched()
        or any(type(x) not in PLAIN_TENSORS for x in _tensors(args))
        or requires_grad(*args)
    )


def call(op: str, *args: Any) -> Any:
    """Calls the registered op, below its Python autograd layer where nobody needs that layer."""
    if _thread.unobserved:
        return _DIRECT[op](*args)
    if (
        torch.compiler.is_compiling()  # first: what follows cannot be traced
        or torch.is_inference_mode_enabled()  # the dispatcher goes below that layer by itself
        or _needs_all_layers(args)
    ):
        return REGISTERED[op](*args)
    with _torch.below_autograd():
        return REGISTERED[op](*args)


def select(op: str, backend: str | None, device: torch.device) -> Kernel:
    """Gives what to call for `op` on `device`: the registered op, or a backend asked for by name.

    Raises:
        ValueError: `backend` is not None nor one of `BACKENDS`.
        BackendUnavailableError: it cannot serve here; quotes the original error.
    """
    if backend is None:
        return functools.partial(call, op)
    name = op.partition(".")[0]
    if (error := backend_error(backend, device, op)) is not None:
        raise BackendUnavailableError(
            f"cosmos3_fast backend {backend!r} cannot run {name} on {device}: {error}"
        )
    if backend == default_backend(device, op):
        return functools.partial(call, op)
    return _python_kernels[op, backend]
