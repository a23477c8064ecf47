"""Candidates asked in PyTorch, without an artefact: many on few dialogues, the best of them on more.

What a candidate scored is kept in a file, so that a search that was stopped goes on, and more dialogues only add to it.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokexport.engines.accuracy import EvalOptions
from tokexport.engines.backend import Device, SessionOptions, load_backend
from tokexport.engines.evaluate import ask_dialogue, data_sha256
from tokexport.engines.evaluation_data import DialogueSet
from tokexport.engines.model import Speaker
from tokexport.engines.prompt import PromptProcessor
from tokexport.engines.search_space import Candidate
from tokexport.engines.torch_session import TorchSession
from tokexport.errors import TokexportError
from tokexport.exporter.checkpoint import open_weights
from tokexport.exporter.export import Design, design
from tokexport.exporter.weights import HeldWeights
from tokexport.recipes.schema import ModelTable

Progress = Callable[[str], None]
Tick = Callable[[int, int], None]
FILE = "screening.jsonl"
_NUM_HELD = 256


@dataclass(frozen=True, kw_only=True)
class Screened:
    """A candidate with what it scored.

    Attributes:
        candidate: that was asked.
        scores: of each question of each dialogue, from 0 to 1.
    """

    candidate: Candidate
    scores: tuple[tuple[float, ...], ...]

    @property
    def accuracy(self) -> float:
        flat = [score for dialogue in self.scores for score in dialogue]
        return sum(flat) / len(flat)


class Screening:
    """Asks candidates and remembers their scores.

    Args:
        base: the model, nothing compressed.
        folder: where they are kept.
        asked: the dialogues, of which the first ones are asked.
        options: how answers are made and scored; the engine only says whether there is a GPU.
        progress: told what is being done.
        tick: told how many candidates are done.
    """

    def __init__(
        self, base: Design, folder: Path, asked: DialogueSet, options: EvalOptions, progress: Progress, tick: Tick
    ) -> None:
        self.failures: dict[str, str] = {}
        self._processor = PromptProcessor(base.model.directory)
        self._room = min(asked.room(self._processor, options.max_new_tokens), base.model.spec.max_positions)
        self._path, self._asked, self._options = folder / FILE, asked, options
        self._progress, self._tick = progress, tick
        self._device: Device = load_backend(options.backend).device
        self._get = functools.lru_cache(_NUM_HELD)(asked.get)  # made ones take as long as an answer
        self._held: tuple[ModelTable, HeldWeights] | None = None
        self._stored = _read(self._path)
        rules = {"metric": options.metric, "max_new_tokens": options.max_new_tokens}
        self._data = {**asked.description, **rules, **({} if asked.is_made else {"sha256": data_sha256(asked)})}

    def ask(self, candidates: Sequence[Candidate], num_dialogues: int) -> list[Screened]:
        """Return what candidates score on the first dialogues; those that fail are left out and noted.

        Those of one model follow each other, as its weights are read once for all of them.
        """
        self._progress(f"asking {len(candidates)} candidates {num_dialogues} dialogues")
        found: dict[str, Screened] = {}
        ordered = sorted(candidates, key=lambda candidate: candidate.recipe.model.adapter or "")
        for done, candidate in enumerate(ordered, 1):
            try:
                scores = self._scores(candidate, num_dialogues)
            except TokexportError as error:
                self.failures[candidate.recipe.name] = str(error)
                self._progress(f"{candidate.recipe.name} failed: {error}")
            else:
                found[candidate.identity] = Screened(candidate=candidate, scores=tuple(scores))
            self._tick(done, len(ordered))
        return [found[candidate.identity] for candidate in candidates if candidate.identity in found]

    def _scores(self, candidate: Candidate, num_dialogues: int) -> list[tuple[float, ...]]:
        made = design(candidate.recipe)
        key = self._key(made)
        scores = self._stored.setdefault(key, [])
        if len(scores) < num_dialogues:
            speaker = self._speaker(made)
            added = [
                tuple(
                    answer.score
                    for answer in ask_dialogue(
                        speaker,
                        dialogue,
                        metric=self._options.metric,
                        max_new_tokens=self._options.max_new_tokens,
                    ).answers
                )
                for dialogue in map(self._get, range(len(scores), num_dialogues))
            ]
            self._keep({"key": key, "recipe": candidate.recipe.name, "first": len(scores), "scores": added})
            scores += added
        return scores[:num_dialogues]

    def _keep(self, line: Mapping[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            # What was killed may have left half a line; this one begins on its own.
            file.write(f"\n{json.dumps(line)}" if file.tell() else json.dumps(line))

    def _key(self, made: Design) -> str:
        """Return what is the same for candidates that answer the same."""
        recipe = made.recipe
        settings = [repr(recipe.compress), repr(recipe.export), repr(recipe.quantize), repr(self._data)]
        return hashlib.sha256("\n".join([made.fingerprint(), *settings]).encode()).hexdigest()[:32]

    def _speaker(self, made: Design) -> Speaker:
        options = SessionOptions(max_text_tokens=self._room, max_images=1, threads=self._options.threads)
        is_quantized = made.recipe.quantize.is_active
        weights = None if is_quantized else self._weights(made)
        session = TorchSession(made, options, is_quantized=is_quantized, device=self._device, weights=weights)
        return Speaker(self._processor, session)

    def _weights(self, made: Design) -> HeldWeights:
        if self._held is None or self._held[0] != made.recipe.model:
            self._held = None  # let go of the last model before the next is read
            dtype = getattr(torch, made.recipe.export.dtype)
            held = HeldWeights(open_weights(made.model), dtype, torch.device(self._device))
            self._held = (made.recipe.model, held)
        return self._held[1]


def survivors(screened: Sequence[Screened], count: int, price: Callable[[Candidate], float]) -> list[Screened]:
    """Return the candidates that are worth more dialogues.

    Half of the places go to the most accurate ones. The other half goes to the most accurate ones for what they cost:
    those than which no other is both cheaper and at least as accurate, then those of the rest, and so on.

    Args:
        screened: to choose from.
        count: how many at most.
        price: what a candidate costs.
    """
    # Few dialogues leave many equal. More tokens are the better guess then, and the cheaper have the other half.
    ranked = sorted(screened, key=lambda one: (-one.accuracy, -price(one.candidate)))
    chosen = ranked[: (count + 1) // 2]
    rest = sorted(ranked[(count + 1) // 2 :], key=lambda one: (-one.accuracy, price(one.candidate)))
    cheapest = min((price(one.candidate) for one in chosen), default=math.inf)
    while rest and len(chosen) < count:
        front: list[Screened] = []
        for one in rest:
            if price(one.candidate) < cheapest:
                front.append(one)
                cheapest = price(one.candidate)
        chosen += front[: count - len(chosen)]
        rest = [one for one in rest if one not in front]
        cheapest = math.inf
    return chosen


def best_of_each(screened: Sequence[Screened]) -> list[Screened]:
    """Return the most accurate candidate of each combination of methods."""
    best: dict[tuple[str, ...], Screened] = {}
    for one in screened:
        before = best.get(one.candidate.methods)
        if before is None or one.accuracy > before.accuracy:
            best[one.candidate.methods] = one
    return list(best.values())


def _read(path: Path) -> dict[str, list[tuple[float, ...]]]:
    """Return the scores in a file by their keys, as far as lines follow each other; one that was cut off ends it."""
    found: dict[str, list[tuple[float, ...]]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        try:
            entry: Mapping[str, Any] = json.loads(line)
        except ValueError:
            continue
        scores = found.setdefault(entry["key"], [])
        if entry["first"] == len(scores):
            scores += [tuple(dialogue) for dialogue in entry["scores"]]
    return found
