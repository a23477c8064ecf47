"""Building, proving and measuring from the command line, also where that is interrupted or fails."""

import contextlib
import json
import resource
import shutil
import signal
from pathlib import Path

import pytest

import tokexport.engines.bench
from tests.cli.conftest import Outcome, Run, in_process, outcome_of
from tokexport.exporter.bundle import Bundle

BUILD_ALONE = ("--no-verify", "--no-bench")

# Building


def test_build_makes_an_artefact_with_its_reports(built: tuple[Path, Outcome]):
    out, outcome = built
    assert outcome.code == 0, outcome.err
    assert outcome.document.keys() >= {"path", "plan", "verify", "bench"}
    assert outcome.document["verify"]["passed"] is True
    names = {path.name for path in (out / "reports").iterdir()}
    assert names >= {"plan.json", "verify.json", "bench.json", "report.md", "report.html"}
    assert Bundle.open(out, check_all=True).plan.per_layer == (16, 8, 8, 4)


def test_build_leaves_nothing_beside_the_artefact(built: tuple[Path, Outcome]):
    assert [path.name for path in built[0].parent.iterdir()] == ["out"]


def test_build_says_how_to_go_on(built: tuple[Path, Outcome]):
    assert "tokexport run" in built[1].err


def test_an_artefact_that_was_built_answers(built: tuple[Path, Outcome], run: Run, picture: Path):
    outcome = run("run", built[0], "-p", "What?", "--image", picture, "--max-new-tokens", 2)
    assert outcome.code == 0


