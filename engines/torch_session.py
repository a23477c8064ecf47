"""Sessions of PyTorch, which runs the very modules that were traced.

Weights are read from the checkpoint, not from the artefact, so that comparing the two also proves
that the weights arrived.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokexport.engines.backend import Array, Choice, DecoderStep, Device, Session, SessionOptions
from tokexport.engines.environment import available_cores
from tokexport.exporter.export import Design, weight_names
from tokexport.exporter.graph_io import GRAPHS, GraphName
from tokexport.exporter.method import chooser_names
from tokexport.exporter.modules.bottleneck import Chooser
from tokexport.exporter.modules.rounding import round_layers
from tokexport.exporter.weights import Weights

# What a method makes of image features, and its parts.
_STAGES = re.compile(r"stages\.[^.]+(\.[^.]+)?")


class TorchSession(Session):
    """The modules of a design with their weights, in the precision of the export.

    Args:
        made: the design.
        options: room and threads.
        is_quantized: round what the recipe quantizes as its graphs do; otherwise nothing is rounded.
        device: where it is computed and the cache is kept.
        weights: of the model where they are open already, e.g. because several sessions share them; not to be rounded.
    """

    def __init__(
        self,
        made: Design,
        options: SessionOptions,
        *,
        is_quantized: bool = False,
        device: Device = "cpu",
        weights: Weights | None = None,
    ) -> None:
        # Rounding changes weights where they are, and so those of every other session.
        assert not (is_quantized and weights is not None)
        super().__init__(made.model.spec, made.plan, options)
        torch.set_num_threads(options.threads or available_cores())
        self._dtype, self._device = getattr(torch, made.recipe.export.dtype), torch.device(device)
        self._tapped = made.model.family.vision_layers
        self._choosing = made.choosing_layers
        self._stage_hooks: list[RemovableHandle] = []
        self._followed: list[Mapping[int, NDArray[np.int64]]] = []
        self._modules = _loaded_modules(made, weights, self._dtype, self._device)
        if is_quantized:
            for graph, module in self._modules.items():
                round_layers(graph, module, made.recipe.quantize)
        self._cache = [
            (self._empty(self.capacities[group]), self._empty(self.capacities[group]))
            for group in made.plan.group_of_layer
        ]

    def follow(self, kept_tokens: Sequence[Mapping[int, NDArray[np.int64]]]) -> None:
        """Keep these tokens, (B, M) by the layers of bottlenecks, of the next images, whatever would be chosen."""
        self._followed = list(kept_tokens)

    def follow_stages(self, kept_tokens: Mapping[str, NDArray[np.int64]]) -> None:
        """Keep these tokens, (B, M) by the names of choosers, of images from now on, B at a time.

        What was to be followed before is not followed any more.
        """
        for hook in self._stage_hooks:
            hook.remove()
        indices = {name: torch.from_numpy(kept_BM).to(self._device) for name, kept_BM in kept_tokens.items()}
        self._stage_hooks = [
            self._modules["vision_encoder"]
            .get_submodule(name)
            .register_forward_hook(lambda _module, _inputs, _output, index_BM=index_BM: index_BM)
            for name, index_BM in indices.items()
        ]

    @torch.inference_mode()
    def encode_images(self, pixel_values: NDArray[np.float32]) -> Array:
        return _to_numpy(self._modules["vision_encoder"](self._tensor(pixel_values)))

    @torch.inference_mode()
    def vision_layer_outputs(self, pixel_values: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Return the output of every layer of the vision tower, of the projector and of each method, by module name."""
        encoder, outputs = self._modules["vision_encoder"], {}

        def note(name: str) -> Callable[[nn.Module, object, Tensor], None]:
            return lambda _module, _inputs, output: outputs.__setitem__(name, _to_numpy(output))

        hooks = [
            module.register_forward_hook(note(name))
            for name, module in encoder.named_modules()
            if self._tapped.fullmatch(name) or _STAGES.fullmatch(name)
        ]
        encoder(self._tensor(pixel_values))
        for hook in hooks:
            hook.remove()
        return outputs

    @torch.inference_mode()
    def stage_choices(
        self, pixel_values: NDArray[np.float32], kept_tokens: Mapping[str, NDArray[np.int64]]
    ) -> dict[str, Choice]:
        """Return by what a ``Chooser`` in a method's stage keeps tokens, and which it keeps.

        Args:
            pixel_values: (B, 3, P, P).
            kept_tokens: what was kept so far, (B, M), by the chooser's name.
        """
        encoder, choices = self._modules["vision_encoder"], {}

        def note(name: str) -> Callable[[Chooser, tuple[Tensor], Tensor], None]:
            kept_BM = torch.from_numpy(kept_tokens[name]).to(self._device)

            def noted(chooser: Chooser, seen: tuple[Tensor], index_BM: Tensor) -> None:
                score_BN = chooser.scores(seen[0], kept_BM)
                choices[name] = Choice(score_BN.cpu().numpy(), index_BM.cpu().numpy())

            return noted

        hooks = [encoder.get_submodule(name).register_forward_hook(note(name)) for name in kept_tokens]
        encoder(self._tensor(pixel_values))
        for hook in hooks:
            hook.remove()
        return choices

    @torch.inference_mode()
    def embed(self, input_ids: NDArray[np.int64]) -> Array:
        return _to_numpy(self._modules["embed_tokens"](torch.from_numpy(input_ids).to(self._device)))

    @torch.inference_mode()
    def decode(self, step: DecoderStep) -> NDArray[np.float32]:
        embeds = [self._tensor(array) for array in (step.prefix_embeds, step.image_features, step.suffix_embeds)]
        positions, to_keep = (torch.from_numpy(x).to(self._device) for x in (step.position_ids, step.logits_to_keep))
        # Lengths stay on the CPU, which slices the cache by them: reading them from a GPU would wait for it.
        return _to_numpy(self._run(*embeds, positions, torch.from_numpy(step.past_lengths), to_keep))

    def _run(self, *inputs: Tensor) -> Tensor:
        """Return the logits of the decoder's inputs in their order, the cache left out."""
        has_image = inputs[1].shape[1] > 0
        followed = self._followed.pop(0) if has_image and self._followed else {}
        kept = {layer: torch.from_numpy(kept_BM).to(self._device) for layer, kept_BM in followed.items()}
        logits, _, choices = self._modules["decoder_model_merged"](*inputs, self._cache, kept)
        if has_image:
            made = (Choice(score_BN.cpu().numpy(), kept_BM.cpu().numpy()) for score_BN, kept_BM in choices)
            self.choices = dict(zip(self._choosing, made, strict=True))
        return logits

    def read_cache(self, layer: int, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        key, value = self._cache[layer]
        return _to_numpy(key[:, :, :length]), _to_numpy(value[:, :, :length])

    @property
    def kv_bytes(self) -> int:
        return sum(tensor.nbytes for pair in self._cache for tensor in pair)

    def _empty(self, capacity: int) -> Tensor:
        return torch.zeros(
            1, self.spec.num_kv_heads, capacity, self.spec.head_dim, dtype=self._dtype, device=self._device
        )

    def _tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, self._dtype)


