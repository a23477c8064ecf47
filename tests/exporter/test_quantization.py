"""Which layers are rounded, and to what."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from tokexport.errors import RecipeError
from tokexport.exporter.modules.rounding import round_layers, rounded_to_bytes
from tokexport.exporter.quantization import INT8_LARGEST, Kind, QuantizedLayer, quantized_layers, require_layers
from tokexport.recipes.schema import Bits, QuantizeTable


def weights(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    spread = np.geomspace(0.1, 10, columns)
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * spread).astype(np.float32)


def layer(bits: Bits = "int8", kind: Kind = "matrix", block_size: int = 16) -> QuantizedLayer:
    return QuantizedLayer(kind=kind, bits=bits, block_size=block_size)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 8) for _ in range(2))
        self.lm_head = nn.Linear(32, 16, bias=False)
        self.norm = nn.LayerNorm(32)
        self.words = nn.Embedding(5, 32)
        self.stages = nn.ModuleDict({"learned": nn.Linear(32, 4)})


# Numbers


def test_a_channel_of_int8_is_off_by_half_a_step_at_most():
    weight = weights(40, 12)
    rounded = layer().round(weight)
    assert rounded.values.dtype == np.int8
    assert (np.abs(rounded.values).max(axis=0) == INT8_LARGEST).all()
    assert rounded.scale.shape == (1, 12)
    assert (np.abs(rounded.restored() - weight) <= rounded.scale * 0.5001).all()


def test_two_products_of_bytes_fit_into_sixteen_bits():
    """What processors without dot products of bytes add them in."""
    assert 2 * 255 * INT8_LARGEST <= np.iinfo(np.int16).max < 2 * 255 * 127


def test_a_row_of_a_table_has_a_scale_of_its_own():
    table = weights(12, 40).T.copy()
    rounded = layer(kind="table").round(table)
    assert rounded.scale.shape == (40, 1)
    assert (np.abs(rounded.restored() - table) <= rounded.scale * 0.5001).all()


def test_a_channel_of_zeros_stays_one():
    weight = weights(40, 12)
    weight[:, 3] = 0
    for bits in ("int8", "int4"):
        assert not layer(bits).round(weight).restored()[:, 3].any()


@pytest.mark.parametrize(("rows", "columns"), [(32, 6), (33, 5), (16, 1), (7, 3)])
def test_int4_stands_for_what_the_operator_makes_of_it(rows: int, columns: int):
    weight = weights(rows, columns)
    rounded = layer("int4").round(weight)
    packed = helper.make_tensor("w", TensorProto.INT4, weight.shape, rounded.values.reshape(-1).tolist())
    node = helper.make_node("DequantizeLinear", ["w", "s"], ["y"], axis=0, block_size=16)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, weight.shape)
    graph = helper.make_graph([node], "g", [], [output], [packed, numpy_helper.from_array(rounded.scale, "s")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert (np.asarray(session.run(None, {})[0]) == rounded.restored()).all()
    steps = rounded.scale.repeat(16, axis=0)[:rows]
    # One end of the range has a step less than the other.
    assert (np.abs(rounded.restored() - weight) <= np.abs(steps) * 1.0001).all()
    assert set(np.unique(rounded.values)) <= set(range(-8, 8))


@pytest.mark.parametrize("values", [[-1.0, 0.3, 2.0], [0.1, 0.2, 0.7], [-3.0, -0.5], [0.0, 0.0], [1e-3, 5.0, -5.0]])
def test_inputs_are_rounded_as_the_operator_does(values: list[float]):
    x = np.concatenate((np.array(values), np.linspace(min(values), max(values), 997))).astype(np.float32)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    interface = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", interface[:1], interface[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = np.asarray(session.run(None, {"x": x})[0])
    found = rounded_to_bytes(torch.from_numpy(x)).numpy()
    # A value between two steps may fall to either.
    step = (max(*values, 0) - min(*values, 0)) / 255
    assert np.abs(found - expected).max() <= step * 1.001
    assert (np.abs(found - expected) > 1e-6).mean() < 0.02


# Layers


def names(table: QuantizeTable) -> set[str]:
    return set(quantized_layers("decoder_model_merged", Small(), table))


def test_matrices_are_rounded_and_nothing_else():
    assert names(QuantizeTable(decoder="int8")) == {"layers.0.weight", "layers.1.weight", "lm_head.weight"}
    assert not names(QuantizeTable(vision_encoder="int8", embed_tokens="int8"))


def test_what_a_recipe_keeps_is_not_rounded():
    assert names(QuantizeTable(decoder="int4", keep=("lm_head", "layers.1*"))) == {"layers.0.weight"}


def test_a_name_of_no_layer_is_told():
    with pytest.raises(RecipeError, match=r"^\[quantize\] keep: no layer is called 'lm_haed'; did you mean 'lm_head'"):
        require_layers({"decoder_model_merged": Small()}, QuantizeTable(decoder="int8", keep=("lm_haed",)))
    require_layers({"decoder_model_merged": Small()}, QuantizeTable(decoder="int8", keep=("layers.*",)))
    deep = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(40))})
    with pytest.raises(RecipeError, match=r"no layer is called 'nope'; choose one of: layers\.\*\.0$"):
        require_layers({"decoder_model_merged": deep}, QuantizeTable(decoder="int8", keep=("nope",)))


def test_a_rounded_module_computes_with_what_the_numbers_stand_for():
    module = Small()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    round_layers("decoder_model_merged", module, QuantizeTable(decoder="int8", keep=("layers.1",)))
    rounded = layer().round(before["lm_head.weight"].T.numpy()).restored().T
    torch.testing.assert_close(module.lm_head(x), rounded_to_bytes(x) @ torch.from_numpy(rounded).T)
    assert not torch.equal(module.lm_head.weight, before["lm_head.weight"])
    torch.testing.assert_close(module.layers[1](x), x @ before["layers.1.weight"].T + before["layers.1.bias"])


def test_int4_does_not_round_inputs():
    module = Small()
    round_layers("decoder_model_merged", module, QuantizeTable(decoder="int4"))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module.lm_head(x), x @ module.lm_head.weight.T)
