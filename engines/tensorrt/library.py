"""The two TensorRT libraries behind one handle; they share a Python API."""

import re
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from tokexport.errors import BackendUnavailableError, InputError

_CAPABILITY = re.compile(r"(\d+)\.(\d)")


@dataclass(frozen=True)
class Library:
    """A TensorRT that was found.

    Attributes:
        module: what is imported.
        backend: the engine's name on the command line.
        version: of the library; engines belong to one.
    """

    module: Any
    backend: str
    version: str

    @classmethod
    def load(cls, module: str, backend: str, extra: str) -> "Library":
        """Import a library.

        Raises:
            BackendUnavailableError: it is not installed, or its files are not where they should be.
        """
        try:
            found = import_module(module)
        except (ImportError, OSError) as error:
            raise BackendUnavailableError(
                f"{module} is not installed or cannot be loaded ({error}); install it with: pip install "
                f"'tokexport[{extra}]'"
            ) from error
        return cls(found, backend, found.__version__)

    @property
    def targets(self) -> tuple[str, ...]:
        """Compute capabilities that it can build for without a GPU, e.g. 8.6; none where it builds for its own GPU."""
        enum = getattr(self.module, "ComputeCapability", None)
        names: list[str] = [] if enum is None else list(enum.__members__)
        return tuple(
            f"{name[2:-1]}.{name[-1]}"
            for name in sorted(names, key=lambda name: (len(name), name))
            if name.startswith("SM")
        )

    def require_target(self, capability: str) -> Any:
        """Return the library's word for a compute capability.

        Raises:
            InputError: it cannot build for it.
        """
        if capability not in self.targets:
            what = "only for the GPU in this machine" if not self.targets else f"for {', '.join(self.targets)}"
            raise InputError(
                f"{self.backend} {self.version} builds {what}, not for compute capability {capability}; choose one of "
                "these, or another engine ('tokexport doctor')"
            )
        return getattr(self.module.ComputeCapability, "SM" + capability.replace(".", ""))


def gpu_capability() -> str | None:
    """Return the compute capability of the GPU in this machine, None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def require_capability(text: str) -> str:
    """Return a compute capability as written.

    Raises:
        InputError: it is none.
    """
    if not _CAPABILITY.fullmatch(text):
        raise InputError(f"{text!r} is no compute capability; write it like 8.6")
    return text
