"""What a compression method learned, in one safetensors file with the sizes it was trained for."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokexport.errors import CheckpointError
from tokexport.exporter.bundled import local_directory

FILE_NAME = "compressor.safetensors"
"""In the folder of weights that ship; their name is the folder's."""


def load_compressor(source: str, module: nn.Module, sizes: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the values of a module's parameters, in the precision they are stored in.

    Args:
        source: a file, a folder with one, or the name of weights that ship.
        module: whose parameters they are; it may stand on the meta device.
        sizes: what the values were trained for, in words, as given to ``save_compressor``.

    Raises:
        CheckpointError: no such file, a damaged one, or one for another module or other sizes.
    """
    path = _path_of(source)
    try:
        with safe_open(path, framework="pt") as file:
            stored: Mapping[str, str] = file.metadata() or {}
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except FileNotFoundError:
        raise CheckpointError(
            f"there are no compressor weights {source}; train them with 'tokexport train' and give the file with "
            "--compressor"
        ) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}); fetch or train it again") from error
    _require_sizes(path, stored, sizes)
    _require_shapes(path, values, module)
    for name, value in values.items():
        if not value.isfinite().all():
            count = int((~value.isfinite()).sum())
            raise CheckpointError(f"{path}: {name} has {count} values that are no numbers; train it again")
    return values


def save_compressor(path: Path, module: nn.Module, sizes: Mapping[str, str]) -> None:
    """Write the values of a module's parameters.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: value.detach().contiguous() for name, value in module.named_parameters()}, partial, dict(sizes))
    partial.replace(path)


def _path_of(source: str) -> Path:
    folder = local_directory(source)
    return Path(source).expanduser() if folder is None else folder / FILE_NAME


def _require_sizes(path: Path, stored: Mapping[str, str], sizes: Mapping[str, str]) -> None:
    faults = [
        f"{key} {stored.get(key, 'unknown')}, the recipe has {value}"
        for key, value in sizes.items()
        if stored.get(key) != value
    ]
    if faults:
        raise CheckpointError(f"{path} was trained for {'; '.join(faults)}; train it for this recipe")


def _require_shapes(path: Path, values: Mapping[str, Tensor], module: nn.Module) -> None:
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    found = {name: tuple(value.shape) for name, value in values.items()}
    faults = [f"no {name}" for name in expected if name not in found]
    faults += [f"{name}, which is not known" for name in found if name not in expected]
    faults += [
        f"{name} of {_shape(found[name])}, expected {_shape(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if faults:
        raise CheckpointError(f"{path} has {'; '.join(faults)}; it was trained for another model or another recipe")


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"
