"""Training of the bundled mini model, in the order in which LLaVA itself was trained.

The vision tower first learns to see (what does each patch show?), the projector to name what is seen, then the
language model to talk about the patches that matter, and at last about whole images.

B images, N vision tokens, C width of the tower
"""

import copy
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

import tokexport.recipes
from tokexport.dialogues.questions import KINDS
from tokexport.dialogues.scene import BACKGROUNDS, CATEGORIES, COLOURS, SIZES, TEXTURES
from tokexport.errors import TrainingError, nearest
from tokexport.exporter.export import design
from tokexport.recipes.load import load_recipe
from tokexport.training.compressed import CompressedLlava
from tokexport.training.conversation import ConversationEncoder
from tokexport.training.curve import draw_curve
from tokexport.training.frozen import load_llava
from tokexport.training.loop import Listener, Schedule, attention_for, fit, make_accelerator
from tokexport.training.mini_data import CELLS, PATCHES, Captions, Conversations, CrowdedScenes
from tokexport.training.mini_start import start_locally, start_looking_up
from tokexport.training.progress_bars import without_progress_bars

WEIGHTS_FILE = "model.safetensors"

# What each patch is asked for, in how many classes, and how much it counts.
_PATCH_TASKS = {
    "category": (len(CATEGORIES) + 1, 1.0),
    "colour": (len(COLOURS) + 1, 0.5),
    "size": (len(SIZES) + 1, 0.25),
    "centre": (2, 0.5),
    "background": (len(BACKGROUNDS), 0.1),
    "texture": (len(TEXTURES), 0.1),
}
# The words for what a patch shows; all but the background's are of objects.
_PATCH_WORDS = {"category": CATEGORIES, "colour": tuple(COLOURS), "size": SIZES, "background": tuple(BACKGROUNDS)}
_UNNAMED = {"row": PATCHES, "column": PATCHES, "texture": len(TEXTURES)}
_NAME_SHARPNESS = 0.11
# Most patches show no object; without a weight the tower learns for long to say so.
_EMPTY_WEIGHT = 0.2
_COVER_STATE, _COVER_WEIGHT = 2, 5.0
# Seeing a patch wrong costs some nats, naming it otherwise than before less than this.
_ANCHOR = 2.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the training.

    Attributes:
        name: of its folder and in the log.
        trained: beginnings of the names of the parameters that learn.
        schedule: how long and how fast.
        kinds: of questions, one that stands there twice coming up twice as often; where there are none, pictures are
            described.
        text_tokens: of a conversation.
        image_tokens: that are read of an image. The objects take up few of them, and a language model learns several
            times as fast from those few; where they stand it is told all the same.
    """

    name: str
    trained: tuple[str, ...]
    schedule: Schedule
    kinds: tuple[str, ...] = KINDS
    text_tokens: int = 384
    image_tokens: int = PATCHES**2


TOWER, PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
LANGUAGE = ("model.language_model.", "lm_head.")

# Not the words: what images are made of would no longer be like them.
_READING = ("model.language_model.layers.", "model.language_model.norm.", "lm_head.")

STAGES = (
    Stage(
        name="see",
        trained=(TOWER,),
        schedule=Schedule(num_steps=5200, batch_size=4, learning_rate=2e-3, optimizer="muon", log_every=50),
    ),
    Stage(
        name="name",
        trained=(PROJECTOR,),
        schedule=Schedule(num_steps=600, batch_size=8, learning_rate=3e-3),
    ),
    Stage(
        name="tell",
        trained=_READING,
        schedule=Schedule(num_steps=250, batch_size=8, learning_rate=2e-3, optimizer="muon"),
        kinds=(),
        text_tokens=96,
        image_tokens=160,
    ),
    Stage(
        name="talk",
        trained=_READING,
        schedule=Schedule(num_steps=5000, batch_size=8, learning_rate=2e-3, optimizer="muon"),
        # What takes longest to learn comes up more often: at a thirtieth of the questions, whether colours are the same
        # is a guess after any number of steps.
        kinds=(*KINDS, "counting", *("comparison.same_colour",) * 2),
        image_tokens=80,
    ),
    Stage(
        name="whole",
        trained=_READING,
        schedule=Schedule(num_steps=1400, batch_size=8, learning_rate=1e-3, optimizer="muon"),
        kinds=(*KINDS, "counting", "comparison", "comparison.same_colour"),
    ),
    Stage(
        name="count",
        trained=_READING,
        schedule=Schedule(num_steps=1300, batch_size=8, learning_rate=1e-3, optimizer="muon"),
        kinds=(*KINDS, *("counting",) * 7, "reading", "comparison.same_colour"),
    ),
    Stage(
        name="sharpen",
        trained=(TOWER, PROJECTOR),
        schedule=Schedule(num_steps=1200, batch_size=4, learning_rate=2e-4, optimizer="muon"),
    ),
)


class PixelNormalizer(nn.Module):
    """What the image processor does to an image that already has the right size."""

    mean_311: Tensor
    std_311: Tensor

    def __init__(self, processor: Any) -> None:
        super().__init__()
        image = processor.image_processor
        self.register_buffer("mean_311", torch.tensor(image.image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std_311", torch.tensor(image.image_std).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return pixel values of bytes (B, 3, height, width)."""
        return (pixels.float() / 255 - self.mean_311) / self.std_311


