"""Our attention as a plugin: what TensorRT is told of it, as far as can be seen without TensorRT's plugins."""

import multiprocessing
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.conftest import NUM_LAYERS, adsc, recipe_for
from tokexport.engines.backend import SessionOptions, load_backend
from tokexport.engines.tensorrt.dialect import rewritten_decoder
from tokexport.engines.tensorrt.library import Library
from tokexport.errors import BackendUnavailableError, InputError
from tokexport.exporter.bundle import Bundle

pytest.importorskip("triton")

from triton import knobs

from tokexport.engines.tensorrt import flash_attention as kernels
from tokexport.engines.tensorrt.flash_plugin import register_flash_attention, without_unread_parameters

SPEC: Any = SimpleNamespace(num_heads=8, num_kv_heads=2, head_dim=64)


@pytest.fixture(scope="module")
def attend() -> Iterator[Callable[..., Tensor]]:
    """Return the plugin's kernel in Triton's interpreter, which a process chooses before it imports Triton."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield lambda *given: pool.submit(kernels.plugin_attention, *given).result()


@pytest.mark.parametrize(("num_new", "length"), [(1, 1), (1, 70), (5, 5), (66, 129)])
def test_one_kernel_serves_prompts_and_single_tokens(attend: Callable[..., Tensor], num_new: int, length: int):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, num_new, 64, generator=generator)
    key, value = torch.randn(2, 1, 2, 140, 64, generator=generator)
    found = attend(query, key, value, torch.tensor([length]))
    seen = torch.ones(num_new, length, dtype=torch.bool).tril(length - num_new)
    expected = functional.scaled_dot_product_attention(
        query, key[:, :, :length], value[:, :, :length], attn_mask=seen, enable_gqa=True
    )
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)


class Description:
    """What TensorRT hands over of a tensor: a shape of expressions, here of numbers."""

    def __init__(self, *shape: int) -> None:
        self.shape_expr = shape

    def like(self) -> "Description":
        return Description(*self.shape_expr)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand in for ``tensorrt.plugin``, and return what it is told, by function and operator."""
    told: dict[str, Any] = {}
    plugins = ModuleType("stand_in.plugin")

    def decorator(kind: str) -> Callable[[str], Callable[[Any], Any]]:
        return lambda name: lambda function: told.setdefault(f"{kind} {name}", function)

    for kind in ("register", "autotune", "aot_impl"):
        setattr(plugins, kind, decorator(kind))
    plugins.__dict__.update(
        AutoTuneCombination=lambda *given: given,
        KernelLaunchParams=SimpleNamespace,
        SymInt32=int,
        SymIntExprs=SimpleNamespace(from_tuple=list),
    )
    monkeypatch.setitem(sys.modules, "stand_in", ModuleType("stand_in"))
    monkeypatch.setitem(sys.modules, "stand_in.plugin", plugins)
    register_flash_attention(Library(sys.modules["stand_in"], "tensorrt", "11"), SPEC, "float16", "9.0")
    return told


def test_tensorrt_is_told_shapes_precisions_and_kernel(told: dict[str, Any]):
    assert list(told) == [f"{kind} tokexport::FlashAttention" for kind in ("register", "autotune", "aot_impl")]
    given = (Description(1, 8, 130, 64), Description(1, 2, 700, 64), Description(1, 2, 700, 64), Description(1))
    assert told["register tokexport::FlashAttention"](*given).shape_expr == (1, 8, 130, 64)
    combination = told["autotune tokexport::FlashAttention"](*given, ())
    assert combination == [("FP16, FP16, FP16, INT64, FP16", "LINEAR")]
    name, ptx, launch, numbers = told["aot_impl tokexport::FlashAttention"](*given, (), 0)
    # Three blocks of 64 for 130 queries, a row for each head, four warps.
    assert (launch.grid_x, launch.grid_y, launch.block_x) == (3, 8, 128)
    assert launch.shared_mem > 0
    assert numbers == [130, 700]
    assert f".entry {name.decode()}(".encode() in ptx
    assert b".target sm_90" in ptx


@pytest.mark.parametrize("capability", kernels.CAPABILITIES)
def test_a_kernel_has_the_parameters_that_tensorrt_gives_it(capability: int, tmp_path: Path):
    made = kernels.compiled("plugin", capability, torch.float16, 8, 2, 64)
    ptx = without_unread_parameters(made.asm["ptx"])
    entry = ptx[ptx.index(".entry") : ptx.index(".reqntid")]
    # Queries, keys, values, lengths; new tokens and capacity; the output.
    assert re.findall(r"\.param \.(\w+)", entry) == ["u64"] * 4 + ["u32"] * 2 + ["u64"]
    assert len(re.findall(r"\.param ", made.asm["ptx"][: made.asm["ptx"].index(".reqntid")])) == 9
    assert ".version 8.7" in ptx
    (tmp_path / "kernel.ptx").write_text(ptx)
    # Some are for one GPU alone, and called sm_90a.
    target = re.findall(rf"\.target (sm_{capability}a?)", ptx)[0]
    assembler = [knobs.nvidia.ptxas.path, f"-arch={target}", "kernel.ptx", "-o", "kernel.cubin"]
    subprocess.run(assembler, cwd=tmp_path, check=True)


def test_a_parameter_that_is_read_stays():
    ptx = ".entry k(\n\t.param .u64 k_param_0,\n\t.param .u64 k_param_1,\n\t.param .u64 k_param_2\n)\n{ [k_param_1] }"
    assert re.findall(r"k_param_\d", without_unread_parameters(ptx).partition("{")[0]) == ["k_param_0", "k_param_1"]


def test_the_graph_names_the_plugin(tiny_adsc: Bundle):
    dialect = rewritten_decoder(tiny_adsc, [48, 40, 36], "plugin")
    model = onnx.load_from_string(dialect.graph)
    nodes = [node for node in model.graph.node if node.op_type == "FlashAttention"]
    assert len(nodes) == dialect.operators["FlashAttention"] == NUM_LAYERS
    assert dialect.operators["Attention"] == 0
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in nodes[0].attribute}
    assert attributes == {"plugin_namespace": b"tokexport", "plugin_version": b"1", "aot": 1}
    # A parser that finds a function of this name would take it instead.
    assert not model.functions


@pytest.mark.usefixtures("told")
def test_heads_without_a_kernel_are_refused():
    spec: Any = SimpleNamespace(num_heads=8, num_kv_heads=2, head_dim=48)
    library = Library(sys.modules["stand_in"], "tensorrt", "11")
    with pytest.raises(InputError, match=r"^heads of width 48 in torch\.float16: flash attention is made for"):
        register_flash_attention(library, spec, "float16", "9.0")


def test_a_library_without_plugins_is_refused(checkpoint: Path, exported: Any):
    pytest.importorskip("tensorrt_rtx")
    bundle, compiler = exported(recipe_for(checkpoint, adsc(), dtype="float16")), load_backend("tensorrt-rtx")
    options, before = SessionOptions(max_text_tokens=40, max_images=2), sorted(bundle.path.rglob("*"))
    with pytest.raises(BackendUnavailableError, match=r"has no plugins written in Python .* --backend tensorrt$"):
        compiler.compile(bundle, options, capability="8.6", attention="plugin")  # pyright: ignore[reportAttributeAccessIssue]
    # Other tests may have compiled the same artefact.
    assert sorted(bundle.path.rglob("*")) == before
