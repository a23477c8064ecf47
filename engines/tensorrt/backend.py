"""What both TensorRT backends do, over the library that each names."""

from collections.abc import Callable
from pathlib import Path

from tokexport.engines.backend import AttentionKind, Compiler, SessionOptions
from tokexport.engines.environment import missing_gpu
from tokexport.engines.tensorrt.compiler import build_decoder, build_vision_encoder
from tokexport.engines.tensorrt.engine_folder import engine_path, find, require_disk, require_none, store
from tokexport.engines.tensorrt.flash_plugin import register_flash_attention, require_plugins
from tokexport.engines.tensorrt.library import Library, gpu_capability, require_capability
from tokexport.engines.tensorrt.session import TensorrtSession
from tokexport.errors import BackendUnavailableError
from tokexport.exporter.bundle import Bundle


class TensorrtBackend(Compiler):
    """Engines with fused attention, in place on the GPU."""

    # No fused attention computes in float32, and an unfused one is not built.
    dtypes = ("float16", "bfloat16")

    device = "cuda"

    library: Library

    def state(self) -> str:
        here, targets = gpu_capability(), ", ".join(self.library.targets)
        if here is None:
            what = f"compiles for compute capability {targets}; " if targets else ""
            return f"{what}to run, {missing_gpu()}"
        if targets and here not in self.library.targets:
            return f"compiles for compute capability {targets}; the GPU in this machine has {here}"
        return ""

    def compile(
        self,
        bundle: Bundle,
        options: SessionOptions,
        *,
        capability: str | None = None,
        attention: AttentionKind = "fused",
        overwrite: bool = False,
        progress: Callable[[str], None] = lambda _: None,
    ) -> Path:
        self.require(bundle.recipe.export.dtype)
        if attention == "plugin":
            require_plugins(self.library)
        chosen = self._capability(capability)
        path = engine_path(bundle, self.library, chosen)
        if not overwrite:
            require_none(path)
        target = self.library.require_target(chosen) if self.library.targets else None
        require_disk(bundle)
        if attention == "plugin":
            register_flash_attention(self.library, bundle.spec, bundle.recipe.export.dtype, chosen)
        progress(f"building the vision encoder for compute capability {chosen}")
        vision = build_vision_encoder(bundle, self.library, options, target)
        progress("building the decoder")
        decoder = build_decoder(bundle, self.library, options, target, attention)
        store(path, bundle, self.library, chosen, options, attention, {"vision_encoder": vision, "decoder": decoder})
        return path

    def open(self, bundle: Bundle, options: SessionOptions) -> TensorrtSession:
        self.require(bundle.recipe.export.dtype)
        reason = self.state()
        if reason:
            raise BackendUnavailableError(f"backend {self.name!r} cannot run here: {reason}")
        from tokexport.engines.tensorrt.gpu_runner import GpuRunner

        engines = find(bundle, self.library, self._capability(None), options)
        return TensorrtSession(bundle, options, engines.room, GpuRunner(bundle, self.library, engines))

    def _capability(self, asked: str | None) -> str:
        """Return what to build for: what is asked for, else the GPU in this machine.

        Raises:
            BackendUnavailableError: neither.
            InputError: not a compute capability, or none that the library can build for here.
        """
        here, targets = gpu_capability(), self.library.targets
        if asked is not None:
            chosen = require_capability(asked)
            if not targets and chosen != here:
                self.library.require_target(chosen)
            return chosen
        if here is not None:
            return here
        if not targets:
            raise BackendUnavailableError(
                f"backend {self.name!r} builds on the GPU that it runs on, and this machine has none; compile there, "
                "or for RTX GPUs with --backend tensorrt-rtx"
            )
        return _USUAL_TARGET if _USUAL_TARGET in targets else targets[-1]


# Ada Lovelace: GeForce RTX 40, L4, L40.
_USUAL_TARGET = "8.9"
