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
        self._special = {number for number, token in self._tokenizer.added_tokens_decoder.items() if token.special}

    def encode(
        self, turns: Sequence[tuple[str, str]], *, has_image: bool, max_text_tokens: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return token ids, labels and the turn that each label belongs to, (T,) each.

        Where the template writes nothing that ends an answer, the label behind it is the tokenizer's last token all
        the same, as the model has to say it.

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
        labels = [token if turn >= 0 else NO_LABEL for token, turn in zip(ids, turn_of, strict=True)]
        self._label_stops(ids, labels, turn_of)
        length = len(ids) if max_text_tokens is None else _length_of_whole_turns(turn_of, max_text_tokens)
        counts = torch.tensor(
            [self._num_image_tokens if token == self._image_token_id else 1 for token in ids[:length]]
        )
        ids_T, labels_T, turn_T = (torch.tensor(part[:length]) for part in (ids, labels, turn_of))
        return ids_T.repeat_interleave(counts), labels_T.repeat_interleave(counts), turn_T.repeat_interleave(counts)

    def _label_stops(self, ids: list[int], labels: list[int], turn_of: list[int]) -> None:
        """Make what follows an answer the label of a stop, where the answer does not end with one."""
        stop = self._tokenizer.eos_token_id
        for end in _ends(turn_of):
            if ids[end - 1] in self._special:
                continue
            if end == len(ids):
                ids.append(stop)
                labels.append(stop)
                turn_of.append(turn_of[-1])
            labels[end], turn_of[end] = stop, turn_of[end - 1]

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


def _ends(turn_of: Sequence[int]) -> list[int]:
    """Return the places behind the answers."""
    lasts = zip(turn_of, [*turn_of[1:], -1], strict=True)
    return [place for place, (turn, following) in enumerate(lasts, start=1) if turn >= 0 and following != turn]


def _length_of_whole_turns(turn_of: Sequence[int], most: int) -> int:
    """Return where the last answer ends that ends within ``most`` tokens."""
    ends = _ends(turn_of)
    fitting = [end for end in ends if end <= most]
    if not fitting:
        raise TrainingError(f"the first turn takes {ends[0]} text tokens, more than {most}; allow more of them")
    return fitting[-1]
