"""The artefact on disk: written whole or not at all, and trusted only when it is whole."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import recipe_for
from tokexport.errors import BundleError
from tokexport.exporter.bundle import MANIFEST, SCHEMA_VERSION, Bundle, BundleWriter, Manifest, write_atomically
from tokexport.exporter.export import design, export
from tokexport.exporter.graph_io import GRAPHS


@pytest.fixture
def copy(tiny_full: Bundle, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_full.path, tmp_path / "copy")


def write_something(out: Path, manifest: Manifest, *, overwrite: bool = False, content: str = "new") -> Bundle:
    with BundleWriter(out, overwrite=overwrite) as writer:
        (writer.staging / "onnx" / "graph").write_text(content)
        writer.write_manifest(manifest)
        return writer.commit()


def write_half(out: Path, error: type[BaseException], *, overwrite: bool = False) -> None:
    with BundleWriter(out, overwrite=overwrite) as writer:
        (writer.staging / "onnx" / "half").write_text("half")
        raise error


def change_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    table = json.loads((path / MANIFEST).read_text())
    change(table)
    (path / MANIFEST).write_text(json.dumps(table))


# --- writing


def test_an_artefact_appears_only_with_its_commit(tmp_path: Path, tiny_full: Bundle):
    out = tmp_path / "deep" / "out"
    with BundleWriter(out) as writer:
        writer.write_manifest(tiny_full.manifest)
        assert not out.exists()
        writer.commit()
        assert (out / MANIFEST).is_file()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_artefact_that_was_not_finished_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]):
    with pytest.raises(error):
        write_half(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_a_commit_leaves_nothing_behind(tmp_path: Path):
    with BundleWriter(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_the_disk_says_that_nothing_was_left(tmp_path: Path):
    with (
        pytest.raises(BundleError, match=r"out could not be written \(No space left on device\); nothing was left"),
        BundleWriter(tmp_path / "out"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_keeps_the_old_artefact(copy: Path, tmp_path: Path):
    before = (copy / MANIFEST).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_half(copy, KeyboardInterrupt, overwrite=True)
    assert (copy / MANIFEST).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_an_overwrite_that_fails_at_the_last_step_puts_the_old_artefact_back(copy: Path, tmp_path: Path):
    def commit_nothing() -> None:
        with BundleWriter(copy, overwrite=True) as writer:
            shutil.rmtree(writer.staging)
            writer.commit()

    before = (copy / MANIFEST).read_bytes()
    with pytest.raises(BundleError, match="nothing was left behind"):
        commit_nothing()
    assert (copy / MANIFEST).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_an_artefact_is_readable_for_others(tmp_path: Path, tiny_full: Bundle):
    out = write_something(tmp_path / "out", tiny_full.manifest).path
    assert stat.S_IMODE(out.stat().st_mode) == 0o755


def test_an_empty_directory_is_a_place(tmp_path: Path, tiny_full: Bundle):
    (tmp_path / "out").mkdir()
    assert write_something(tmp_path / "out", tiny_full.manifest).path == tmp_path / "out"


def test_a_directory_that_is_not_empty_is_no_place(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with (
        pytest.raises(BundleError, match=r"out exists and is not empty; choose another -o, or replace it with --over"),
        BundleWriter(tmp_path / "out"),
    ):
        pass
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_only_an_artefact_is_overwritten(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with (
        pytest.raises(BundleError, match=r"is not empty and no artefact, so --overwrite will not replace it; choose"),
        BundleWriter(tmp_path / "out", overwrite=True),
    ):
        pass
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_file_is_no_place(tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    with (
        pytest.raises(BundleError, match="out is a file; choose a directory for -o"),
        BundleWriter(tmp_path / "out", overwrite=True),
    ):
        pass


def test_an_artefact_is_overwritten_as_a_whole(copy: Path, tmp_path: Path, tiny_full: Bundle):
    write_something(copy, tiny_full.manifest, overwrite=True)
    assert sorted(path.name for path in copy.iterdir()) == ["onnx", MANIFEST]
    assert (copy / "onnx" / "graph").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_place_that_was_taken_meanwhile_is_not_overwritten(tmp_path: Path, tiny_full: Bundle):
    out = tmp_path / "out"
    with BundleWriter(out) as writer:
        writer.write_manifest(tiny_full.manifest)
        out.mkdir()
        (out / "theirs.txt").write_text("theirs")
        with pytest.raises(BundleError, match="exists and is not empty"):
            writer.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["theirs.txt"]


def test_what_a_killed_build_left_is_removed(tmp_path: Path, tiny_full: Bundle):
    code = (
        "import os, signal, sys; from pathlib import Path; from tokexport.exporter.bundle import BundleWriter\n"
        "with BundleWriter(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert [path.is_dir() for path in tmp_path.iterdir()] == [True]
    write_something(tmp_path / "out", tiny_full.manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_build_of_the_same_artefact_is_left_alone(tmp_path: Path, tiny_full: Bundle):
    with BundleWriter(tmp_path / "out") as writer:
        write_something(tmp_path / "out", tiny_full.manifest)
        assert (writer.staging / "onnx").is_dir()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path):
    with (
        pytest.raises(BundleError, match=r"out needs 1,000,000,000,000 MB and its disk has [\d,]+ MB free; choose"),
        BundleWriter(tmp_path / "out") as writer,
    ):
        writer.require_room(10**18)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_with_room_is_taken(tmp_path: Path):
    with BundleWriter(tmp_path / "out") as writer:
        writer.require_room(1)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_refused(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(BundleError, match=r"cannot be written \(Permission denied\)"), BundleWriter(tmp_path / "out"):
        pass


def test_a_place_below_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match=r"file cannot be written \(.*\); choose another -o"):
        BundleWriter(tmp_path / "file" / "out").__enter__()


# --- reading


def test_an_artefact_is_opened_as_it_was_written(copy: Path, tiny_full: Bundle):
    bundle = Bundle.open(copy, check_all=True)
    assert bundle.manifest == tiny_full.manifest
    assert bundle.manifest.schema_version == SCHEMA_VERSION
    assert bundle.plan.per_layer == (16, 16, 16, 16)


def test_the_manifest_lists_every_file_but_itself_and_reports(copy: Path):
    files = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    listed = set(Bundle.open(copy).manifest.files)
    assert files - listed == {MANIFEST, "reports/plan.json"}
    assert listed <= files


def test_the_recipe_of_an_artefact_makes_the_same_artefact(tiny_adsc: Bundle):
    assert design(tiny_adsc.recipe).plan == tiny_adsc.plan
    assert design(tiny_adsc.recipe).recipe == tiny_adsc.recipe


def test_a_report_can_be_written_again(copy: Path):
    bundle = Bundle.open(copy)
    bundle.write_report("verify.json", {"passed": False})
    bundle.write_report("verify.json", {"passed": True})
    assert Bundle.open(copy, check_all=True).read_report("verify.json") == {"passed": True}
    assert bundle.read_report("bench.json") is None


@pytest.mark.parametrize("name", ["onnx/embed_tokens.onnx", "onnx/decoder_model_merged.onnx_data", "recipe.toml"])
def test_one_flipped_bit_is_found(copy: Path, name: str):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name} is damaged: its SHA-256 is not the one in the manifest; build"):
        Bundle.open(copy)


def test_a_truncated_file_is_found(copy: Path):
    path = copy / "onnx" / "embed_tokens.onnx_data"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"is damaged: 147,455 bytes, expected 147,456; build the artefact again"):
        Bundle.open(copy)


def test_a_missing_file_is_found(copy: Path):
    (copy / "config.json").unlink()
    with pytest.raises(BundleError, match=r"config\.json is missing from the artefact; build it again"):
        Bundle.open(copy)


@pytest.mark.parametrize("kind", ["nothing", "empty directory"])
def test_what_is_no_artefact_is_refused(tmp_path: Path, kind: str):
    path = tmp_path / "out"
    if kind == "empty directory":
        path.mkdir()
    with pytest.raises(BundleError, match=r"so it is no artefact; make one with: tokexport build -o "):
        Bundle.open(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        ("[]", "is no manifest of tokexport; build the artefact again"),
        ('{"name": "foreign"}', "is no manifest of tokexport; build the artefact again"),
        ('{"schema_version": "1"}', "is no manifest of tokexport; build the artefact again"),
        ('{"schema_version": 1}', "is damaged: tokexport.json needs the key 'versions'; build the artefact again"),
    ],
    ids=["syntax", "empty", "list", "foreign", "text", "keys"],
)
def test_a_manifest_that_is_none_is_refused(copy: Path, content: str, text: str):
    (copy / MANIFEST).write_text(content)
    with pytest.raises(BundleError) as caught:
        Bundle.open(copy)
    assert str(caught.value).startswith(f"{copy / MANIFEST} {text}")


def test_an_artefact_of_a_newer_tokexport_is_refused(copy: Path):
    change_manifest(copy, lambda table: table.update(schema_version=SCHEMA_VERSION + 1, something_new=1))
    with pytest.raises(BundleError, match=r"was made by a newer tokexport \(schema 2, this one reads 1\); upgrade"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table["spec"].update(num_layers="4"),
        lambda table: table["spec"].update(depth=4),
        lambda table: table["plan"].update(per_layer=[16, 17, 16, 16]),
        lambda table: table.pop("model"),
    ],
    ids=["type", "key", "growing plan", "missing"],
)
def test_a_damaged_manifest_is_refused(copy: Path, change: Callable[[dict[str, Any]], object]):
    change_manifest(copy, change)
    with pytest.raises(BundleError, match=r"tokexport\.json is damaged: .*build the artefact again"):
        Bundle.open(copy)


def test_a_damaged_list_of_files_is_refused_as_an_artefact(copy: Path):
    change_manifest(copy, lambda table: table["files"].update({"config.json": {"bytes": "many"}}))
    with pytest.raises(BundleError, match="build the artefact again"):
        Bundle.open(copy)


# --- artefacts that share weights


@pytest.mark.parametrize(("method", "keep"), [("random", 5), ("resize", 9)])
def test_a_twin_shares_the_weight_files(checkpoint: Path, copy: Path, tmp_path: Path, method: str, keep: int):
    original = Bundle.open(copy)  # a copy, because onnx refuses to load a weight file with two names
    with BundleWriter(tmp_path / "twin") as writer:
        export(design(recipe_for(checkpoint, {"method": method, "keep": keep})), writer, twin=original)
        twin = writer.commit()
    for graph in GRAPHS:
        first, second = (bundle.graph_path(graph).with_name(f"{graph}.onnx_data") for bundle in (twin, original))
        assert first.samefile(second) or first.read_bytes() == second.read_bytes()
    assert Bundle.open(twin.path, check_all=True).plan.entering_llm == keep


# --- single files


def test_a_text_file_is_replaced_as_a_whole(tmp_path: Path):
    path = tmp_path / "deep" / "file.txt"
    write_atomically(path, "old")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_a_text_file_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "file.txt").mkdir()
    with pytest.raises(BundleError, match=r"file\.txt cannot be written \(.*\)"):
        write_atomically(tmp_path / "file.txt", "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]
