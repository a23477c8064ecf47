"""LoRA on the language model behind the tokens that the relevance compressor keeps (arXiv 2506.01097).

The paper leaves the model as it is. A model that counts by which share of the tokens shows something counts too much of
what is kept on purpose; tuned behind the choice, it need not.

B conversations, I of them with an image, T tokens, H heads, G key/value heads, E head width, N vision tokens, M kept
ones, R rows from the image to the answer, L tokens up to the answer
"""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tokexport.exporter.export import Design
from tokexport.exporter.modules import ops
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

    @torch.no_grad()
    def choose(self, arriving: Arriving) -> Tensor:
        """Return (I, M)."""
        if not arriving.is_image_BT.any():
            return torch.zeros(0, self._count, dtype=torch.int64, device=arriving.is_image_BT.device)
        attention_IN = asked_attention(arriving)
        score_IN = self._network.to(attention_IN.device)(attention_IN)
        return ops.top_tokens(score_IN, self._count)


def asked_attention(arriving: Arriving) -> Tensor:
    """Return how much the text between an image and the first answer attends to the image, (I, N), a mean over both.

    Rows without an image are left out, those without an answer ask with all that follows the image.
    """
    has_image_B = arriving.is_image_BT.any(1)
    is_image_IT, is_learned_IT = arriving.is_image_BT[has_image_B], (arriving.target_BT != NO_LABEL)[has_image_B]
    hidden_ITD = arriving.hidden_BTD[has_image_B]
    place_T = torch.arange(is_image_IT.shape[1], device=is_image_IT.device)
    last_image_I1 = torch.where(is_image_IT, place_T, -1).amax(1, keepdim=True)
    # The token that says the first one of the answer is the last that asks.
    first_I1 = torch.where(is_learned_IT & (place_T > last_image_I1), place_T, len(place_T)).amin(1, keepdim=True)
    is_asking_IT = (place_T > last_image_I1) & (place_T <= first_I1)
    start, end = int(last_image_I1.min()) + 1, min(len(place_T), int(first_I1.max()) + 1)
    share_IRL = _attention(arriving, hidden_ITD[:, :end], has_image_B, start)
    is_asking_IR1 = is_asking_IT[:, start:end].unsqueeze(-1)
    asked_IL = (share_IRL * is_asking_IR1).sum(1) / is_asking_IR1.sum(1)
    return asked_IL[is_image_IT[:, :end]].view(len(is_image_IT), -1)


def _attention(arriving: Arriving, hidden_ILD: Tensor, has_image_B: Tensor, start: int) -> Tensor:
    """Return the attention of the layer's rows from ``start`` on, averaged over heads, (I, R, L)."""
    attention, length = arriving.layer.self_attn, hidden_ILD.shape[1]
    normed_ILD = arriving.layer.input_layernorm(hidden_ILD)
    query_IHLE, key_IGLE = (
        project(normed_ILD).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj)
    )
    cos_ILE, sin_ILE = (part.expand(len(has_image_B), -1, -1)[has_image_B][:, :length] for part in arriving.angles)
    query_IHLE, key_IGLE = apply_rotary_pos_emb(query_IHLE, key_IGLE, cos_ILE, sin_ILE)
    key_IHLE = key_IGLE.repeat_interleave(query_IHLE.shape[1] // key_IGLE.shape[1], dim=1)
    score_IHRL = (query_IHLE[:, :, start:] @ key_IHLE.mT).float() * attention.scaling
    place_L = torch.arange(length, device=score_IHRL.device)
    is_later_RL = place_L > place_L[start:].unsqueeze(-1)
    return score_IHRL.masked_fill(is_later_RL, -torch.inf).softmax(-1).mean(1)


def tune_behind_relevance(
    made: Design, material: Material, tuning: LoraTuning, folder: Path, *, listener: Listener | None = None
) -> Path:
    """Tune a model to the tokens that a recipe's relevance compressor keeps, and store the adapter.

    See ``tune_lora``.

    Raises:
        RecipeError: relevance is not the recipe's only method.
        CheckpointError: its weights, or the adapter to start from, do not fit.
        TrainingError: see ``fit``.
    """
    method, spec = method_of(made), made.model.spec
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
        stage=f"behind relevance {made.recipe.name}",
        settings={
            "keep": made.plan.per_layer[0],
            "positions": method.positions,
            "network": hashlib.sha256(save(learned)).hexdigest()[:12],
        },
        listener=listener,
    )
