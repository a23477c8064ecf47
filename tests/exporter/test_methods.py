"""Compression methods: which tokens they keep, what they refuse, and what holds for every one of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from tests.conftest import IMAGE_SIZE, NUM_LAYERS, NUM_VISION_TOKENS, adsc, recipe_for
from tokexport.errors import RecipeError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.drops import Drop
from tokexport.exporter.export import design
from tokexport.exporter.family import list_families
from tokexport.exporter.method import (
    Method,
    arriving_plans,
    list_methods,
    load_methods,
    method_summary,
    plan_tokens,
    tables_of,
)
from tokexport.exporter.methods.adsc import Adsc
from tokexport.exporter.methods.random import Random
from tokexport.exporter.methods.resize import Resize
from tokexport.exporter.methods.sample import Sample
from tokexport.exporter.modules.bottleneck import FeatureGather
from tokexport.exporter.plan import TokenPlan, VlmSpec
from tokexport.recipes.schema import CompressTable, Recipe

Steps = Sequence[Mapping[str, object]]

# 4 x 4 vision tokens and 4 layers: two that thin nothing, then what each case says.
SPEC = VlmSpec(
    family="llava15",
    num_layers=4,
    hidden_size=8,
    intermediate_size=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=8,
    max_positions=64,
    image_size=56,
    vision_grid=(4, 4),
    class_token_layers=2,
)
FULL = TokenPlan.uncompressed(SPEC)

# Every method in every form that changes what a graph looks like. A new method must be added here.
EXAMPLES: dict[str, Sequence[Steps]] = {
    "adsc": [
        [adsc()],
        [adsc(pattern="grid")],
        [adsc(positions="renumber")],
        [{"method": "adsc", "drops": [{"layer": 0, "keep": 6}]}],
    ],
    "cdpruner": [[{"method": "cdpruner", "keep": 5}], [{"method": "cdpruner", "keep": 5, "relevance": "none"}]],
    "divprune": [[{"method": "divprune", "keep": 5}]],
    "fastv": [[{"method": "fastv", "keep": 5}]],
    "metacompress": [
        [{"method": "metacompress", "keep": 6, "weights": "untrained"}],
        [
            {"method": "metacompress", "keep": 7, "pattern": "stride", "width": 8, "weights": "untrained"},
            {"method": "adsc", "drops": [{"layer": 2, "keep": 5}]},
        ],
    ],
    "pool": [[{"method": "pool", "keep": 4}], [{"method": "pool", "keep": 5, "pattern": "stride"}]],
    "prumerge": [[{"method": "prumerge", "keep": 6, "neighbours": 4}]],
    "pyramiddrop": [[{"method": "pyramiddrop", "drops": [{"layer": 1, "keep": 9}, {"layer": 3, "keep": 4}]}]],
    "random": [[{"method": "random", "keep": 5}]],
    "relevance": [
        [{"method": "relevance", "keep": 6, "weights": "untrained", "channels": [4, 8], "kernel": 3}],
        [
            {"method": "sample", "keep": 8, "positions": "keep"},
            {"method": "relevance", "keep": 6, "weights": "untrained", "channels": [4]},
        ],
    ],
    "resize": [
        [{"method": "resize", "keep": 9}],
        [
            {"method": "resize", "keep": 9},
            {"method": "adsc", "drops": [{"layer": 1, "keep": 6}, {"layer": 3, "keep": 4}], "pattern": "grid"},
        ],
    ],
    "sample": [
        [{"method": "sample", "keep": 8}, {"method": "adsc", "drops": [{"layer": 2, "keep": 5}]}],
        [{"method": "sample", "keep": 6, "positions": "keep"}],
        [{"method": "sample", "keep": 6, "pattern": "grid", "positions": "keep"}],
    ],
    "sparsevlm": [[{"method": "sparsevlm", "drops": [{"layer": 1, "keep": 9}, {"layer": 3, "keep": 4}]}]],
    "visionzip": [[{"method": "visionzip", "keep": 7, "contextual": 3}]],
    "vscan": [[{"method": "vscan", "keep": 9, "window": 2, "local_layer": 0, "layer": 2, "keep_inside": 4}]],
}
CASES = [steps for example in EXAMPLES.values() for steps in example]
# Forms that other forms leave no doubt about are planned, but not traced once more.
TRACED = [
    [adsc()],
    EXAMPLES["adsc"][3],
    *(steps for name, forms in EXAMPLES.items() if name != "adsc" for steps in forms),
]


def drops(*pairs: tuple[int, float], **options: object) -> Adsc:
    steps = [{"method": "adsc", "drops": [{"layer": layer, "keep": keep} for layer, keep in pairs], **options}]
    (method,) = load(steps)
    assert isinstance(method, Adsc)
    return method


def load(steps: Steps) -> tuple[Method, ...]:
    return load_methods(
        [
            CompressTable(method=str(step["method"]), options={k: v for k, v in step.items() if k != "method"})
            for step in steps
        ]
    )


def kept_features(method: Method, arriving: TokenPlan = FULL) -> tuple[int, ...]:
    stage = method.feature_stage(SPEC, arriving)
    assert isinstance(stage, FeatureGather)
    return tuple(stage.index_M.tolist())


def name_of(steps: Steps) -> str:
    return " then ".join(str(step["method"]) for step in steps)


# --- ADSC by hand


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (drops((1, 8)), {1: (0, 2, 4, 6, 8, 10, 12, 14)}),
        (drops((1, 8), (3, 4)), {1: (0, 2, 4, 6, 8, 10, 12, 14), 3: (0, 2, 4, 6)}),
        (drops((1, 4), phase=0.5), {1: (2, 6, 10, 14)}),
        (drops((1, 5)), {1: (0, 3, 6, 9, 12)}),
        (drops((0, 0.25), (2, 0.5)), {0: (0, 4, 8, 12), 2: (0, 2)}),
        (drops((1, 4), pattern="grid"), {1: (0, 2, 8, 10)}),
        (drops((1, 4), pattern="grid", phase=0.5), {1: (5, 7, 13, 15)}),
        # 8 of 4 x 4 are 2 rows of 4; of these 2 x 4 every second column gives 2 x 2.
        (drops((1, 8), (3, 4), pattern="grid"), {1: (0, 1, 2, 3, 8, 9, 10, 11), 3: (0, 2, 4, 6)}),
    ],
    ids=["stride", "twice", "middle", "uneven", "fractions", "grid", "grid middle", "grid twice"],
)
def test_adsc_keeps_equidistant_tokens(method: Adsc, expected: dict[int, tuple[int, ...]]):
    assert method.indices(SPEC, FULL) == expected


def test_adsc_thins_from_its_layer_on():
    assert drops((1, 8), (3, 4)).plan(SPEC, FULL).per_layer == (16, 8, 8, 4)


def test_a_fraction_is_of_what_arrives_at_its_layer():
    assert drops((1, 0.5), (3, 0.5)).plan(SPEC, FULL).per_layer == (16, 8, 8, 4)


def test_adsc_reckons_with_what_an_earlier_method_left():
    arriving = Sample(keep=8).plan(SPEC, FULL)
    method = drops((0, 4))
    assert method.plan(SPEC, arriving).per_layer == (4, 4, 4, 4)
    assert method.indices(SPEC, arriving) == {0: (0, 2, 4, 6)}


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_a_bottleneck_knows_its_index_and_its_positions(positions: str):
    made = drops((1, 8), (3, 4), positions=positions).bottlenecks(SPEC, FULL)
    assert list(made) == [1, 3]
    assert {bottleneck.positions for bottleneck in made.values()} == {positions}
    assert [tuple(bottleneck.get_buffer("index_M").tolist()) for bottleneck in made.values()] == [
        tuple(range(0, 16, 2)),
        (0, 2, 4, 6),
    ]


@pytest.mark.parametrize(("num_before", "num_vision", "kept"), [(2, 8, [0, 1, 2, 6, 10]), (2, 0, list(range(11)))])
def test_a_bottleneck_thins_only_the_vision_span(num_before: int, num_vision: int, kept: list[int]):
    method = drops((1, 2))
    arriving = FULL.thinned_before_llm(8)
    bottleneck = method.bottlenecks(SPEC, arriving)[1]
    index = bottleneck.choose(None)
    assert bottleneck(torch.arange(11).unsqueeze(0), num_before, num_vision, index).tolist() == [kept]


# --- a model cut short


def test_adsc_moves_with_the_depth_of_the_model():
    method = drops((8, 8), (16, 4), phase=0.5)
    assert method.for_num_layers(32, 16) == replace(method, drops=(Drop(layer=4, keep=8), Drop(layer=8, keep=4)))


def test_adsc_does_not_fit_into_fewer_layers_than_it_has_bottlenecks():
    with pytest.raises(RecipeError, match="3 bottlenecks do not fit into 2 layers"):
        drops((8, 8), (16, 4), (24, 2)).for_num_layers(32, 2)


@pytest.mark.parametrize("method", [Sample(keep=4), Random(keep=4), Resize(keep=4)], ids=["sample", "random", "resize"])
def test_what_happens_before_the_model_does_not_depend_on_its_depth(method: Method):
    assert method.for_num_layers(32, 2) == method


# --- what is refused


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ([{"method": "adsc", "drops": []}], "[[compress]] adsc needs at least one entry in drops, e.g. {layer = 8"),
        ([{"method": "adsc"}], "[[compress]] adsc needs the key 'drops'"),
        ([adsc(phase=1.0)], "[[compress]] adsc phase = 1.0 must be at least 0 and below 1"),
        ([adsc(phase=-0.1)], "[[compress]] adsc phase = -0.1 must be at least 0 and below 1"),
        ([adsc(pattern="gird")], "[[compress]] adsc pattern = \"gird\" is not known; did you mean 'grid'?"),
        ([adsc(positions="kept")], "[[compress]] adsc positions = \"kept\" is not known; did you mean 'keep'?"),
        ([adsc(patern="grid")], "[[compress]] adsc has no key 'patern'; did you mean 'pattern'?"),
        (
            [{"method": "adsc", "drops": [{"layer": 1, "kep": 8}]}],
            "[[compress]] adsc drops[0] has no key 'kep'; did you mean 'keep'?",
        ),
        (
            [{"method": "adsc", "drops": [{"layer": 3, "keep": 8}, {"layer": 1, "keep": 4}]}],
            "[[compress]] adsc drops name the layers [3, 1]; each must be larger than the one before",
        ),
        (
            [{"method": "adsc", "drops": [{"layer": 1, "keep": 8}, {"layer": 1, "keep": 4}]}],
            "[[compress]] adsc drops name the layers [1, 1]; each must be larger than the one before",
        ),
        (
            [{"method": "adsc", "drops": [{"layer": 4, "keep": 8}]}],
            "[[compress]] adsc drop before layer 4: the model has the layers 0 to 3",
        ),
        (
            [{"method": "adsc", "drops": [{"layer": -1, "keep": 8}]}],
            "[[compress]] adsc drop before layer -1: the model has the layers 0 to 3",
        ),
        (
            [{"method": "adsc", "drops": [{"layer": 1, "keep": 17}]}],
            "[[compress]] adsc drop before layer 1: keep = 17 is more than the 16 vision tokens that arrive",
        ),
        (
            [{"method": "adsc", "drops": [{"layer": 1, "keep": 8}, {"layer": 3, "keep": 9}]}],
            "[[compress]] adsc drop before layer 3: keep = 9 is more than the 8 vision tokens that arrive",
        ),
        (
            [{"method": "adsc", "drops": [{"layer": 1, "keep": 16}]}],
            "[[compress]] adsc drop before layer 1: keep = 16 keeps all 16 vision tokens that arrive",
        ),
        (
            [{"method": "adsc", "drops": [{"layer": 1, "keep": 7}], "pattern": "grid"}],
            "[[compress]] adsc drop before layer 1: 7 tokens are no rows x columns within 4 x 4; 6 or 8 would be",
        ),
        (
            [{"method": "sample", "keep": 8}, adsc(pattern="grid", drops=[{"layer": 1, "keep": 4}])],
            '[[compress]] adsc pattern = "grid" needs a full grid of tokens, which an earlier method broke; ',
        ),
        (
            [adsc(), {"method": "sample", "keep": 4}],
            "[[compress]] a method that drops tokens before the language model stands behind one that drops them "
            "inside; change their order",
        ),
        ([{"method": "sample"}], "[[compress]] sample needs the key 'keep'"),
        ([{"method": "sample", "keep": 4, "phase": 1}], "[[compress]] sample phase = 1.0 must be at least 0"),
        (
            [{"method": "sample", "keep": 7, "pattern": "grid"}],
            "[[compress]] sample: 7 tokens are no even rows x columns of 4 x 4; keep 6 or 8, or take them along the",
        ),
        (
            [{"method": "random", "keep": 8}, {"method": "sample", "keep": 4, "pattern": "grid"}],
            '[[compress]] sample: pattern = "grid" needs a full grid of tokens, which an earlier method broke; use',
        ),
        ([{"method": "sample", "keep": 17}], "[[compress]] sample: keep = 17 is more than the 16 vision tokens"),
        (
            [{"method": "sample", "keep": 4, "sed": 1}],
            "[[compress]] sample has no key 'sed'; choose one of: keep, pattern, phase, positions",
        ),
        ([{"method": "fastv", "keep": 4, "layer": 0}], "[[compress]] fastv layer = 0 must be at least 1: tokens are"),
        ([{"method": "fastv", "keep": 4, "layer": 4}], "[[compress]] fastv before layer 4: the model has the layers 0"),
        ([{"method": "fastv", "keep": 17}], "[[compress]] fastv before layer 2: keep = 17 is more than the 16 vision"),
        ([{"method": "pyramiddrop", "drops": []}], "[[compress]] pyramiddrop needs at least one entry in drops, e.g."),
        (
            [{"method": "pyramiddrop", "drops": [{"layer": 2, "keep": 8}, {"layer": 1, "keep": 4}]}],
            "[[compress]] pyramiddrop drops name the layers [2, 1]; each must be larger than the one before",
        ),
        (
            [{"method": "sparsevlm", "drops": [{"layer": 0, "keep": 8}]}],
            "[[compress]] sparsevlm drops layer = 0 must be at least 1: tokens are ranked by the layer before it",
        ),
        ([{"method": "relevance", "keep": 4}], "[[compress]] relevance needs the key 'weights'"),
        (
            [{"method": "relevance", "keep": 4, "weights": "untrained", "kernel": 4}],
            "[[compress]] relevance kernel = 4 must be odd and at least 1",
        ),
        (
            [{"method": "relevance", "keep": 4, "weights": "untrained", "channels": []}],
            "[[compress]] relevance channels = [] must be at least one number, all at least 1",
        ),
        ([{"method": "random", "keep": 16}], "[[compress]] random: keep = 16 keeps all 16 vision tokens"),
        ([{"method": "random", "keep": 4, "sede": 1}], "[[compress]] random has no key 'sede'; did you mean 'seed'?"),
        ([{"method": "resize"}], "[[compress]] resize needs the key 'keep'"),
        (
            [{"method": "resize", "keep": 6}],
            "[[compress]] resize: keep = 6 asks for 6 tokens, but a smaller image has a square of them, from 2 x 2 to "
            "3 x 3; choose 4 or 9",
        ),
        ([{"method": "resize", "keep": 0.9}], "[[compress]] resize: keep = 0.9 asks for 14 tokens, but a smaller"),
        ([{"method": "resize", "keep": 1.0}], "[[compress]] resize: keep = 1.0 must lie between 0 and 1 as a fraction"),
        (
            [{"method": "sample", "keep": 8}, {"method": "resize", "keep": 4}],
            "[[compress]] resize makes the image smaller, before any method can drop a token of it; put it first",
        ),
        ([adsc(), {"method": "resize", "keep": 9}], "[[compress]] resize makes the image smaller, before any method"),
        ([{"method": "sampel", "keep": 4}], "there is no method 'sampel'; did you mean 'sample'?"),
        (
            [{"method": "sample", "keep": 8}, {"method": "sample", "keep": 4}],
            '[[compress]] method = "sample" stands there twice; give one table with all its options',
        ),
    ],
)
def test_what_does_not_fit_is_refused(steps: Steps, text: str):
    with pytest.raises(RecipeError) as caught:
        plan_tokens(load(steps), SPEC)
    assert str(caught.value).startswith(text)


# --- what holds for every method and every family


def test_every_method_has_an_example_here():
    assert sorted(EXAMPLES) == list_methods()
    for name, cases in EXAMPLES.items():
        assert all(any(step["method"] == name for step in steps) for steps in cases)


@pytest.mark.parametrize("name", list_methods())
def test_every_method_says_in_a_line_what_it_does(name: str):
    assert 20 < len(method_summary(name)) < 120


@pytest.mark.parametrize("family", list_families())
@pytest.mark.parametrize("steps", CASES, ids=name_of)
def test_no_method_makes_a_plan_grow(steps: Steps, family: str):
    plans = arriving_plans(load(steps), replace(SPEC, family=family))
    for before, after in pairwise(plans):
        assert after.emitted <= before.emitted
        assert after.entering_llm <= before.entering_llm
        assert all(new <= old for new, old in zip(after.per_layer, before.per_layer, strict=True))
        assert sum(after.per_layer) < sum(before.per_layer)


@pytest.mark.parametrize("steps", CASES, ids=name_of)
def test_methods_as_tables_are_the_same_methods(steps: Steps):
    methods = load(steps)
    assert load_methods(tables_of(methods)) == methods


@pytest.mark.parametrize("steps", TRACED, ids=name_of)
def test_the_shapes_of_the_graphs_are_those_of_the_plan(
    checkpoint: Path, exported: Callable[[Recipe], Bundle], steps: Steps
):
    bundle = exported(recipe_for(checkpoint, *(dict(step) for step in steps)))
    plan = plan_tokens(load(steps), design(recipe_for(checkpoint)).model.spec)
    prefix, suffix = 3, 2
    assert encoded_tokens(bundle) == plan.entering_llm
    assert tokens_per_layer(bundle, prefix, plan.entering_llm, suffix) == [prefix + n + suffix for n in plan.per_layer]
    assert tokens_per_layer(bundle, prefix, 0, suffix) == [prefix + suffix] * NUM_LAYERS


def encoded_tokens(bundle: Bundle) -> int:
    pixels = np.zeros((1, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    session = onnxruntime.InferenceSession(bundle.graph_path("vision_encoder"), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"pixel_values": pixels})[0]).shape[1]


def tokens_per_layer(bundle: Bundle, prefix: int, vision: int, suffix: int) -> list[int]:
    """Return how many tokens each decoder layer attends from, as ONNX Runtime sees it."""
    path = bundle.graph_path("decoder_model_merged")
    model = ir.load(path)
    attended = [node.outputs[0] for node in model.graph if node.op_type == "Attention"]
    model.graph.outputs.extend(attended)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    graph = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    spec, total = bundle.spec, prefix + vision + suffix
    cache = np.zeros((1, spec.num_kv_heads, NUM_VISION_TOKENS + prefix + suffix, spec.head_dim), np.float32)
    inputs = {
        "prefix_embeds": np.ones((1, prefix, spec.hidden_size), np.float32),
        "image_features": np.ones((1, vision, spec.hidden_size), np.float32),
        "suffix_embeds": np.ones((1, suffix, spec.hidden_size), np.float32),
        "position_ids": np.arange(total)[None],
        "past_lengths": np.zeros((len(bundle.plan.groups), 1), np.int64),
        "logits_to_keep": np.array([0]),
    }
    caches = {value.name: cache for value in session.get_inputs() if value.name not in inputs}
    outputs = session.run([value.name for value in attended], {**inputs, **caches})
    return [np.asarray(output).shape[2] for output in outputs]
