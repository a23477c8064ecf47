"""Tokens chosen inside the language model by attention: on cases worked out by hand, and beside ``transformers``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tests.conftest import IMAGE_SIZE, NUM_VISION_TOKENS, recipe_for
from tokexport.engines.backend import SessionOptions
from tokexport.engines.generate import IMAGE, Conversation
from tokexport.engines.parity import verify
from tokexport.engines.torch_session import TorchSession
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.export import design
from tokexport.exporter.modules import ops
from tokexport.exporter.modules.bottleneck import ScoredGather
from tokexport.exporter.modules.relevance import RelevanceNet
from tokexport.exporter.modules.span_attention import SpanAttention, TextRaters, attention_to_span
from tokexport.recipes.schema import Recipe

BEFORE, BEHIND = [5, 6, 7], [8, 9, 10, 11]
OPTIONS = SessionOptions(max_text_tokens=64, max_images=2, threads=1)
FASTV = {"method": "fastv", "keep": 6, "layer": 2}
PYRAMID = {"method": "pyramiddrop", "drops": [{"layer": 1, "keep": 8}, {"layer": 3, "keep": 4}], "positions": "keep"}
SPARSEVLM = {"method": "sparsevlm", "drops": [{"layer": 2, "keep": 10}, {"layer": 3, "keep": 4}]}
RELEVANCE = {"method": "relevance", "keep": 6, "weights": "untrained", "channels": [4, 8]}


# --- by hand


def test_the_highest_scores_stay_in_their_order_and_of_equals_the_first():
    score = torch.tensor([[0.1, 0.5, 0.2, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert ops.top_tokens(score, 2).tolist() == [[1, 3], [0, 1]]
    assert ops.top_tokens(score, 4).tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]


def test_of_no_tokens_none_stays():
    assert ops.top_tokens(torch.zeros(2, 0), 3).shape == (2, 0)


def test_each_row_has_its_own_tokens_picked():
    span = torch.arange(10).view(2, 5)
    index = torch.tensor([[0, 4], [1, 2]])
    assert ops.pick_tokens(span, index).tolist() == [[0, 4], [6, 7]]
    assert ops.pick_tokens(span.unsqueeze(-1), index).squeeze(-1).tolist() == [[0, 4], [6, 7]]


def test_only_the_vision_span_is_thinned():
    bottleneck = ScoredGather(2, SpanAttention("own", "last"), "keep")
    index = bottleneck.choose(torch.tensor([[0.1, 0.3, 0.2, 0.4], [0.4, 0.3, 0.2, 0.1]]))
    thinned = bottleneck(torch.arange(14).view(2, 7), 1, 4, index)
    assert thinned.tolist() == [[0, 2, 4, 5, 6], [7, 8, 9, 12, 13]]


def test_attention_is_averaged_over_rows_each_of_which_sees_nothing_later():
    # Two heads that score alike; every key is as likely as the next, so a row that sees n keys gives each 1 / n.
    query, key = torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 6, 4)
    # One token before the span of three, two behind: the rows see 5 and 6 keys.
    share = attention_to_span(query, key, 1, 3)
    torch.testing.assert_close(share, torch.full((1, 3), (1 / 5 + 1 / 6) / 2))


def test_without_a_row_all_attention_is_nothing():
    assert attention_to_span(torch.zeros(1, 2, 0, 4), torch.zeros(1, 2, 4, 4), 1, 3).tolist() == [[0.0, 0.0, 0.0]]


def test_rows_that_weigh_nothing_do_not_count():
    query, key = torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 6, 4)
    share = attention_to_span(query, key, 1, 3, torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(share, torch.full((1, 3), 1 / 6 / 2))


def test_raters_are_the_words_that_the_image_attends_to_more_than_to_the_mean():
    log = torch.tensor([3.0, 2.0, 1.0]).log()
    # One vision token shares itself 3 : 2 : 1, the other 1 : 1 : 1; together 5/6, 4/6 and 3/6, the mean being 4/6.
    vision, text = torch.tensor([[[1.0], [0.0]]]), log.view(1, 3, 1)
    assert TextRaters()(vision, text[:, [0, 2]]).tolist() == [[1.0, 0.0]]
    assert TextRaters()(vision, text)[0, [0, 2]].tolist() == [1.0, 0.0]


def test_of_words_that_are_all_alike_every_one_rates():
    assert TextRaters()(torch.ones(1, 4, 2), torch.ones(1, 1, 2)).tolist() == [[1.0]]
    assert TextRaters()(torch.ones(1, 4, 2), torch.ones(1, 4, 2)).tolist() == [[1.0] * 4]
    assert TextRaters()(torch.ones(1, 0, 2), torch.ones(1, 0, 2)).shape == (1, 0)


def test_the_relevance_network_reads_only_ratios_and_takes_any_length():
    network = RelevanceNet((4, 8), 5)
    network.start(torch.Generator().manual_seed(0))
    attention = torch.rand(2, 9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(network(attention), network(attention * 1000))
    assert network(attention[:, :0]).shape == (2, 0)
    assert network(attention).std() > 0.1


# --- beside transformers


def test_fastv_keeps_what_the_last_token_attends_to_in_the_layer_before(checkpoint: Path, chosen: "Chosen"):
    (kept,) = chosen(recipe_for(checkpoint, FASTV))
    share_TT = attention_of(checkpoint)[1].mean(0)
    assert kept == top(share_TT[-1], 6)


def test_pyramiddrop_looks_with_the_layer_that_follows(checkpoint: Path, chosen: "Chosen"):
    first, second = chosen(recipe_for(checkpoint, PYRAMID))
    share_TT = attention_of(checkpoint)[1].mean(0)
    assert first == top(share_TT[-1], 8)
    # What is left is 8 tokens, of which others have been forgotten since.
    assert len(second) == 4
    assert max(second) < 8


def test_sparsevlm_keeps_what_the_raters_attend_to_in_the_layer_before(checkpoint: Path, chosen: "Chosen"):
    llava: Any = LlavaForConditionalGeneration.from_pretrained(checkpoint)
    with torch.inference_mode():
        vision = torch.cat(list(llava.model.get_image_features(torch.from_numpy(pixels())).pooler_output))
        text = llava.get_input_embeddings()(torch.tensor(BEHIND))
    share_U = (vision @ text.T).softmax(-1).mean(0)
    raters = [row for row, share in enumerate(share_U.tolist()) if share > share_U.mean()]
    assert 0 < len(raters) < len(BEHIND)
    rows_UT = attention_of(checkpoint)[1].mean(0)[-len(BEHIND) :]
    first, second = chosen(recipe_for(checkpoint, SPARSEVLM))
    assert first == top(rows_UT[raters].mean(0), 10)
    assert first != top(rows_UT.mean(0), 10)
    assert len(second) == 4


def test_relevance_reads_the_text_behind_the_image_in_the_first_layer(
    checkpoint: Path, chosen: "Chosen", monkeypatch: pytest.MonkeyPatch
):
    read: list[Tensor] = []
    forward = RelevanceNet.forward

    def noting(network: RelevanceNet, attention_BN: Tensor) -> Tensor:
        read.append(attention_BN)
        return forward(network, attention_BN)

    monkeypatch.setattr(RelevanceNet, "forward", noting)
    (kept,) = chosen(recipe_for(checkpoint, RELEVANCE))
    share_TT = attention_of(checkpoint)[0].mean(0)
    first = len(BEFORE)
    expected = share_TT[-len(BEHIND) :, first : first + NUM_VISION_TOKENS].mean(0)
    torch.testing.assert_close(read[0][0], expected)
    network = RelevanceNet((4, 8), 7)
    network.start(torch.Generator().manual_seed(0))
    assert kept == sorted(forward(network, expected.unsqueeze(0))[0].topk(6).indices.tolist())


def test_the_choice_depends_on_the_question(checkpoint: Path, chosen: "Chosen"):
    assert chosen(recipe_for(checkpoint, FASTV)) != chosen(recipe_for(checkpoint, FASTV), behind=[300, 301, 302, 17])


@pytest.mark.parametrize("step", [FASTV, PYRAMID, RELEVANCE, SPARSEVLM], ids=lambda step: step["method"])
def test_every_rung_of_the_ladder_holds(checkpoint: Path, exported: Callable[[Recipe], Bundle], step: dict[str, Any]):
    found = verify(exported(recipe_for(checkpoint, step)), "ort", OPTIONS)
    assert [check for check in found.checks if not check.passed] == []


Chosen = Callable[..., list[list[int]]]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Chosen:
    """Return what finds which vision tokens each bottleneck of a recipe keeps."""

    def find(recipe: Recipe, behind: list[int] = BEHIND) -> list[list[int]]:
        found: list[list[int]] = []
        choose = ScoredGather.choose

        def noting(bottleneck: ScoredGather, attention_BN: Tensor | None) -> Tensor:
            index = choose(bottleneck, attention_BN)
            found.append(index[0].tolist())
            return index

        with monkeypatch.context() as patch:
            patch.setattr(ScoredGather, "choose", noting)
            session = TorchSession(design(recipe), OPTIONS)
            features = session.encode_images(pixels())
            Conversation(session).feed([*BEFORE, IMAGE, *behind], [features])
        return found

    return find


def attention_of(checkpoint: Path) -> list[Tensor]:
    """Return every layer's attention in ``transformers``, (H, T, T) each."""
    llava = LlavaForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="eager")
    ids = [*BEFORE, *[llava.config.image_token_index] * NUM_VISION_TOKENS, *BEHIND]
    with torch.inference_mode():
        result = llava(input_ids=torch.tensor([ids]), pixel_values=torch.from_numpy(pixels()), output_attentions=True)
    return [attention[0] for attention in result.attentions]


def pixels() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((1, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)


def top(share_T: Tensor, count: int) -> list[int]:
    first = len(BEFORE)
    span = share_T[first : first + NUM_VISION_TOKENS]
    return sorted(span.topk(count).indices.tolist())
