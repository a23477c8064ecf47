"""What exporting a model of full size costs beside copying its files: seconds, and memory above the interpreter's.

Makes a checkpoint of random weights in the layout of published ones (sharded safetensors), copies it, and exports it.
Run from the root of the repository: ``python -m benchmarks.streamed_export``; LLaVA-1.5-7B takes 14 GB for each of
checkpoint, copy and artefact, of which the last two are removed again.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import psutil

from benchmarks.random_checkpoint import write_checkpoint
from tokexport.exporter.export import design
from tokexport.recipes.load import load_recipe

_BASELINE = "import time, torch, transformers, onnx, onnx_ir, onnxscript; time.sleep(1)"
_EXPORT = "from tokexport.cli import main; main()"


@click.command()
@click.option("--recipe", "-r", default="llava15_adsc", show_default=True)
@click.option("--num-layers", type=int, help="Cut the decoder, to try the script.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/streamed"), show_default=True)
def main(recipe: str, num_layers: int | None, out: Path) -> None:
    """Print one table."""
    settings = ['model.weights="random"'] + ([f"model.num_layers={num_layers}"] if num_layers else [])
    made = design(load_recipe(recipe, settings))
    checkpoint = out / f"{made.recipe.model.checkpoint.rpartition('/')[2]}-{made.model.spec.num_layers}-random"
    write_checkpoint(made, checkpoint)
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    _forget(checkpoint)
    copy_seconds = _copy(checkpoint, out / "copy")
    baseline = _peak([sys.executable, "-c", _BASELINE])
    artefact = out / "artefact"
    _forget(checkpoint)
    arguments = ["export", "-r", recipe, "--model", str(checkpoint), "--dtype", "float16", "-o", str(artefact)]
    export = _peak([sys.executable, "-c", _EXPORT, *arguments, "--overwrite", "--quiet"])
    shutil.rmtree(artefact)
    click.echo("| | |\n|---|---:|")
    click.echo(f"| weights | {size / 1e9:.2f} GB |")
    click.echo(f"| plain copy, to the disk | {copy_seconds:.0f} s |")
    click.echo(f"| export, to the disk | {export.seconds:.0f} s |")
    click.echo(f"| 1.5 x the copy + 90 s | {1.5 * copy_seconds + 90:.0f} s |")
    click.echo(f"| interpreter with the same libraries | {baseline.resident / 1e6:.0f} MB |")
    click.echo(f"| export above it, resident | {(export.resident - baseline.resident) / 1e6:.0f} MB |")
    click.echo(f"| of which its own, not pages of files | {(export.anonymous - baseline.anonymous) / 1e6:.0f} MB |")


def _forget(folder: Path) -> None:
    """Let the system drop what it keeps of files in memory: the first to read them would be the only one to wait."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _copy(folder: Path, target: Path) -> float:
    """Return the seconds until a copy of the files is on the disk, and remove it."""
    os.sync()
    started = time.perf_counter()
    shutil.copytree(folder, target, dirs_exist_ok=True)
    os.sync()
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


class _Peak:
    """The largest memory of a process, in bytes, and how long it ran."""

    resident = anonymous = 0
    seconds = 0.0


def _peak(command: list[str]) -> _Peak:
    """Run a command, and look at its memory ten times a second."""
    peak, started = _Peak(), time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, "TQDM_DISABLE": "1"})
    watched, is_over = psutil.Process(process.pid), threading.Event()

    def watch() -> None:
        while not is_over.wait(0.1):
            try:
                memory = watched.memory_info()
            except psutil.NoSuchProcess:
                return
            peak.resident = max(peak.resident, memory.rss)
            peak.anonymous = max(peak.anonymous, memory.rss - memory.shared)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    is_over.set()
    watcher.join()
    if code:
        raise click.ClickException(f"{' '.join(command[:3])} ... ended with {code}")
    os.sync()
    peak.seconds = time.perf_counter() - started
    return peak


if __name__ == "__main__":
    main()
