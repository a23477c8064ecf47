"""Training of the relevance network: what learns, what is kept, what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import adsc, recipe_for
from tests.training.conftest import write_llava_data
from tokexport.errors import RecipeError, TrainingError
from tokexport.exporter.export import design
from tokexport.exporter.modules.relevance import RelevanceNet
from tokexport.training.loop import Schedule
from tokexport.training.relevance import LABELS, Explaining, Imitation, Labels, kept_share, train_relevance
from tokexport.training.tuning_data import Material, llava_material

RELEVANCE = {"method": "relevance", "keep": 6, "channels": [4, 8], "kernel": 3, "weights": "untrained"}
THINNED = {"method": "adsc", "drops": [{"layer": 2, "keep": 3}]}
EXPLAINING = Explaining(
    schedule=Schedule(num_steps=4, batch_size=2, learning_rate=1e-2, log_every=1), num_conversations=5, batch_size=2
)


@pytest.fixture(scope="module")
def material(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Material:
    made = design(recipe_for(checkpoint, RELEVANCE))
    return llava_material(made, *write_llava_data(tmp_path_factory.mktemp("data")), num=100)


def test_the_network_learns_to_find_what_labels_say():
    # What matters stands behind a token that is attended to.
    place = torch.randint(0, 15, (64, 1), generator=torch.Generator().manual_seed(0))
    attention = torch.rand(64, 16, generator=torch.Generator().manual_seed(0)).scatter(1, place, 9.0)
    label = torch.zeros(64, 16).scatter(1, place + 1, 1.0)
    network = RelevanceNet((8, 8), 3)
    network.start(torch.Generator().manual_seed(0))
    imitation, optimizer = Imitation(network, 2), torch.optim.Adam(network.parameters(), 1e-2)
    before = imitation(attention, label)[1]["kept"]
    for _ in range(150):
        imitation(attention, label)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before < 0.4
    assert imitation(attention, label)[1]["kept"] > 0.8


def test_the_share_kept_by_hand():
    score, label = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[0.5, 0.3, 0.2]])
    assert [kept_share(score, label, count).item() for count in (1, 2, 3)] == pytest.approx([0.5, 0.7, 1.0])


def test_every_label_comes_once_an_epoch_each_time_in_another_order():
    labels = Labels(torch.arange(7.0).unsqueeze(1), torch.arange(7.0).unsqueeze(1), 21, 0)
    epochs = [[int(labels[7 * epoch + place]["label"]) for place in range(7)] for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_what_is_trained_can_be_built_with(checkpoint: Path, material: Material, tmp_path: Path):
    made = design(recipe_for(checkpoint, RELEVANCE))
    path, kept = train_relevance(made, material, EXPLAINING, tmp_path)
    assert set(kept) == {"network", "attention", "random"}
    assert kept["random"] == 6 / 16
    built = design(recipe_for(checkpoint, {**RELEVANCE, "weights": str(path)}))
    learned = built.methods[0].learned(built.model.spec, built.plans[0])
    assert learned.keys() == load_file(path).keys()
    started = RelevanceNet((4, 8), 3)
    started.start(torch.Generator().manual_seed(0))
    assert all(not torch.equal(learned[name], value) for name, value in started.named_parameters())


def test_labels_are_made_once(checkpoint: Path, material: Material, tmp_path: Path):
    made = design(recipe_for(checkpoint, RELEVANCE))
    train_relevance(made, material, EXPLAINING, tmp_path)
    (stored,) = (tmp_path / LABELS).iterdir()
    written = stored.stat().st_mtime_ns
    longer = replace(EXPLAINING, schedule=replace(EXPLAINING.schedule, learning_rate=1e-3))
    (tmp_path / "state.safetensors").unlink()
    train_relevance(made, material, longer, tmp_path)
    assert stored.stat().st_mtime_ns == written


def test_a_corrupt_file_of_labels_is_named(checkpoint: Path, material: Material, tmp_path: Path):
    made = design(recipe_for(checkpoint, RELEVANCE))
    train_relevance(made, material, EXPLAINING, tmp_path)
    (stored,) = (tmp_path / LABELS).iterdir()
    stored.write_bytes(stored.read_bytes()[:100])
    with pytest.raises(
        TrainingError, match=f"{stored.name} cannot be read .* delete it, and its labels are made again"
    ):
        train_relevance(made, material, EXPLAINING, tmp_path)


def test_labels_of_other_data_are_refused(checkpoint: Path, material: Material, tmp_path: Path):
    made = design(recipe_for(checkpoint, RELEVANCE))
    train_relevance(made, material, EXPLAINING, tmp_path)
    with pytest.raises(TrainingError, match="holds labels of another run"):
        train_relevance(made, replace(material, name="others"), EXPLAINING, tmp_path)


@pytest.mark.parametrize("steps", [[], [adsc()], [RELEVANCE, THINNED]], ids=["none", "another", "two"])
def test_a_recipe_of_another_method_is_refused(
    checkpoint: Path, material: Material, tmp_path: Path, steps: list[dict[str, object]]
):
    with pytest.raises(RecipeError, match="this training is for relevance alone"):
        train_relevance(design(recipe_for(checkpoint, *steps)), material, EXPLAINING, tmp_path)