@dataclass(frozen=True)
class Follower:
    """Opens our modules, made to keep what another side's vision encoder kept.

    Attributes:
        made: the design.
        options: room and threads.
        kept: (B, M) by the names of choosers.
        is_quantized: whether they round what the recipe quantizes.
    """

    made: Design
    options: SessionOptions
    kept: Mapping[str, NDArray[np.int64]]
    is_quantized: bool = False

    @classmethod
    def of(
        cls,
        outputs: Mapping[str, NDArray[np.float32]],
        made: Design,
        options: SessionOptions,
        *,
        is_quantized: bool = False,
    ) -> "Follower":
        """Return what keeps the tokens that stand among outputs of modules of a vision encoder."""
        kept = {name: outputs[name].astype(np.int64) for name in chooser_names(made.methods)}
        return cls(made, options, kept, is_quantized)

    def open(self) -> TorchSession:
        """Return a session; what its bottlenecks keep is not followed yet."""
        session = TorchSession(self.made, self.options, is_quantized=self.is_quantized)
        session.follow_stages(self.kept)
        return session

    def without_kept(self, outputs: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Return outputs without those of choosers, which are what is followed."""
        return {name: values for name, values in outputs.items() if name not in self.kept}

    def keeps_as(self, outputs: Mapping[str, NDArray[np.float32]]) -> bool:
        """Return whether the vision encoder that computed these outputs kept the same."""
        return all(np.array_equal(outputs[name], kept_BM) for name, kept_BM in self.kept.items())


def _loaded_modules(
    made: Design, of_model: Weights | None, dtype: torch.dtype, device: torch.device
) -> dict[GraphName, nn.Module]:
    weights = made.open_weights(of_model)
    with torch.device("meta"):
        modules = made.modules()
    for graph in GRAPHS:
        _load(modules[graph], weight_names(graph, modules[graph], made.model.family), weights, dtype, device)
    return modules


def _load(module: nn.Module, names: dict[str, str], weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
    state = {name: weights.load(canonical).to(device, dtype) for name, canonical in names.items()}
    module.load_state_dict(state, strict=True, assign=True)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device, dtype if buffer.is_floating_point() else buffer.dtype)
    module.eval().requires_grad_(False)


def _to_numpy(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.float().cpu().numpy()


class GraphedTorchSession(TorchSession):
    """The same with single tokens as a CUDA graph, so that no time goes into launching kernels.

    Without a GPU nothing is captured: the same buffers are filled and the modules run as they are.
    """

    def __init__(self, made: Design, options: SessionOptions, *, device: Device = "cuda") -> None:
        super().__init__(made, options, device=device)
        width, groups = self.spec.hidden_size, len(self.plan.groups)
        none = torch.zeros(1, 0, width, dtype=self._dtype, device=self._device)
        self._embed_11D = torch.zeros(1, 1, width, dtype=self._dtype, device=self._device)
        self._position_11, self._past_G1, first = (
            torch.zeros(shape, dtype=torch.int64, device=self._device) for shape in ((1, 1), (groups, 1), (1,))
        )
        self._inputs = (none, none, self._embed_11D, self._position_11, self._past_G1, first)
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def decode(self, step: DecoderStep) -> NDArray[np.float32]:
        is_one_token = step.suffix_embeds.shape[1] == 1 and not step.prefix_embeds.size and not step.image_features.size
        if not is_one_token:
            return super().decode(step)
        self._embed_11D.copy_(torch.from_numpy(np.ascontiguousarray(step.suffix_embeds)))
        self._position_11.copy_(torch.from_numpy(step.position_ids))
        self._past_G1.copy_(torch.from_numpy(step.past_lengths))
        if self._graph is not None:
            self._graph.replay()
        else:
            self._first_run()
        assert self._logits is not None
        return _to_numpy(self._logits)

    def _first_run(self) -> None:
        self._logits = self._run(*self._inputs)
        if self._device.type != "cuda":
            return
        # That was the warm-up: nothing may be set up for the first time while a graph is captured. Replaying it for the
        # same token writes the same to the same place again.
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._run(*self._inputs)
        self._graph.replay()
