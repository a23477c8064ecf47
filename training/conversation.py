"""From the turns of a conversation to the tokens of a training example.

T tokens of the conversation
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokexport.errors import TrainingError
from tokexport.training.compressed import NO_LABEL


class ConversationEncoder:
    """Lays conversations out as the model will read them, and marks the answers as what to learn.

    Args:
        processor: of the checkpoint; its chat template must only ever append.
        num_image_tokens: that an image takes up.
    """

    def __init__(self, processor: Any, num_image_tokens: int) -> None:
        if not processor.chat_template:
            raise TrainingError("the checkpoint has no chat template, so conversations cannot be laid out; add one")
        self._processor, self._tokenizer = processor, processor.tokenizer
        self._image_token: str = processor.image_token
        self._image_token_id: int = self._tokenizer.convert_tokens_to_ids(self._image_token)
        self._num_image_tokens = num_image_tokens

    def encode(
        self, turns: Sequence[tuple[str, str]], *, has_image: bool, max_text_tokens: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return token ids, labels and the turn that each label belongs to, (T,) each.

        Args:
            turns: questions and answers.
            has_image: whether the first question brings an image.
            max_text_tokens: turns that would go beyond it are left out.

        Raises:
            TrainingError: not even the first turn fits, or the chat template rewrites what it said before.
        """
        text, answers = self._render(turns, has_image=has_image)
        is_bare = not text.startswith(self._tokenizer.bos_token or "\0")
        encoded = self._tokenizer(text, add_special_tokens=is_bare, return_offsets_mapping=True)
        ids: list[int] = encoded["input_ids"]
        turn_of = [_answer_at(start, end, answers) for start, end in encoded["offset_mapping"]]
        if max_text_tokens is not None:
            ids, turn_of = _whole_turns(ids, turn_of, max_text_tokens)
        spread_ids: list[int] = []
        spread_turns: list[int] = []
        for token, turn in zip(ids, turn_of, strict=True):
            count = self._num_image_tokens if token == self._image_token_id else 1
            spread_ids += [token] * count
            spread_turns += [turn] * count
        ids_T, turn_T = torch.tensor(spread_ids), torch.tensor(spread_turns)
        return ids_T, ids_T.masked_fill(turn_T < 0, NO_LABEL), turn_T

    def _render(self, turns: Sequence[tuple[str, str]], *, has_image: bool) -> tuple[str, list[tuple[int, int]]]:
        """Return the whole text and where each answer with its stop token lies in it."""
        messages: list[dict[str, Any]] = []
        spans: list[tuple[int, int]] = []
        text = ""
        for number, (question, answer) in enumerate(turns):
            image = [{"type": "image"}] if has_image and number == 0 else []
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
            asked = self._apply(messages, is_answer_next=True)
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            answered = self._apply(messages, is_answer_next=False)
            if not (asked.startswith(text) and answered.startswith(asked)):
                raise TrainingError(
                    "the chat template rewrites earlier turns, so answers cannot be found in what it writes; use one "
                    "that only appends"
                )
            spans.append((len(asked), len(answered.rstrip())))
            text = answered
        return text, spans

    def _apply(self, messages: Sequence[dict[str, Any]], *, is_answer_next: bool) -> str:
        return self._processor.apply_chat_template(list(messages), add_generation_prompt=is_answer_next, tokenize=False)


def _answer_at(start: int, end: int, answers: Sequence[tuple[int, int]]) -> int:
    """Return the number of the answer that a token lies in, -1 for none."""
    return next((i for i, (first, last) in enumerate(answers) if start >= first and end <= last and end > start), -1)


def _whole_turns(ids: list[int], turn_of: list[int], most: int) -> tuple[list[int], list[int]]:
    """Cut behind the last answer that ends within ``most`` tokens."""
    ends = [i + 1 for i in range(len(ids)) if turn_of[i] >= 0 and (i + 1 == len(ids) or turn_of[i + 1] != turn_of[i])]
    fitting = [end for end in ends if end <= most]
    if not fitting:
        raise TrainingError(
            f"the first turn takes {ends[0] if ends else len(ids)} text tokens, more than {most}; allow more of them"
        )
    return ids[: fitting[-1]], turn_of[: fitting[-1]]
