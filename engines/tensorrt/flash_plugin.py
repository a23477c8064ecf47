"""Our flash attention inside of TensorRT, as a quickly deployable plugin compiled ahead of time.

TensorRT's Python API takes a plugin as three functions: the shapes of its outputs, the precisions that it takes, and a
compiled kernel with how it is launched. The kernel becomes part of the engine, which runs without Python. One kernel
serves prompts and single tokens. Of the two libraries, only the datacenter one has plugins.
"""

import re
from typing import Any

import torch

from tokexport.engines.tensorrt.library import Library
from tokexport.errors import BackendUnavailableError
from tokexport.exporter.passes.flash_attention_op import DOMAIN, OPERATOR
from tokexport.exporter.plan import VlmSpec

_ENTRY = re.compile(r"(?P<head>\.entry \w+\()(?P<parameters>[^)]*)(?P<tail>\))")
_SHORT = {"float16": "FP16", "bfloat16": "BF16"}


def register_flash_attention(library: Library, spec: VlmSpec, dtype: str, capability: str) -> None:
    """Tell TensorRT how our operator is computed on a GPU; to be called once, before a graph is parsed.

    Args:
        library: the TensorRT that builds.
        spec: heads and their width.
        dtype: of queries, keys and values.
        capability: compute capability of the GPU, e.g. 9.0.

    Raises:
        BackendUnavailableError: the library has no plugins, or Triton is missing.
        InputError: a head width that there are no kernels for.
    """
    plugins, kernels = _plugins(library), _kernels()
    precision: torch.dtype = getattr(torch, dtype)
    kernels.require_made_for(spec.head_dim, precision)
    heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
    name = f"{DOMAIN}::{OPERATOR}"

    # TensorRT reads the names of arguments, and checks annotations where there are any.
    def describe(query: Any, key: Any, value: Any, length: Any) -> Any:
        return query.like()

    def precisions(query: Any, key: Any, value: Any, length: Any, outputs: Any) -> Any:
        half = _SHORT[dtype]
        return [plugins.AutoTuneCombination(f"{half}, {half}, {half}, INT64, {half}", "LINEAR")]

    def kernel(query: Any, key: Any, value: Any, length: Any, outputs: Any, tactic: int) -> Any:
        made = kernels.compiled("plugin", int(capability.replace(".", "")), precision, *heads)
        batch, num_heads, num_new, _ = (query.shape_expr[axis] for axis in range(4))
        launch = plugins.KernelLaunchParams()
        launch.grid_x, launch.grid_y = kernels.plugin_grid(num_new, batch * num_heads)
        launch.block_x = made.metadata.num_warps * 32
        launch.shared_mem = made.metadata.shared
        numbers = plugins.SymIntExprs.from_tuple(
            [plugins.SymInt32(expression) for expression in (num_new, key.shape_expr[2])]
        )
        text = without_unread_parameters(made.asm["ptx"])
        return made.metadata.name.encode(), text.encode(), launch, numbers

    plugins.register(name)(describe)
    plugins.autotune(name)(precisions)
    plugins.aot_impl(name)(kernel)


def without_unread_parameters(ptx: str) -> str:
    """Return a kernel without the parameters at its end that it does not read.

    Triton gives every kernel two for scratch memory. Who launches one without Triton does not know of them, and a
    launch reads as many as the kernel declares.
    """
    found = _ENTRY.search(ptx)
    assert found is not None
    parameters = found["parameters"].split(",")
    while parameters and len(re.findall(rf"\b{parameters[-1].split()[-1]}\b", ptx)) == 1:
        parameters.pop()
    return f"{ptx[: found.start('parameters')]}{','.join(parameters)}\n{ptx[found.start('tail') :]}"


def require_plugins(library: Library) -> None:
    """Find out before the work whether attention can be a plugin.

    Raises:
        BackendUnavailableError: the library has no plugins, or Triton is missing.
    """
    _plugins(library)
    _kernels()


def _plugins(library: Library) -> Any:
    from importlib import import_module

    name = f"{library.module.__name__}.plugin"
    try:
        return import_module(name)
    except ImportError as error:
        raise BackendUnavailableError(
            f"{library.backend} {library.version} has no plugins written in Python ({name} is missing); leave out "
            "--attention plugin, or compile with --backend tensorrt"
        ) from error


def _kernels() -> Any:
    try:
        from tokexport.engines.tensorrt import flash_attention
    except ImportError as error:
        raise BackendUnavailableError(
            "--attention plugin needs Triton; install it with: pip install 'tokexport[plugin]'"
        ) from error
    return flash_attention
