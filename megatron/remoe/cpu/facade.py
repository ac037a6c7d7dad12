"""Replace the name `torch` inside Megatron's modules on a machine without an accelerator.

Megatron names CUDA throughout: `torch.cuda.current_device()`, `device="cuda"`. Here its modules see a copy of the torch
module whose `cuda` is one device, the CPU, and whose tensor factories read "cuda" as "cpu". torch itself and all other
packages keep the real module. Name lookups cost the same as before, so no tensor operation gets slower.
"""

import contextlib
import functools
import importlib.abc
import importlib.util
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")
FACTORIES = tuple(
    "arange as_tensor empty empty_like eye full full_like linspace ones ones_like rand randint randn randperm tensor "
    "zeros zeros_like".split()
)
# Megatron 0.19 imports flash-linear-attention here if it is installed. That takes a second, and its kernels need a GPU.
IMPORTS_FLA = "megatron.core.ssm.gated_delta_net.common"


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    pass


class Stream:
    """A CUDA stream or event on a device that runs everything in order: nothing waits, and elapsed times are 0."""

    __init__ = synchronize = wait = wait_event = wait_stream = record = _nothing

    def record_event(self, event: "Stream | None" = None) -> "Stream":
        return event or self

    def elapsed_time(self, _end: "Stream") -> float:
        return 0.0


def _cuda() -> types.ModuleType:
    stream = Stream()
    rng = {
        "get_rng_state": lambda *_args, **_kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *_args, **_kwargs: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
    }
    return _copy(
        types.ModuleType("torch.cuda"),
        torch.cuda,
        **rng,
        random=types.SimpleNamespace(**rng),
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: CPU,
        set_device=_nothing,
        get_device_capability=lambda *_args: (9, 0),
        get_device_name=lambda *_args: "cpu",
        get_device_properties=lambda *_args: types.SimpleNamespace(
            major=9, minor=0, name="cpu", total_memory=0, multi_processor_count=1
        ),
        synchronize=_nothing,
        Stream=Stream,
        Event=Stream,
        stream=lambda _stream=None: contextlib.nullcontext(),
        set_stream=_nothing,
        current_stream=lambda *_args: stream,
        default_stream=lambda *_args: stream,
        memory_stats=lambda *_args: defaultdict(int),
        reset_peak_memory_stats=_nothing,
    )


def _copy(copy: types.ModuleType, module: types.ModuleType, **changes: Any) -> types.ModuleType:
    """Fill the module `copy` with the names of `module` and with changes; return it."""
    copy.__dict__.update({name: value for name, value in vars(module).items() if name != "__getattr__"} | changes)
    return copy


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return create


class _Facade(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        # torch loads some parts on first use.
        return getattr(torch, name)


class _FacadeFinder(importlib.abc.MetaPathFinder):
    """Set the facade in each module of Megatron that is imported later, right after the module's code has run."""

    def __init__(self, facade: types.ModuleType) -> None:
        self.facade = facade

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if not fullname.startswith("megatron."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return spec
        run = spec.loader.exec_module

        def run_and_replace(module: types.ModuleType) -> None:
            hides = fullname == IMPORTS_FLA and "fla" not in sys.modules
            if hides:
                sys.modules["fla"] = None  # type: ignore[assignment]
            run(module)
            if hides:
                del sys.modules["fla"]
            replace_torch(module, self.facade)

        spec.loader.exec_module = run_and_replace  # type: ignore[method-assign]
        return spec


def replace_torch(module: types.ModuleType, facade: types.ModuleType) -> None:
    """Set the module's global name `torch` to the facade, if it has that name."""
    if vars(module).get("torch") is torch:
        module.torch = facade  # type: ignore[attr-defined]


def install_facade() -> bool:
    """Replace `torch` in all modules of Megatron, including those imported later. Return False if it has been replaced.

    The facade equals torch except for `cuda` and the tensor factories.
    """
    if any(isinstance(finder, _FacadeFinder) for finder in sys.meta_path):
        return False
    factories = {name: _on_cpu(getattr(torch, name)) for name in FACTORIES}
    facade = _copy(_Facade("torch"), torch, **factories, cuda=_cuda())
    sys.meta_path.insert(0, _FacadeFinder(facade))
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and not name.startswith("megatron.remoe.cpu"):
            replace_torch(module, facade)
    return True
