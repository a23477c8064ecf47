"""A failure of an engine is reduced to the nodes that fail, which still fail when they are run alone."""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir import tape

from tests.conftest import adsc, recipe_for
from tests.engines.conftest import with_checksums_of_today
from tokexport.engines.backend import AS_BUILT, Rewriter, SessionOptions, load_backend
from tokexport.engines.backends.ort import Ort
from tokexport.engines.build import verify_artefact
from tokexport.engines.graph_parts import Reduction, common_values, is_same_node, part_before
from tokexport.engines.parity import failure_text
from tokexport.engines.probe import Probe, make_probe
from tokexport.engines.reduction import _calls, _Search, reduce_failure, require_reducible
from tokexport.engines.source import source_design
from tokexport.errors import BackendUnavailableError
from tokexport.exporter.bundle import Bundle
from tokexport.recipes.schema import QuantizeTable

pytest.importorskip("polygraphy")

OPTIONS = SessionOptions(max_text_tokens=80, max_images=2, threads=1)


@pytest.fixture(scope="module")
def probe(tiny_adsc: Bundle) -> Probe:
    return make_probe(source_design(tiny_adsc, AS_BUILT))


@pytest.fixture(scope="module")
def damaged(tiny_adsc: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return an artefact whose graph writes the keys of layer 2 one place early, which fused attention does not."""
    folder = tmp_path_factory.mktemp("damaged")
    bundle = Bundle.open(shutil.copytree(tiny_adsc.path, folder / "copy"))
    path = bundle.graph_path("decoder_model_merged")
    model = ir.load(path)
    write = [node for node in model.graph if node.op_type == "TensorScatter"][2 * 2]
    new = tape.Tape()
    one, zero = (new.op("Constant", [], {"value": ir.tensor(np.array([number]))}) for number in (1, 0))
    early = new.op("Max", [new.op("Sub", [write.inputs[2], one]), zero])
    early.name = "one_early"
    model.graph.insert_before(write, new.nodes)
    write.replace_input_with(2, early)
    ir.save(model, path)
    return with_checksums_of_today(bundle)


@pytest.fixture(scope="module")
def reduced(damaged: Bundle, probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Reduction:
    found = reduce_failure(damaged, "ort", OPTIONS, probe, tmp_path_factory.mktemp("repro") / "reduced")
    assert found is not None
    return found


def test_a_damaged_graph_is_reduced_to_the_attention_of_its_layer(reduced: Reduction):
    assert sorted(reduced.nodes) == sorted(
        ["Cast", "Constant", "Sub", "ReduceMax", "RotaryEmbedding", "RotaryEmbedding", "GroupQueryAttention"]
    )
    assert reduced.check.name == "present.2.key"
    assert reduced.check.max_abs_diff > 1
    assert reduced.call == "first token of turn 1"
    assert reduced.portable_nodes.count("TensorScatter") == 2


def test_what_is_left_shows_the_difference_again(reduced: Reduction):
    # The script beside the interpreter, which need not be on the path.
    tool, *arguments = shlex.split(reduced.command)
    ran = subprocess.run([str(Path(sys.executable).with_name(tool)), *arguments], capture_output=True, text=True)
    assert ran.returncode == 1
    assert "present.2.key" in ran.stdout
    assert "Accuracy Summary" in ran.stdout


def test_the_portable_part_computes_what_is_expected(reduced: Reduction):
    from polygraphy.json import load_json

    (given,) = load_json(str(reduced.folder / "inputs.json"))
    ((_, (expected,)),) = load_json(str(reduced.folder / "expected.json"))
    session = ort.InferenceSession(str(reduced.folder / "portable.onnx"))
    names = [value.name for value in session.get_outputs()]
    feeds = {value.name: given[value.name] for value in session.get_inputs()}
    for name, found in zip(names, session.run(names, feeds), strict=True):
        np.testing.assert_allclose(np.asarray(found), expected[name], atol=1e-6)


class OtherEpsilon(Ort):
    """A pass that loses an attribute of one node."""

    def decoder_graph(self, bundle: Bundle) -> bytes:
        model = onnx.load_from_string(super().decoder_graph(bundle))
        norm = next(node for node in model.graph.node if node.name.startswith("/layers.3/post_attention"))
        (epsilon,) = [attribute for attribute in norm.attribute if attribute.name == "epsilon"]
        epsilon.f = 0.5
        return model.SerializeToString()


def differences(engine: Rewriter, bundle: Bundle, probe: Probe) -> list[tuple[str, ...] | None]:
    search = _Search(bundle, engine, 1)
    found = [search.first_difference(inputs) for _, inputs in _calls(bundle, OPTIONS, probe)]
    return [None if part is None else tuple(node.op_type for node in part.part.nodes) for part in found]


def test_a_damaged_pass_is_reduced_to_the_node_that_it_damaged(tiny_adsc: Bundle, probe: Probe):
    assert set(differences(OtherEpsilon(), tiny_adsc, probe)) == {("RMSNormalization",)}


def test_an_engine_that_computes_the_same_is_not_reduced(tiny_adsc: Bundle, probe: Probe):
    assert differences(Ort(), tiny_adsc, probe) == [None] * 6


def test_verify_leaves_the_part_in_the_folder_of_the_failure(damaged: Bundle):
    verification = verify_artefact(damaged.path, threads=1, with_reduction=True)
    assert verification.reduced is not None
    assert verification.repro is not None
    assert verification.reduced.folder == verification.repro / "reduced"
    assert (
        "; 7 nodes still differ in present.2.key, first token of turn 1; see it with: polygraphy run "
        in failure_text(verification)
    )
    report = json.loads(json.dumps(verification.report()))
    assert report["reduced"]["check"]["name"] == "present.2.key"


@pytest.mark.parametrize("backend", ["ort-portable", "torch-eager"])
def test_an_engine_without_a_graph_of_its_own_is_refused(tiny_adsc: Bundle, backend: str):
    with pytest.raises(BackendUnavailableError, match=f"^backend '{backend}' runs no rewritten graph"):
        verify_artefact(tiny_adsc.path, backend=backend, with_reduction=True)


def test_rounded_weights_are_refused(checkpoint: Path):
    recipe = replace(recipe_for(checkpoint, adsc()), quantize=QuantizeTable.for_bits("int8"))
    with pytest.raises(BackendUnavailableError, match="this artefact is quantized; leave it out"):
        require_reducible("ort", recipe)


def test_without_polygraphy_the_command_that_installs_it_is_told(tiny_adsc: Bundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "polygraphy.backend.onnxrt", None)
    with pytest.raises(BackendUnavailableError, match=r"install it with: pip install 'tokexport\[debug\]'$"):
        require_reducible("ort", tiny_adsc.recipe)


# Parts


def chain() -> ir.Graph:
    """Return x -> a -> b -> c and c + a -> y, with a weight in b."""
    x, weight = ir.Value(name="x"), ir.Value(name="weight", const_value=ir.tensor(np.ones(2, np.float32)))
    made = tape.Tape()
    a = made.op("Neg", [x])
    b = made.op("Mul", [a, weight])
    c = made.op("Exp", [b])
    y = made.op("Add", [c, a])
    for name, value in (("a", a), ("b", b), ("c", c), ("y", y)):
        value.name = name
    return ir.Graph([x], [y], nodes=made.nodes, initializers=[weight], opset_imports={"": 24}, name="chain")


@pytest.mark.parametrize(
    ("borders", "depth", "nodes", "inputs"),
    [
        (["a", "b", "c"], 1, ["Add"], ("c", "a")),
        (["a", "b", "c"], 2, ["Neg", "Exp", "Add"], ("x", "b")),
        (["a"], 1, ["Mul", "Exp", "Add"], ("a",)),
        ([], 1, ["Neg", "Mul", "Exp", "Add"], ("x",)),
    ],
)
def test_a_part_begins_at_the_borders(borders: list[str], depth: int, nodes: list[str], inputs: tuple[str, ...]):
    part = part_before(chain(), "y", borders, depth)
    assert [node.op_type for node in part.nodes] == nodes
    assert sorted(part.inputs) == sorted(inputs)
    assert part.outputs == ("y",)


def test_what_a_loop_reads_of_the_values_around_it_goes_into_its_part():
    graph = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["": 24]>
        g (float[2] x, int64 n) => (float[2] y) {
            a = Neg (x)
            b = Exp (x)
            y = Loop (n, "", b) <body = g (int64 i, bool go, float[2] c) => (bool on, float[2] d) {
                on = Identity (go)
                d = Add (c, a)
            }>
        }""").graph
    part = part_before(graph, "y", ["a", "b"], 1)
    assert [node.op_type for node in part.nodes] == ["Loop"]
    assert sorted(part.inputs) == ["a", "b", "n"]
    assert [node.op_type for node in part_before(graph, "y", [], 1).nodes] == ["Neg", "Exp", "Loop"]


def test_values_of_both_graphs_are_common():
    one, other = chain(), chain()
    renamed = next(node for node in other if node.op_type == "Exp")
    renamed.outputs[0].name = "d"
    assert common_values(one, other) == ["a", "b", "y"]


def test_nodes_are_the_same_if_everything_about_them_is():
    one, other = list(chain()), list(chain())
    assert is_same_node(one[1], other[1])
    other[1].inputs[0].name = "d"  # pyright: ignore[reportOptionalMemberAccess]
    assert not is_same_node(one[1], other[1])
    assert not is_same_node(one[1], None)


def test_an_engine_names_what_computes():
    engine = load_backend("ort")
    assert isinstance(engine, Rewriter)
    assert engine.device == "cpu"
