"""Which form of MetaCompress suits the mini model, and what each term of its loss is worth: all trained alike.

Tower and teacher are run once for all variants. Before and behind the training, each reads the same conversations of
the validation split: the figure is the share of the answers' tokens that the model finds right, each with the right
answers before it. Run from the root of the repository: ``python benchmarks/sweep_metacompress.py``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, get_args

import click
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import LlavaForConditionalGeneration

from tokexport.dialogues.questions import KINDS
from tokexport.exporter.compressor_file import save_compressor
from tokexport.exporter.export import Design, design
from tokexport.exporter.modules.token_mixing import START_BETA
from tokexport.exporter.plan import PositionPolicy
from tokexport.recipes.load import load_recipe
from tokexport.recipes.schema import Recipe
from tokexport.training.compressed import CompressedLlava
from tokexport.training.loop import Schedule
from tokexport.training.metacompress import Distillation, Distiller, Lesson, compressor_of, distiller_of, frozen_llava
from tokexport.training.tuning_data import made_material

_PAPER_CLIP = 1e-2
# Far above any norm that occurs.
_NO_CLIP = 1e9
_BATCH_SIZE = 8
_OPTIONS = {"sample": "phase = 0.5", "random": "seed = 0", "pool": 'pattern = "stride"'}
_STRIDE = 'pattern = "stride"'
_GRID = 'pattern = "grid"'


@dataclass(frozen=True)
class Variant:
    """One form of MetaCompress, with options in TOML, and of its training; by default that of the weights that ship."""

    options: str = f'{_STRIDE}, positions = "keep"'
    keep: int | None = None
    entropy: float = 0.1
    column: float = 0.1
    clip: float = _PAPER_CLIP
    beta: float = START_BETA
    learning_rate: float = 3e-3

    def recipe(self, keep: int) -> Recipe:
        """Return the recipe of an untrained compressor."""
        step = f'{{method = "metacompress", keep = {self.keep or keep}, weights = "untrained", {self.options}}}'
        return load_recipe("mini_full", [f"compress=[{step}]"])


VARIANTS: Mapping[str, Variant] = {
    "all terms": Variant(),
    "divergence alone": Variant(entropy=0, column=0),
    "divergence, entropy": Variant(column=0),
    "divergence, column, without clipping": Variant(entropy=0, clip=_NO_CLIP),
    "divergence, column": Variant(entropy=0),
    "a hundredth of the paper's terms": Variant(entropy=0.01, column=0.01),
    "learning rate 1e-2": Variant(learning_rate=1e-2),
    "width 192": Variant(f'{_STRIDE}, positions = "keep", width = 192'),
    "side by side": Variant(_STRIDE),
    "side by side, the paper's terms": Variant(_STRIDE, entropy=1, column=1),
    "side by side, the paper's terms, 1e-3": Variant(_STRIDE, entropy=1, column=1, learning_rate=1e-3),
    "side by side, beta from 16": Variant(_STRIDE, beta=16),
    "side by side, grid of 49": Variant(_GRID, keep=49),
    "side by side, grid of 64": Variant(_GRID, keep=64),
}


class Learner:
    """One variant while it learns."""

    def __init__(self, variant: Variant, keep: int, llava: LlavaForConditionalGeneration, num_steps: int) -> None:
        made = design(variant.recipe(keep))
        self.schedule = Schedule(
            num_steps=num_steps,
            batch_size=_BATCH_SIZE,
            learning_rate=variant.learning_rate,
            max_grad_norm=variant.clip,
        )
        distillation = Distillation(schedule=self.schedule, entropy=variant.entropy, column=variant.column)
        self.method, self.arriving = compressor_of(made)
        self.compressor = self.method.feature_stage(made.model.spec, self.arriving)
        self.compressor.matrix.start(torch.Generator().manual_seed(distillation.seed), variant.beta)
        self.distiller = distiller_of(made, llava, self.compressor.matrix, distillation)
        self._optimizer = torch.optim.AdamW(self.compressor.parameters(), betas=(0.9, 0.98), weight_decay=0.05)

    def learn(self, lesson: Lesson, step: int) -> None:
        """Take one step."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate * self.schedule.rate(step)
        loss, _ = self.distiller.compare(lesson)
        loss.backward()
        nn.utils.clip_grad_norm_(self.compressor.parameters(), self.schedule.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def store(self, path: Path) -> None:
        """Write what was learned where a recipe can read it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_compressor(path, self.compressor, self.method.trained_sizes(self.arriving))


class Lessons(nn.Module):
    """Makes lessons of batches of made conversations."""

    def __init__(self, llava: LlavaForConditionalGeneration) -> None:
        super().__init__()
        whole = CompressedLlava(llava, {})
        self._distiller = Distiller(whole, whole, nn.Identity())

    def forward(self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor, read: Tensor) -> Lesson:
        """Return the lesson of a batch, images read whole."""
        return self._distiller.lesson(pixel_values, input_ids, labels)


class FixedMatrix(nn.Module):
    """The matrix of a method that treats every image alike."""

    def __init__(self, method: str, keep: int, positions: str) -> None:
        super().__init__()
        step = f'{{method = "{method}", keep = {keep}, positions = "{positions}", {_OPTIONS[method]}}}'
        made = design(load_recipe("mini_full", [f"compress=[{step}]"]))
        stage = made.methods[0].feature_stage(made.model.spec, made.plans[0])
        assert stage is not None
        self.plan = made.plans[1]
        self.register_buffer("matrix_1MN", stage(torch.eye(made.plans[0].entering_llm).unsqueeze(0)))

    def forward(self, features_IND: Tensor) -> Tensor:
        """Return matrices (I, M, N)."""
        return self.get_buffer("matrix_1MN").expand(len(features_IND), -1, -1)


@click.command()
@click.option("--keep", default=58, show_default=True, help="Of 576 tokens.")
@click.option("--steps", default=100, show_default=True, help="Of training.")
@click.option("--conversations", default=128, show_default=True, help="Of the validation split.")
@click.option("--only", multiple=True, metavar="NAME", help="Variants, by default all.")
@click.option("--threads", type=int, help="By default one per core.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/sweep_metacompress"), show_default=True)
def main(keep: int, steps: int, conversations: int, only: tuple[str, ...], threads: int | None, out: Path) -> None:
    """Train and ask every variant, and print a table."""
    if threads is not None:
        torch.set_num_threads(threads)
    made = design(load_recipe("mini_full"))
    schedule = Schedule(num_steps=steps, batch_size=_BATCH_SIZE, learning_rate=1e-3)
    llava = frozen_llava(made, Distillation(schedule=schedule))
    learners = {
        name: Learner(variant, keep, llava, steps) for name, variant in VARIANTS.items() if not only or name in only
    }
    # Asked once, before anything is learned: what teaches is the same for all.
    asked = list(_lessons(made, llava, conversations, split="validation", text_tokens=256, kinds=KINDS))
    untrained = {name: _right(learner.distiller, asked) for name, learner in learners.items()}
    for step, lesson in enumerate(_lessons(made, llava, steps * _BATCH_SIZE)):
        for learner in learners.values():
            learner.learn(lesson, step)
        if (step + 1) % 10 == 0:
            click.echo(f"step {step + 1} of {steps}", err=True)
    click.echo("| variant | untrained | trained |\n|---|---:|---:|")
    whole = CompressedLlava(llava, {})
    for method, positions in product(_OPTIONS, get_args(PositionPolicy)):
        matrix = FixedMatrix(method, keep, positions)
        right = _right(Distiller(whole, whole, matrix, plan=matrix.plan), asked)
        click.echo(f"| {method}, positions {positions} | {right} | – |")
    for number, (name, learner) in enumerate(learners.items()):
        learner.store(out / f"{number}_{keep}_{steps}" / "compressor.safetensors")
        click.echo(f"| {name} | {untrained[name]} | {_right(learner.distiller, asked)} |")


def _lessons(made: Design, llava: LlavaForConditionalGeneration, num: int, **options: Any) -> Iterator[Lesson]:
    material = made_material(made, num=num, **options)
    teacher = material.objective_of(Lessons(llava))
    for batch in DataLoader(
        Subset(material.examples, range(num)), batch_size=_BATCH_SIZE, collate_fn=material.collate, num_workers=1
    ):
        yield teacher(**batch)


def _right(distiller: Distiller, asked: Sequence[Lesson]) -> str:
    """Return the share of tokens found right, with its 95 % interval, in percent."""
    with torch.inference_mode():
        shares = [100 * distiller.compare(lesson)[1]["right"].item() for lesson in asked]
    return f"{mean(shares):.1f} ± {1.96 * stdev(shares) / len(shares) ** 0.5:.1f}"


if __name__ == "__main__":
    main()
