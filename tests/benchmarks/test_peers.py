"""The benchmark beside peers, on the tiny model and with peers made for the test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from benchmarks import random_checkpoint
from benchmarks.peers import main
from benchmarks.peers_choice import named_pythons
from benchmarks.peers_process import PeerProcess, readable
from benchmarks.peers_table import pairs
from benchmarks.random_checkpoint import published_name
from tokexport.errors import TokexportError
from tokexport.recipes.load import parse_recipe

WORKING = """
class Fake(Model):
    version = "fake 1"
    def run(self, new_tokens):
        return Run(vision_ms=None, prefill_ms=3.0, ttft_ms=4.0, decode_ms_per_token=0.5, tokens=[7] * new_tokens)
"""
_START = "class Fake:\n    def __init__(self): "
DAMAGE = {
    "no_package": (
        "import no_such_package",
        "no_such_package is not installed; install it with: pip install",
    ),
    "fails_to_open": (f"{_START}raise ValueError('no int5\\nkernels')", "ValueError: no int5 kernels"),
    "dies": (f"{_START}print('bye', file=sys.stderr); sys.exit(3)", "ended with exit code 3: bye"),
    "hangs": (f"{_START}time.sleep(60)", "no answer within"),
}


def script(folder: Path, name: str, body: str) -> Path:
    """Write a peer that answers as ``benchmarks/peers/serving.py`` does."""
    serving = Path(__file__).parents[2] / "benchmarks" / "peers"
    path = folder / f"{name}.py"
    head = f"import sys, time\nsys.path.insert(0, {str(serving)!r})\nfrom serving import Model, Run, serve\n"
    path.write_text(f"{head}{body}\nserve(lambda task: None, lambda task: Fake())\n")
    return path


def ran(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def recipes(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("recipes")
    full, sample = folder / "full.toml", folder / "sample.toml"
    full.write_text(f'[model]\nfamily = "llava15"\ncheckpoint = "{checkpoint}"\n')
    sample.write_text('extends = "full.toml"\n[[compress]]\nmethod = "sample"\nkeep = 4\n')
    return full, sample


@pytest.mark.slow
def test_every_peer_is_a_row_and_none_stops_the_others(recipes: tuple[Path, Path], tmp_path: Path):
    scripts = [script(tmp_path, "working", WORKING)]
    scripts += [script(tmp_path, name, body) for name, (body, _) in DAMAGE.items() if name != "hangs"]
    outcome = ran(
        *("--recipe", recipes[0], "--recipe", recipes[1], "--bits", "float", "--text-tokens", 8, "--new-tokens", 3),
        *("--peers", ",".join(["transformers:fp32", *map(str, scripts)]), "--repeats", 2, "--threads", 1),
        *("--engine", "ort", "--engine", "ort-portable:float", "--engine", "ort-portable:int8", "-o", tmp_path / "out"),
    )
    assert outcome.exit_code == 0, outcome.output
    document = json.loads((tmp_path / "out" / "peers.json").read_text())
    rows = {(row["system"], row["variant"], row["method"]): row for row in document["rows"]}
    assert rows["working", "default", "all"]["ttft_ms"] == {"p10": 4.0, "median": 4.0, "p90": 4.0}
    assert rows["working", "default", "all"]["vision_ms"] is None
    for name in ("no_package", "fails_to_open", "dies"):
        assert rows[name, "default", "all"]["failed"].startswith(DAMAGE[name][1])
    assert rows["tokexport", "fp32", "sample"]["tokens"] == 4
    assert rows["tokexport", "fp32", "all"]["disk_bytes"] > 100_000
    assert {variant for system, variant, _ in rows if system == "tokexport"} == {"fp32", "fp32 ort-portable"}
    assert rows["tokexport", "fp32 ort-portable", "all"]["engine"] == "ort-portable"
    assert rows["transformers", "fp32", "all"]["prefill_ms"]["median"] > 0
    assert len(rows["transformers", "fp32", "all"]["tokens_said"]) == 4
    fastest = min(
        (row for row in document["rows"] if row["system"] != "tokexport" and "failed" not in row),
        key=lambda row: row["ttft_ms"]["median"],
    )
    peer = f"{fastest['system']} {fastest['variant']}"
    assert [(pair["method"], pair["engine"], pair["peer"]) for pair in document["pairs"]] == [
        (method, engine, peer) for method in ("all", "sample") for engine in ("", "ort-portable")
    ]
    text = (tmp_path / "out" / "peers.md").read_text()
    assert "| float | fails_to_open default | 16 | ValueError: no int5 kernels |" in text


@pytest.mark.slow
def test_one_system_at_a_time_is_alone(recipes: tuple[Path, Path], tmp_path: Path):
    peer = script(tmp_path, "working", WORKING)
    outcome = ran(
        *("--recipe", recipes[0], "--recipe", recipes[1], "--bits", "float", "--text-tokens", 8, "--new-tokens", 3),
        *("--peers", peer, "--repeats", 1, "--threads", 1, "--one-at-a-time", "-o", tmp_path / "out"),
    )
    assert outcome.exit_code == 0, outcome.output
    document = json.loads((tmp_path / "out" / "peers.json").read_text())
    assert [row["system"] for row in document["rows"]] == ["working", "tokexport", "tokexport"]
    assert len(document["loads"]) == 3  # each was opened when the one before was gone
    assert "medians of 1 (10th to 90th percentile), one system at a time." in outcome.output


@pytest.mark.parametrize("name", DAMAGE)
def test_a_peer_that_does_not_answer_says_why(name: str, tmp_path: Path):
    body, reason = DAMAGE[name]
    process = PeerProcess(
        sys.executable,
        script(tmp_path, name, body),
        log=tmp_path / "log",
        threads=1,
        new_tokens=1,
        limit_s=2 if name == "hangs" else 60,
    )
    request = {"do": "open", **dict.fromkeys(("checkpoint", "folder", "pixels", "image"), "x"), "kept": None}
    request |= {"variant": "x", "vision_tokens": 1, "threads": 1, "before": [], "after": [], "max_tokens": 1}
    with process, pytest.raises(TokexportError, match="^" + reason.replace(".", r"\.")):
        process.request(request)


def test_a_python_that_is_not_there_is_told(tmp_path: Path):
    process = PeerProcess(
        str(tmp_path / "python"), tmp_path / "peer.py", log=tmp_path / "log", threads=1, new_tokens=1, limit_s=9
    )
    with pytest.raises(TokexportError, match=r"cannot be started .*; name another with --python"), process:
        pass


def test_a_missing_package_is_named_with_its_remedy():
    assert readable("ended with exit code 1: ModuleNotFoundError: No module named 'openvino'") == (
        "openvino is not installed; install it with: pip install --no-deps -r benchmarks/peers-requirements.txt"
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--engine", "ort:int5"), "an artefact has no 'int5'; choose from float, int8, int4"),
        (("--engine", "openvin"), "there is no backend 'openvin'; did you mean 'openvino'?"),
        (("--peers", "openvin"), "there is no peer 'openvin'; choose from transformers, openvino"),
        (("--peers", "openvino:int5"), "openvino has no 'int5'; choose from fp16, int8, int4"),
        (("--recipe", "mini_adsc"), "of the recipes mini_adsc exactly one must keep all tokens"),
    ],
    ids=["bits of an engine", "engine", "peer", "precision", "recipes"],
)
def test_what_cannot_be_measured_is_refused(arguments: tuple[str, ...], text: str, tmp_path: Path):
    outcome = ran(*arguments, "-o", tmp_path / "out")
    assert (outcome.exit_code, (tmp_path / "out").exists()) == (1, False)
    assert text in outcome.output


def test_a_peer_takes_its_own_python_and_the_others_that_without_a_name():
    assert named_pythons(["one/python", "openvino=two/python"]) == {"": "one/python", "openvino": "two/python"}


def test_tensors_have_the_names_of_published_checkpoints(checkpoint: Path):
    from tokexport.exporter.family import load_family

    family = load_family("llava15")
    for stored in load_file(checkpoint / "model.safetensors"):
        name = family.canonical_name(stored)
        assert name is not None
        assert family.canonical_name(published_name(name)) == name
        assert published_name(name).startswith(
            ("language_model.", "vision_tower.vision_model.", "multi_modal_projector.")
        )


def test_a_checkpoint_is_written_in_shards_and_once(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tokexport.exporter.export import design

    monkeypatch.setattr(random_checkpoint, "_SHARD_BYTES", 50_000)
    made = design(parse_recipe("tiny", {"model": {"family": "llava15", "checkpoint": str(checkpoint)}}))
    folder = random_checkpoint.write_checkpoint(made, tmp_path / "written")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    stored = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert stored.keys() == json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].keys()
    weights = made.open_weights()
    for name in weights.shapes:
        assert torch.equal(stored[published_name(name)], weights.load(name).half())
    before = shards[0].stat().st_mtime_ns
    random_checkpoint.write_checkpoint(made, folder)
    assert shards[0].stat().st_mtime_ns == before


def row(system: str, method: str, ttft: float, *, bits: str = "int8") -> dict[str, object]:
    spread = {"p10": ttft, "median": ttft, "p90": ttft}
    figures = dict.fromkeys(("ttft_ms", "vision_ms", "prefill_ms", "decode_ms_per_token"), spread)
    return {
        **{"system": system, "variant": bits, "bits": bits, "method": method, "tokens": 9, "tokens_said": []},
        **figures,
        **{"peak_rss_bytes": 2e6 * ttft, "disk_bytes": 1e6, "version": ""},
    }


def test_ours_stands_beside_the_fastest_peer_of_its_bits():
    rows = [row("a", "all", 8.0), row("b", "all", 4.0), row("c", "all", 1.0, bits="int4"), row("b", "adsc", 3.0)]
    rows += [row("tokexport", "all", 2.0), row("tokexport", "adsc", 6.0), {**row("d", "all", 0.5), "failed": "no"}]
    found = [(pair["method"], pair["peer"], pair["peer_method"], pair["ttft"], pair["memory"]) for pair in pairs(rows)]
    assert found == [
        ("all", "b int8", "all", 2.0, 2.0),
        ("adsc", "b int8", "adsc", 0.5, 0.5),
        ("adsc", "b int8", "all", 4 / 6, 4 / 6),
    ]


def test_what_the_measured_processes_import_leaves_torch_out():
    code = "import sys, benchmarks.peers; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "False"