class PatchReader(nn.Module):
    """Reads from the features of every patch what the patch shows."""

    def __init__(self, llava: LlavaForConditionalGeneration, normalizer: PixelNormalizer) -> None:
        super().__init__()
        self.llava, self.normalizer = llava, normalizer
        vision: Any = llava.config.vision_config
        width: int = vision.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, (classes, _) in _PATCH_TASKS.items()})
        self.norm = nn.LayerNorm(width)
        self.cover_norm, self.cover = nn.LayerNorm(width), nn.Linear(width, CELLS**2)

    def forward(self, pixels: Tensor, **labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the weighted cross entropy of all tasks, and which share of the objects' patches was right."""
        states = self.llava.model.vision_tower(self.normalizer(pixels), output_hidden_states=True).hidden_states
        features_BNC = self.norm(states[self.llava.config.vision_feature_layer][:, 1:])
        is_object_BN = labels["category"] > 0
        # Telling objects from background, whatever the colours, comes before telling them apart: asked for early in
        # the tower, it is learned within minutes, and the rest soon after.
        covered = self.cover(self.cover_norm(states[_COVER_STATE][:, 1:])).float()
        loss = _COVER_WEIGHT * functional.binary_cross_entropy_with_logits(covered, labels["cover"])
        figures: dict[str, Tensor] = {"cover": loss.detach()}
        for name, head in self.heads.items():
            classes, weight = _PATCH_TASKS[name]
            logits, wanted = head(features_BNC).float().flatten(0, 1), labels[name].flatten()
            weights = torch.ones(classes, device=logits.device)
            if name not in ("background", "texture"):
                weights[0] = _EMPTY_WEIGHT
            loss = loss + weight * functional.cross_entropy(logits, wanted, weight=weights)
            right = (logits.argmax(-1) == wanted).view_as(is_object_BN)
            figures[name] = (right & is_object_BN).sum() / is_object_BN.sum().clamp(min=1)
        return loss, figures


class PatchNamer(nn.Module):
    """Makes the projection of every patch the sum of the words for what it shows.

    What the language model then reads of an image is like text, and it can look up what it is asked for by likeness.
    """

    def __init__(self, llava: LlavaForConditionalGeneration, normalizer: PixelNormalizer, tokenizer: Any) -> None:
        super().__init__()
        self.llava, self.normalizer = llava, normalizer
        for task, words in _PATCH_WORDS.items():
            ids = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
            assert all(len(pieces) == 1 for pieces in ids), f"a {task} is more than one token: {words}"
            self.register_buffer(task, torch.tensor(ids)[:, 0], persistent=False)
        # The middles of objects are what is counted, and have to be heard as well as words are. Two that the tokenizer
        # never gives stand for middle and edge.
        num_words: int = llava.config.get_text_config().vocab_size
        assert len(tokenizer) <= num_words - 2
        self.register_buffer("centre", torch.tensor([num_words - 2, num_words - 1]), persistent=False)
        # What there are no words for has to pass too: where a patch is, and what the tower was asked besides.
        width: int = llava.config.get_text_config().hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in _UNNAMED.items()})
        places_N = torch.arange(PATCHES**2)
        self.register_buffer("row_N", places_N // PATCHES, persistent=False)
        self.register_buffer("column_N", places_N % PATCHES, persistent=False)

    def forward(self, pixels: Tensor, **labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the cross entropy over the words of every kind, and which share of the patches was named right."""
        with torch.no_grad():
            features_BNC = self.features(pixels)
        projected_BND, loss, scale = self.projected(features_BNC)
        figures: dict[str, Tensor] = {"scale": scale}
        words, named = self.words(projected_BND, labels)
        loss, figures = loss + words, {**figures, **named}
        places = {"row": self.get_buffer("row_N"), "column": self.get_buffer("column_N")}
        for name, head in self.heads.items():
            logits_YK = head(projected_BND).float().flatten(0, 1)
            wanted_Y = places[name].repeat(len(pixels)) if name in places else labels[name].flatten()
            loss = loss + functional.cross_entropy(logits_YK, wanted_Y)
            figures[name] = (logits_YK.argmax(-1) == wanted_Y).float().mean()
        return loss, figures

    def features(self, pixels: Tensor) -> Tensor:
        """Return what the tower makes of images, (B, N, C)."""
        llava = self.llava
        states = llava.model.vision_tower(self.normalizer(pixels), output_hidden_states=True).hidden_states
        return states[llava.config.vision_feature_layer][:, 1:]

    def projected(self, features_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return projections at one loudness (B, N, D), how far theirs is from that of words, and what it is."""
        projected_BND = self.llava.model.multi_modal_projector(features_BNC).float()
        scale = projected_BND.pow(2).mean(-1, keepdim=True).add(1e-8).sqrt()
        # Words and images are to enter the language model equally loud.
        share = scale / self._table.std()
        return projected_BND / scale, (share - 1).pow(2).mean(), share.mean().detach()

    def words(self, projected_BND: Tensor, labels: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the cross entropy over the words of every kind, and which share of the patches was named right."""
        loss, figures = projected_BND.new_zeros(()), dict[str, Tensor]()
        is_object_BN = labels["category"] > 0
        for task in (*_PATCH_WORDS, "centre"):
            chosen_BN = ~is_object_BN if task == "background" else is_object_BN
            first = 0 if task in ("background", "centre") else 1  # where there is a label for no object
            words_KD = self._table[self.get_buffer(task)] / self._table.std()
            logits_XK = _NAME_SHARPNESS * projected_BND[chosen_BN] @ words_KD.T
            wanted_X = labels[task][chosen_BN] - first
            loss = loss + functional.cross_entropy(logits_XK, wanted_X)
            figures[task] = (logits_XK.argmax(-1) == wanted_X).float().mean()
        return loss, figures

    @property
    def _table(self) -> Tensor:
        embeddings: Any = self.llava.get_input_embeddings()
        return embeddings.weight.detach().float()


class PatchSharpener(nn.Module):
    """Mends what tower and projector see wrong, and leaves the rest as it is.

    The language model then reads on without learning anew. What it was used to is kept by staying near the projections
    from before, as in arXiv 1606.09282.
    """

    def __init__(self, namer: PatchNamer) -> None:
        super().__init__()
        self.namer = namer
        self.before = copy.deepcopy(namer).requires_grad_(False)

    def forward(self, pixels: Tensor, **labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the cross entropy over the words of every kind plus how far projections have moved."""
        with torch.no_grad():
            expected_BND, _, _ = self.before.projected(self.before.features(pixels))
        projected_BND, loss, scale = self.namer.projected(self.namer.features(pixels))
        words, figures = self.namer.words(projected_BND, labels)
        moved = (projected_BND - expected_BND).pow(2).mean()
        return loss + words + _ANCHOR * moved, {"scale": scale, "moved": moved.detach(), **figures}


class Talker(nn.Module):
    """Answers the questions of conversations about images given as bytes."""

    def __init__(self, model: nn.Module, normalizer: PixelNormalizer) -> None:
        super().__init__()
        self.model, self.normalizer = model, normalizer

    def forward(
        self, pixels: Tensor, input_ids: Tensor, labels: Tensor, read: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return what the model returns."""
        return self.model(self.normalizer(pixels), input_ids, labels, read)


def train_mini(
    folder: Path,
    *,
    stages: Sequence[Stage] = STAGES,
    seed: int = 0,
    first: str | None = None,
    listener: Listener | None = None,
) -> Path:
    """Train the bundled mini model from nothing, going on where an earlier run in ``folder`` stopped.

    Args:
        folder: where checkpoints, logs and the result go.
        stages: what is trained, one after the other.
        seed: of weights and data.
        first: name of the stage to begin with, on the weights that ship; by default all stages, from nothing.
        listener: told how it goes.

    Returns:
        A checkpoint directory like the bundled one, with weights in float16.

    Raises:
        TrainingError: see ``fit``.
    """
    listener = listener or Listener()
    source = bundled_mini()
    torch.manual_seed(seed)
    skipped = 0 if first is None else _place_of(first, stages)
    if first is None:
        llava = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(source))
        start_locally(llava)
        start_looking_up(llava)
    else:
        llava = load_llava(design(load_recipe("mini_full")).model)
    llava.set_attn_implementation(attention_for(make_accelerator().device))
    processor = LlavaProcessor.from_pretrained(source)
    normalizer = PixelNormalizer(processor)
    description = hashlib.sha256((source / "config.json").read_bytes() + (source / "tokenizer.json").read_bytes())
    description = description.hexdigest()[:12]
    for number, stage in enumerate(stages[skipped:], start=skipped):
        objective, examples = _task(stage, llava, processor, normalizer, seed + number)
        require_grad(llava, stage.trained)
        fit(
            objective,
            examples,
            stage.schedule,
            folder / stage.name,
            stage=stage.name,
            settings={
                "seed": seed,
                "trained": stage.trained,
                "kinds": stage.kinds,
                "text_tokens": stage.text_tokens,
                "image_tokens": stage.image_tokens,
                "model": description,
            },
            compiled=compiled_parts(llava),
            listener=listener,
        )
    draw_curve(folder, [stage.name for stage in stages[skipped:]])
    return write_checkpoint(llava, folder / "checkpoint")


def _place_of(name: str, stages: Sequence[Stage]) -> int:
    names = [stage.name for stage in stages]
    if name not in names:
        raise TrainingError(f"there is no stage {name!r}{nearest(name, names)}; stages are {', '.join(names)}")
    return names.index(name)


def bundled_mini() -> Path:
    """Return the folder of the bundled mini model."""
    return Path(str(resources.files(tokexport.recipes))) / "models" / "mini"


def require_grad(llava: nn.Module, trained: Sequence[str]) -> None:
    """Let the parameters learn whose names begin so, and no others."""
    for name, parameter in llava.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(trained)))


def compiled_parts(llava: LlavaForConditionalGeneration) -> list[nn.Module]:
    """Return the modules worth compiling: they run often, with tensors of one size."""
    return [*llava.model.vision_tower.encoder.layers, *llava.model.language_model.layers]


def write_checkpoint(llava: LlavaForConditionalGeneration, folder: Path) -> Path:
    """Write weights in float16 beside configuration, tokenizer and processor of the bundled model.

    Raises:
        TrainingError: the folder cannot be written.
    """
    replica = LlavaForConditionalGeneration(llava.config)
    replica.load_state_dict(llava.state_dict())
    partial = folder.with_suffix(".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(bundled_mini(), partial, ignore=shutil.ignore_patterns(WEIGHTS_FILE))
        configuration = (partial / "config.json").read_bytes()
        with without_progress_bars():
            replica.half().save_pretrained(partial)
        # save_pretrained notes the precision of the weights; the model is what it was.
        (partial / "config.json").write_bytes(configuration)
        (partial / "generation_config.json").unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{folder} cannot be written ({error}); free some room or choose another folder") from error
    return folder


def _task(
    stage: Stage, llava: LlavaForConditionalGeneration, processor: Any, normalizer: PixelNormalizer, seed: int
) -> "tuple[nn.Module, Dataset[Any]]":
    # More than a schedule on several GPUs takes; examples are made when they are asked for.
    num = 64 * stage.schedule.num_steps * stage.schedule.batch_size
    if stage.trained == (TOWER,):
        return PatchReader(llava, normalizer), CrowdedScenes(seed, num)
    if stage.trained == (PROJECTOR,):
        return PatchNamer(llava, normalizer, processor.tokenizer), CrowdedScenes(seed, num)
    if stage.trained == (TOWER, PROJECTOR):
        namer = PatchNamer(llava, normalizer, processor.tokenizer)
        return PatchSharpener(namer), CrowdedScenes(seed, num, is_styled=True)
    encoder = ConversationEncoder(processor, stage.image_tokens)
    room: Mapping[str, Any] = {
        "pad_id": processor.tokenizer.pad_token_id,
        "text_tokens": stage.text_tokens,
        "num_image_tokens": stage.image_tokens,
        "num": num,
        "seed": seed,
    }
    examples = Conversations(encoder, kinds=stage.kinds, **room) if stage.kinds else Captions(encoder, **room)
    return Talker(CompressedLlava(llava, {}), normalizer), examples


def shortened(stages: Sequence[Stage], scale: float) -> tuple[Stage, ...]:
    """Return the stages with a share of their steps."""
    return tuple(
        replace(
            stage,
            schedule=replace(stage.schedule, num_steps=max(1, round(scale * stage.schedule.num_steps))),
        )
        for stage in stages
    )
