"""LoRA on the language model behind the tokens that the relevance compressor keeps (arXiv 2506.01097).

The paper leaves the model as it is. A model that counts by which share of the tokens shows something counts too much of
what is kept on purpose; tuned behind the choice, it need not.

B conversations, I of them with an image, T tokens, L of them up to the answer, N vision tokens, M kept ones, D width,
H heads, E head width
"""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tokexport.errors import RecipeError
from tokexport.exporter.export import Design
from tokexport.exporter.method import UNTRAINED
from tokexport.exporter.modules import ops
from tokexport.exporter.modules.span_attention import attention_to_span
from tokexport.exporter.plan import PositionPolicy
from tokexport.training.compressed import NO_LABEL, Arriving
from tokexport.training.loop import Listener
from tokexport.training.lora import LoraTuning, tune_lora
from tokexport.training.relevance import method_of
from tokexport.training.tuning_data import Material


class RelevantThinning:
    """The tokens that a network finds most important for the first question, by the attention of the layer behind.

    Args:
        network: the compressor's, trained.
        count: M.
        positions: which the kept tokens have.
    """

    def __init__(self, network: nn.Module, count: int, positions: PositionPolicy) -> None:
        self.positions: PositionPolicy = positions
        self._network, self._count = network.eval().requires_grad_(False), count

    def choose(self, arriving: Arriving) -> Tensor:
        """Return (I, M), ascending."""
        device = arriving.hidden_BTD.device
        # Scores in bfloat16 would tie. And weights that autocast rounds where no gradient is taken, it keeps so.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            attention_IN = asked_attention(arriving)
            if not len(attention_IN):
                return torch.zeros(0, self._count, dtype=torch.int64, device=device)
            # No part of what is trained, so nothing else has brought it here.
            return ops.top_tokens(self._network.to(device)(attention_IN), self._count)


def asked_attention(arriving: Arriving) -> Tensor:
    """Return how much the text between an image and the answer to it attends to the image, (I, N) in float32.

    It is averaged over heads and these tokens. Conversations without an image are left out; of one without an answer,
    all that follows the image asks.
    """
    found: list[Tensor] = []
    for row, is_image_T in enumerate(arriving.is_image_BT):
        image_N = is_image_T.nonzero()[:, 0]
        if not len(image_N):
            continue
        first, behind = int(image_N[0]), int(image_N[-1]) + 1
        # What says the first token of the answer is the last that asks.
        said = (arriving.target_BT[row, behind:] != NO_LABEL).nonzero()[:, 0]
        end = behind + int(said[0]) + 1 if len(said) else len(is_image_T)
        query_1HLE, key_1HLE = _rotated(arriving, row, end)
        found.append(attention_to_span(query_1HLE[:, :, behind:], key_1HLE, first, len(image_N)))
    return torch.cat(found) if found else arriving.hidden_BTD.new_zeros(0, 0)


def _rotated(arriving: Arriving, row: int, length: int) -> tuple[Tensor, Tensor]:
    """Return queries and keys of the first ``length`` tokens of a row, as the layer behind makes them."""
    attention = arriving.layer.self_attn
    hidden_1LD = arriving.hidden_BTD[row : row + 1, :length].to(attention.q_proj.weight.dtype)
    normed_1LD = arriving.layer.input_layernorm(hidden_1LD)
    query_1HLE, key_1HLE = (
        project(normed_1LD).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2).float()
        for project in (attention.q_proj, attention.k_proj)
    )
    # Angles are of every row, or one for all.
    cos_1LE, sin_1LE = (part[row if len(part) > 1 else 0][None, :length].float() for part in arriving.angles)
    return apply_rotary_pos_emb(query_1HLE, key_1HLE, cos_1LE, sin_1LE)


def tune_behind_relevance(
    made: Design, material: Material, tuning: LoraTuning, folder: Path, *, listener: Listener | None = None
) -> Path:
    """Tune a model to the tokens that a recipe's relevance compressor keeps, and store the adapter.

    See ``tune_lora``.

    Raises:
        RecipeError: relevance is not the recipe's only method, or its network is not trained.
        CheckpointError: its weights, or the adapter to start from, do not fit.
        TrainingError: see ``fit``.
    """
    method, spec = method_of(made), made.model.spec
    if method.weights == UNTRAINED:
        raise RecipeError(
            f"recipe {made.recipe.name} has an untrained network, which keeps tokens at random; train one with "
            "'tokexport train relevance' and give it with --compressor"
        )
    learned = dict(method.learned(spec, made.plans[0]))
    network = method.network()
    network.load_state_dict(learned)
    thinning = RelevantThinning(network, made.plan.per_layer[0], method.positions)
    return tune_lora(
        made,
        material,
        tuning,
        folder,
        stages=({0: thinning},),
        run_name=f"behind relevance {made.recipe.name}",
        settings={
            "keep": made.plan.per_layer[0],
            "positions": method.positions,
            "network": hashlib.sha256(save(learned)).hexdigest()[:12],
        },
        listener=listener,
    )
