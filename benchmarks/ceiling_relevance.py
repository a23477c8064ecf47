"""What a choice of tokens can keep of the mini model's first answers, and what the relevance compressor keeps of it.

Each question is asked with as many vision tokens as the recipe keeps, where they have been. They are chosen by the
shipped network, by the attention that it reads, by the labels that it learned from (which see the answer), by where the
objects are (which no model is told), and evenly. An answer is right if all its tokens are the likeliest, each with the
right ones before it. Of wrong counts it is told how many are too high and too low. Run from the root of the repository:
``python benchmarks/ceiling_relevance.py``.

B conversations, T tokens with M of N vision tokens
"""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from tokexport.dialogues.questions import KINDS
from tokexport.errors import TokexportError
from tokexport.exporter.export import design
from tokexport.recipes.load import load_recipe
from tokexport.training.compressed import NO_LABEL
from tokexport.training.frozen import load_llava
from tokexport.training.relevance import method_of
from tokexport.training.roll_out import RollOut, first_answers
from tokexport.training.tuning_data import made_material

CHOICES = ("all tokens", "network", "attention", "labels", "objects", "evenly")
_BATCH_SIZE = 8
# Room for one question; conversations are cut behind the first answer.
_TEXT_TOKENS = 40


class Answers(NamedTuple):
    """Whether each is right, and its first token as it is and as it should be, (B,) each."""

    is_right_B: Tensor
    said_B: Tensor
    target_B: Tensor


class FirstAnswers(nn.Module):
    """Asks the first question of conversations with tokens of every choice.

    Args:
        llava: the model.
        network: the compressor's.
        num_vision: N.
    """

    def __init__(self, llava: LlavaForConditionalGeneration, network: nn.Module, num_vision: int) -> None:
        super().__init__()
        self._explain, self._network, self._num_vision = RollOut(llava), network, num_vision

    def forward(self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor, read: Tensor) -> Mapping[str, Answers]:
        """Return the answers with the tokens of each choice.

        Args:
            pixel_values: of an image each.
            input_ids: (B, T).
            labels: (B, T).
            read: the tokens of the objects, and others to make up M, (B, M).
        """
        whole = self._explain.whole
        first = int((input_ids[0] == whole.image_token).int().argmax())
        first_B, end_B = first_answers(labels)
        length, num_kept = int(end_B.max()), read.shape[1]
        place_T = torch.arange(length)
        is_first_BT = (place_T >= first_B.unsqueeze(1)) & (place_T < end_B.unsqueeze(1))
        input_ids, labels = input_ids[:, :length], labels[:, :length].where(is_first_BT, NO_LABEL)
        all_ids, all_labels = (
            torch.cat(
                (part[:, :first], part[:, first : first + 1].repeat(1, self._num_vision - num_kept), part[:, first:]), 1
            )
            for part in (input_ids, labels)
        )
        seen = self._explain(pixel_values, all_ids, all_labels)
        with torch.inference_mode():
            scores = {
                "network": self._network(seen["attention"]),
                "attention": seen["attention"],
                "labels": seen["label"],
            }
            evenly_M = torch.arange(num_kept) * self._num_vision // num_kept
            chosen: dict[str, Tensor] = {
                **{name: score_BN.topk(num_kept).indices.sort().values for name, score_BN in scores.items()},
                "objects": read,
                "evenly": evenly_M.expand_as(read),
            }
            features_BND = whole.image_features(pixel_values)
            kept = {name: self._ask(features_BND, input_ids, labels, read_BM) for name, read_BM in chosen.items()}
            return {"all tokens": self._ask(features_BND, all_ids, all_labels, None), **kept}

    def _ask(self, features_BND: Tensor, input_ids: Tensor, labels: Tensor, read_BM: Tensor | None) -> Answers:
        logits_AW, target_A = self._explain.whole.answer(features_BND, input_ids, labels, read_BM)
        said_A, row_A = logits_AW.argmax(-1), (labels != NO_LABEL).nonzero()[:, 0]
        num_wrong_B = torch.zeros(len(labels)).index_add(0, row_A, (said_A != target_A).float())
        first_B = torch.searchsorted(row_A, torch.arange(len(labels)))
        return Answers(num_wrong_B == 0, said_A[first_B], target_A[first_B])


def too_high_and_low(answers: Sequence[Answers], tokenizer: Any) -> str:
    """Return how many counts are above and below the right ones."""
    said, target = (
        [int(tokenizer.decode(token)) for part in answers for token in part[place].tolist()] for place in (1, 2)
    )
    high = sum(found > right for found, right in zip(said, target, strict=True))
    low = sum(found < right for found, right in zip(said, target, strict=True))
    return f"{high}, {low}"


@click.command()
@click.option("--recipe", default="benchmarks/mini/288_relevance_untuned.toml", show_default=True)
@click.option(
    "--conversations",
    default=128,
    show_default=True,
    type=click.IntRange(min=1),
    help="Of the validation split, for each kind.",
)
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), help="Of questions, by default all.")
@click.option("--threads", type=click.IntRange(min=1), help="By default one per core.")
def main(recipe: str, conversations: int, kinds: Sequence[str], threads: int | None) -> None:
    """Ask questions of every kind and print a table."""
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        _ask_all(recipe, conversations, kinds or KINDS)
    except TokexportError as error:
        raise click.ClickException(str(error)) from error


def _ask_all(recipe: str, conversations: int, kinds: Sequence[str]) -> None:
    made = design(load_recipe(recipe))
    method, spec = method_of(made), made.model.spec
    network = method.network()
    network.load_state_dict(dict(method.learned(spec, made.plans[0])))
    ask = FirstAnswers(load_llava(made.model), network.eval(), spec.num_vision_tokens)
    tokenizer = AutoTokenizer.from_pretrained(made.model.directory)
    click.echo(f"| kind | {' | '.join(CHOICES)} |\n|---|{'---:|' * len(CHOICES)}")
    shares: dict[str, list[float]] = {choice: [] for choice in CHOICES}
    for kind in kinds:
        material = made_material(
            made,
            num=conversations,
            text_tokens=_TEXT_TOKENS,
            split="validation",
            kinds=(kind,),
            num_read=made.plan.per_layer[0],
        )
        asked = material.objective_of(ask)
        answers = [asked(**batch) for batch in DataLoader(material.examples, _BATCH_SIZE)]
        for choice in CHOICES:
            is_right = torch.cat([part[choice].is_right_B for part in answers])
            shares[choice].append(100 * is_right.float().mean().item())
        click.echo(f"| {kind} | {' | '.join(f'{shares[choice][-1]:.1f}' for choice in CHOICES)} |")
        if kind == "counting":
            wrong = [too_high_and_low([part[choice] for part in answers], tokenizer) for choice in CHOICES]
            click.echo(f"| too high, too low | {' | '.join(wrong)} |")
    click.echo(f"| all kinds alike | {' | '.join(f'{mean(shares[choice]):.1f}' for choice in CHOICES)} |")


if __name__ == "__main__":
    main()