def test_build_refuses_a_folder_that_is_not_empty(run: Run, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    outcome = run("build", *BUILD_ALONE, "-o", tmp_path)
    assert outcome.code == 1
    assert outcome.error == f"{tmp_path} exists and is not empty; choose another -o, or replace it with --overwrite"


def test_build_overwrites_nothing_but_artefacts(run: Run, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    outcome = run("build", *BUILD_ALONE, "-o", tmp_path, "--overwrite")
    assert outcome.code == 1
    assert outcome.error.endswith("is not empty and no artefact, so --overwrite will not replace it; choose another -o")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_build_refuses_a_file(run: Run, tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    outcome = run("build", *BUILD_ALONE, "-o", tmp_path / "out")
    assert (outcome.code, outcome.error) == (1, f"{tmp_path / 'out'} is a file; choose a directory for -o")


@pytest.mark.parametrize("out", ["/proc/out", "{file}/out", "{file}/deeper/out"])
def test_build_refuses_a_place_that_cannot_be_written(run: Run, tmp_path: Path, out: str):
    (tmp_path / "file").write_text("mine")
    place = out.format(file=tmp_path / "file")
    outcome = run("build", *BUILD_ALONE, "-o", place)
    assert outcome.code == 1
    assert outcome.error.endswith("; choose another -o")


def test_build_refuses_an_engine_that_cannot_run_the_precision(run: Run, tmp_path: Path):
    outcome = run("build", "--dtype", "bfloat16", "-o", tmp_path / "out", "--num-layers", 4, "--weights", "random")
    assert outcome.code == 1
    assert "bfloat16" in outcome.error
    assert "float32" in outcome.error
    assert list(tmp_path.iterdir()) == []


def test_export_writes_graphs_only(run: Run, recipe: Path, checkpoint: Path, tmp_path: Path):
    outcome = run("export", "--recipe", recipe, "--model", checkpoint, "-o", tmp_path / "out", "--json")
    assert outcome.code == 0
    assert outcome.document["plan"]["vision_tokens"]["per_layer"] == [16, 8, 8, 4]
    assert (tmp_path / "out" / "onnx" / "decoder_model_merged.onnx").is_file()
    assert "not verified" in outcome.err


@pytest.fixture
def silent(checkpoint: Path, tmp_path: Path) -> Path:
    """Return a checkpoint without chat template."""
    folder = tmp_path / "silent"
    return shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("chat_template*"))


@pytest.mark.parametrize("command", [["build"], ["export"], ["build", "--weights", "random"]], ids=" ".join)
def test_a_checkpoint_that_cannot_be_asked_is_refused_before_the_work(
    run: Run, recipe: Path, silent: Path, tmp_path: Path, command: list[str]
):
    outcome = run(*command, "--recipe", recipe, "--model", silent, "-o", tmp_path / "out")
    assert outcome.code == 1
    assert outcome.error == (
        "the checkpoint has no chat template, so prompts cannot be laid out; add chat_template.jinja to it and build "
        "again"
    )
    assert "tracing" not in outcome.err
    assert list(tmp_path.iterdir()) == [silent]


def test_a_checkpoint_that_cannot_be_asked_can_be_planned(run: Run, recipe: Path, silent: Path):
    assert run("plan", "--recipe", recipe, "--model", silent).code == 0


def test_a_described_architecture_needs_no_checkpoint_to_be_asked(run: Run, tmp_path: Path):
    described = tmp_path / "described.toml"
    described.write_text(
        '[model]\nfamily = "llava15"\ncheckpoint = "someone/tiny"\nweights = "random"\n'
        "[model.architecture.text_config]\nvocab_size = 576\nhidden_size = 32\nintermediate_size = 32\n"
        "num_hidden_layers = 1\nnum_attention_heads = 2\nnum_key_value_heads = 2\nmax_position_embeddings = 1024\n"
        "[model.architecture.vision_config]\nhidden_size = 32\nintermediate_size = 32\nnum_hidden_layers = 1\n"
        "num_attention_heads = 2\n"
    )
    out = tmp_path / "out"
    assert run("export", "--recipe", described, "-o", out).code == 0
    assert run("run", out, "-p", "What?", "--max-new-tokens", 1).code == 0


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupted_build_leaves_nothing(recipe: Path, checkpoint: Path, tmp_path: Path, sent: signal.Signals):
    def listen() -> None:
        signal.signal(sent, signal.SIG_DFL)  # a shell's background jobs, and what they start, are deaf to Ctrl-C

    arguments = ("build", "--recipe", recipe, "--model", checkpoint, "-o", tmp_path / "out", *BUILD_ALONE)
    process = in_process(*arguments, preexec_fn=listen)
    assert process.stderr is not None
    said = ""
    while "tracing decoder" not in said:
        said += process.stderr.readline()
        assert process.poll() is None
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(sent)
    outcome = outcome_of(process, said)
    assert (outcome.code, outcome.error) == (130, "interrupted")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_is_said_though_an_error_of_the_clean_up_hides_it(
    run: Run, recipe: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_args: object, **_options: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            with contextlib.suppress(ValueError):  # what was dealt with on the way hides nothing
                raise ValueError
            raise RuntimeError("a mode that is not active")

    monkeypatch.setattr("tokexport.exporter.trace.torch.export.export", interrupted)
    outcome = run("export", "--recipe", recipe, "--model", checkpoint, "-o", tmp_path / "out")
    assert (outcome.code, outcome.error) == (130, "interrupted")
    assert list(tmp_path.iterdir()) == []


def test_a_defect_is_not_taken_for_an_interruption(
    run: Run, recipe: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_args: object, **_options: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("tokexport.exporter.trace.torch.export.export", fails)
    with pytest.raises(RuntimeError, match="a defect"):
        run("export", "--recipe", recipe, "--model", checkpoint, "-o", tmp_path / "out")


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(recipe: Path, checkpoint: Path, tmp_path: Path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    arguments = ("--recipe", recipe, "--model", checkpoint, "-o", tmp_path / "out", *BUILD_ALONE)
    outcome = outcome_of(in_process("build", *arguments, preexec_fn=limit))
    assert outcome.code == 1
    assert outcome.error.startswith(f"{tmp_path / 'out'} could not be written (")
    assert outcome.error.endswith("; nothing was left behind")
    assert list(tmp_path.iterdir()) == []


# Verifying and measuring


def damaged_copy(tiny: Bundle, folder: Path) -> Path:
    """Return a copy whose manifest claims another phase than the graphs have."""
    copy = shutil.copytree(tiny.path, folder / "copy")
    table = json.loads((copy / "tokexport.json").read_text())
    table["recipe"]["compress"][0]["phase"] = 0.5
    (copy / "tokexport.json").write_text(json.dumps(table))
    return copy


def test_verify_proves_an_artefact_and_writes_its_report(run: Run, built: tuple[Path, Outcome]):
    outcome = run("verify", built[0], "--json", "--threads", 1)
    assert outcome.code == 0
    assert outcome.document["passed"] is True
    assert json.loads((built[0] / "reports" / "verify.json").read_text()) == outcome.document


def test_verify_exits_with_3_where_the_artefact_is_wrong(run: Run, tiny_adsc: Bundle, tmp_path: Path):
    copy = damaged_copy(tiny_adsc, tmp_path)
    outcome = run("verify", copy, "--json", "--threads", 1)
    assert outcome.code == 3
    assert outcome.document["passed"] is False
    assert outcome.error.startswith("parity failed at reference vs ort-portable, decoder_model_merged")
    assert outcome.error.endswith(f"; inputs and both outputs are in {tmp_path / 'copy.repro'}")
    assert (tmp_path / "copy.repro" / "inputs.npz").is_file()


def test_verify_has_nothing_to_reduce_where_the_engine_is_right(run: Run, built: tuple[Path, Outcome]):
    pytest.importorskip("polygraphy")
    outcome = run("verify", built[0], "--json", "--threads", 1, "--reduce")
    assert (outcome.code, outcome.document["passed"]) == (0, True)
    assert "reduced" not in outcome.document


def test_verify_refuses_a_damaged_file(run: Run, tiny_adsc: Bundle, tmp_path: Path):
    copy = damaged_copy(tiny_adsc, tmp_path)
    path = copy / "onnx" / "decoder_model_merged.onnx_data"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    outcome = run("verify", copy)
    assert outcome.code == 1
    assert outcome.error == (f"{path} is damaged: its SHA-256 is not the one in the manifest; build the artefact again")


def test_bench_exits_with_4_where_a_figure_misses_its_bar(
    run: Run, tiny_full: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # A bar that no machine reaches, so that the figures of this one do not matter.
    monkeypatch.setattr(
        tokexport.engines.bench.Bar, "passed", property(lambda bar: bar.name != "full_prefill_of_transformers")
    )
    copy = shutil.copytree(tiny_full.path, tmp_path / "copy")
    arguments = ("--repeats", 1, "--new-tokens", 1, "--threads", 1, "--json")
    outcome = run("bench", copy, *arguments, "--gate")
    assert outcome.code == 4
    assert outcome.error.startswith("1 figures miss their bars: prefill_ms of ort over that of transformers")
    assert outcome.document["rows"]


def test_an_artefact_is_compiled_for_a_gpu_that_is_not_here(run: Run, checkpoint: Path, recipe: Path, tmp_path: Path):
    pytest.importorskip("tensorrt_rtx")
    made = ("--model", checkpoint, "--dtype", "float16", "-o", tmp_path / "out")
    assert run("export", "-r", recipe, *made).code == 0
    options = ("--capability", "8.6", "--max-text-tokens", 40, "--max-images", 1)
    outcome = run("compile", tmp_path / "out", *options, "--json")
    assert outcome.code == 0, outcome.err
    document = outcome.document
    assert Path(document["path"]).parent == tmp_path / "out" / "engines"
    assert (document["capability"], document["dtype"]) == ("8.6", "float16")
    assert document["room"] == {"max_text_tokens": 40, "max_images": 1}
    assert "fused attentions" in outcome.err
    again = run("compile", tmp_path / "out", *options)
    assert again.code == 1
    assert again.error.endswith("; build it again with --overwrite, or use it as it is")


def test_an_engine_that_runs_graphs_as_they_are_is_not_compiled_for(run: Run, tiny_adsc: Bundle):
    outcome = run("compile", tiny_adsc.path, "--backend", "ort")
    assert outcome.code == 1
    assert outcome.error == "backend 'ort' runs the graphs as they are; compile for one of: tensorrt, tensorrt-rtx"
