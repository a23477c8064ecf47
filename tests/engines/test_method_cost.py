"""What a method costs by itself: counted from the graph, and cut out of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from tests.conftest import recipe_for
from tokexport.engines.method_cost import _cut_out, _scopes, _sizes, _vision_encoder, measure_methods, method_contents
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.export import design
from tokexport.recipes.schema import Recipe

METACOMPRESS: dict[str, object] = {"method": "metacompress", "keep": 6, "width": 8, "weights": "untrained"}
TOKENS, WIDTH, KEPT, SCORE_WIDTH = 16, 64, 6, 8


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, exported: Callable[[Recipe], Bundle]) -> Bundle:
    return exported(recipe_for(checkpoint, METACOMPRESS))


def test_parameters_and_products_are_counted(bundle: Bundle):
    contents = method_contents(bundle)["metacompress"]
    assert contents["parameters"] == 2 * WIDTH * SCORE_WIDTH + SCORE_WIDTH
    projections = (TOKENS + KEPT) * WIDTH * SCORE_WIDTH
    scores, mixing = KEPT * TOKENS * SCORE_WIDTH, KEPT * TOKENS * WIDTH
    assert contents["flops"] == 2 * (projections + scores + mixing)
    assert contents["nodes"] > 5


def test_what_is_cut_out_computes_what_the_module_does(bundle: Bundle):
    made = design(bundle.recipe)
    stage = made.methods[0].feature_stage(made.model.spec, made.plans[0])
    assert stage is not None
    stage.load_state_dict(dict(made.methods[0].learned(made.model.spec, made.plans[0])), strict=False)
    whole = _vision_encoder(bundle)
    part = _cut_out(whole, _scopes(bundle, whole)["metacompress"])
    features = np.random.default_rng(0).standard_normal((1, TOKENS, WIDTH)).astype(np.float32)
    feeds = {
        str(value.name): features if value.dtype == ir.DataType.FLOAT else np.ones(_sizes(value), np.int64)
        for value in part.graph.inputs
    }
    session = onnxruntime.InferenceSession(ir.to_proto(part).SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, feeds)
    with torch.no_grad():
        expected = stage(torch.from_numpy(features)).numpy()
    assert np.asarray(found).shape == (1, KEPT, WIDTH)
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5)


def test_every_run_is_measured(bundle: Bundle):
    runs = measure_methods(bundle, threads=1, repeats=4)["metacompress"]
    assert len(runs) == 4
    assert min(runs) > 0


def test_a_method_inside_the_language_model_has_no_part_in_the_vision_encoder(tiny_adsc: Bundle, tiny_full: Bundle):
    assert method_contents(tiny_adsc) == {}
    assert method_contents(tiny_full) == {}
    assert measure_methods(tiny_adsc, threads=1, repeats=1) == {}


def test_a_method_without_parameters_has_none(checkpoint: Path, exported: Callable[[Recipe], Bundle]):
    contents = method_contents(exported(recipe_for(checkpoint, {"method": "sample", "keep": 4})))
    assert contents == {"sample": {"nodes": contents["sample"]["nodes"], "parameters": 0, "flops": 0}}
