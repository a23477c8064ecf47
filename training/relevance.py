"""Training of the relevance compressor (arXiv 2506.01097): labels from the model itself, and a small network.

The labels are made once and kept beside the checkpoint, as they cost far more than the network does.

B conversations, N vision tokens
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from tokexport.errors import RecipeError, TrainingError
from tokexport.exporter.checkpoint import fingerprint
from tokexport.exporter.compressor_file import FILE_NAME, save_compressor
from tokexport.exporter.export import Design
from tokexport.exporter.methods.relevance import Relevance
from tokexport.exporter.modules.relevance import RelevanceNet
from tokexport.training.frozen import load_llava
from tokexport.training.loop import Listener, Schedule, fit, make_accelerator
from tokexport.training.roll_out import RollOut
from tokexport.training.tuning_data import Material

LABELS = "labels"
_CONVERSATIONS_A_FILE = 64
_KEYS = ("attention", "label")
# Of the conversations, to tell how it does on what it has not seen.
_HELD_OUT = 0.1


@dataclass(frozen=True, kw_only=True)
class Explaining:
    """How labels are made and learned.

    Attributes:
        schedule: of the network; its batches are of labels.
        num_conversations: that are explained.
        batch_size: conversations explained at once.
        seed: of the network and of the order.
    """

    schedule: Schedule
    num_conversations: int
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Labels(Dataset[dict[str, Tensor]]):
    """What the network reads and is to say, again and again in another order.

    Attributes:
        attention_BN: see ``RollOut``.
        label_BN: see ``RollOut``.
        num: examples in all.
        seed: of the orders.
    """

    attention_BN: Tensor
    label_BN: Tensor
    num: int
    seed: int

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, place = divmod(index, len(self.label_BN))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        chosen = int(torch.randperm(len(self.label_BN), generator=generator)[place])
        return {"attention": self.attention_BN[chosen], "label": self.label_BN[chosen]}


class Imitation(nn.Module):
    """Holds the network's importance against the labels.

    Args:
        network: makes scores of attention.
        count: tokens that are kept.
    """

    def __init__(self, network: RelevanceNet, count: int) -> None:
        super().__init__()
        self.network, self._count = network, count

    def forward(self, attention: Tensor, label: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the divergence of the importance from labels (B, N), and the share of these that would be kept."""
        score_BN = self.network(attention)
        divergence = nn.functional.kl_div(score_BN.float().log_softmax(-1), label, reduction="batchmean")
        return divergence, {"kept": kept_share(score_BN.detach(), label, self._count)}


def kept_share(score_BN: Tensor, label_BN: Tensor, count: int) -> Tensor:
    """Return the share of the labels that stays with the ``count`` highest scores."""
    return label_BN.gather(1, score_BN.topk(count).indices).sum(1).mean()


def train_relevance(
    made: Design, material: Material, explaining: Explaining, folder: Path, *, listener: Listener | None = None
) -> tuple[Path, Mapping[str, float]]:
    """Train the network of a recipe, the model left as it is.

    Args:
        made: the recipe, checked against its model.
        material: what to learn from; the first answer of each conversation is explained.
        explaining: how.
        folder: where labels, checkpoint, log and network go.
        listener: told how it goes.

    Returns:
        The network's file, and which share of the labels of conversations held out it keeps, beside what the attention
        as it is and tokens at random would keep.

    Raises:
        RecipeError: relevance is not the recipe's only method.
        TrainingError: labels that cannot be read or are of another run, and see ``fit``.
    """
    method = method_of(made)
    listener = listener or Listener()
    attention_BN, label_BN = _labels(made, material, explaining, folder / LABELS, listener)
    num_held_out = max(1, round(_HELD_OUT * len(label_BN)))
    if num_held_out == len(label_BN):
        raise TrainingError(f"{len(label_BN)} conversations are too few; give at least 2")
    network, count = method.network(), made.plan.per_layer[0]
    network.start(torch.Generator().manual_seed(explaining.seed))
    schedule = explaining.schedule
    fit(
        Imitation(network, count),
        Labels(
            attention_BN[num_held_out:],
            label_BN[num_held_out:],
            schedule.num_steps * schedule.batch_size,
            explaining.seed,
        ),
        schedule,
        folder,
        stage=f"relevance {made.recipe.name}",
        settings={**_settings(made, material), "keep": count, "num": len(label_BN), "seed": explaining.seed},
        listener=listener,
    )
    path = folder / FILE_NAME
    accelerator = make_accelerator()
    if accelerator.is_main_process:
        try:
            save_compressor(path, network, method.trained_sizes())
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"{path} cannot be written ({error}); free some room or choose another folder"
            ) from error
    accelerator.wait_for_everyone()
    attention_BN, label_BN = attention_BN[:num_held_out], label_BN[:num_held_out]
    with torch.inference_mode():
        score_BN = network.cpu()(attention_BN)
    return path, {
        "network": kept_share(score_BN, label_BN, count).item(),
        "attention": kept_share(attention_BN, label_BN, count).item(),
        "random": count / label_BN.shape[1],
    }


def method_of(made: Design) -> Relevance:
    """Return the recipe's method.

    Raises:
        RecipeError: it has none of this kind, or others too.
    """
    if len(made.methods) != 1 or not isinstance(made.methods[0], Relevance):
        names = [method.name for method in made.methods]
        raise RecipeError(f"recipe {made.recipe.name} has the methods {names}; this training is for relevance alone")
    return made.methods[0]


def _labels(
    made: Design, material: Material, explaining: Explaining, folder: Path, listener: Listener
) -> tuple[Tensor, Tensor]:
    """Return attention and labels (B, N), made or read."""
    run = json.dumps(_settings(made, material), sort_keys=True)
    parts: list[Mapping[str, Tensor]] = []
    explain: nn.Module | None = None
    for first in range(0, explaining.num_conversations, _CONVERSATIONS_A_FILE):
        last = min(first + _CONVERSATIONS_A_FILE, explaining.num_conversations)
        path = folder / f"{first:06d}_{last:06d}.safetensors"
        found = _read(path, run)
        if found is None:
            if explain is None:
                explain = material.objective_of(RollOut(load_llava(made.model))).eval()
            batches = DataLoader(
                Subset(material.examples, range(first, last)),
                batch_size=explaining.batch_size,
                collate_fn=material.collate,
            )
            explained = [part for batch in batches if len((part := explain(**batch))["label"])]
            if not explained:
                raise TrainingError(
                    f"none of the conversations {first + 1} to {last} of {material.name} has an image; give data with "
                    "images"
                )
            found = {key: torch.cat([part[key] for part in explained]).float() for key in _KEYS}
            _write(path, found, run)
        listener.tick(last, explaining.num_conversations)
        parts.append(found)
    attention_BN, label_BN = (torch.cat([part[key] for part in parts]) for key in _KEYS)
    return attention_BN, label_BN


def _settings(made: Design, material: Material) -> dict[str, str]:
    return {"model": fingerprint(made.model)[:12], "data": material.name}


def _read(path: Path, run: str) -> Mapping[str, Tensor] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {}).get("run")
            found = {key: file.get_tensor(key) for key in _KEYS}
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path} cannot be read ({error}); delete it, and its labels are made again") from error
    if stored != run:
        raise TrainingError(
            f"{path} holds labels of another run ({stored}), expected {run}; choose another folder or delete it"
        )
    return found


def _write(path: Path, values: Mapping[str, Tensor], run: str) -> None:
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in values.items()}, partial, {"run": run})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise TrainingError(f"{path} cannot be written ({error}); free some room or choose another folder") from error
