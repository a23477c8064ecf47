"""Questions: every answer is worked out again from the words and the objects."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import pytest

from tokexport.dialogues.generate import make_example
from tokexport.dialogues.questions import KINDS, REGIONS, ask
from tokexport.dialogues.scene import COLOURS, Scene, SceneObject, make_scene
from tokexport.dialogues.schema import Turn
from tokexport.dialogues.sprites import SHAPES

Asked = tuple[Scene, Turn]
KIND_NOUNS = ("shape", "letter", "digit")


def all_that_are(scene: Scene, words: str) -> list[SceneObject]:
    """Find what words like ``red star``, ``letter K``, ``small objects`` or ``crosses`` stand for."""
    found = list(scene.objects)
    for word in words.split():
        noun = word.removesuffix("es") if word == "crosses" else word if word == "cross" else word.removesuffix("s")
        if word in COLOURS:
            found = [item for item in found if item.colour == word]
        elif word in ("small", "large"):
            found = [item for item in found if item.size == word]
        elif noun in KIND_NOUNS:
            found = [item for item in found if item.kind == noun]
        elif noun != "object":
            assert noun in SHAPES or len(noun) == 1, word
            found = [item for item in found if item.category == noun]
    return found


def the_one(scene: Scene, words: str) -> SceneObject:
    (found,) = all_that_are(scene, words)
    return found


def more_of(scene: Scene, first: str, second: str) -> str:
    difference = len(all_that_are(scene, first)) - len(all_that_are(scene, second))
    return "same" if difference == 0 else first if difference > 0 else second


def is_so(*, is_true: bool) -> str:
    return "yes" if is_true else "no"


def stands(scene: Scene, first: str, word: str, second: str) -> str:
    (x, y), (other_x, other_y) = the_one(scene, first).centre, the_one(scene, second).centre
    gap = {"left": other_x - x, "right": x - other_x, "above": other_y - y, "below": y - other_y}[word]
    assert abs(gap) >= 30
    return is_so(is_true=gap > 0)


def side_of(scene: Scene, first: str, words: tuple[str, str], second: str) -> str:
    (answer,) = [word for word in words if stands(scene, first, word, second) == "yes"]
    return answer


def ninth(item: SceneObject) -> str:
    x, y = item.centre
    return REGIONS[3 * int(y // 112) + int(x // 112)]


def region(item: SceneObject) -> str:
    assert all(abs(position - border) >= 10 for position in item.centre for border in (112, 224))
    return ninth(item)


def read_in(scene: Scene, kind: str, place: str) -> str:
    (found,) = [item for item in all_that_are(scene, kind) if ninth(item) == place]
    assert region(found) == place
    return found.category


def larger(scene: Scene, word: str, first: str, second: str) -> str:
    wanted = "large" if word == "larger" else "small"
    (answer,) = [words for words in (first, second) if the_one(scene, words).size == wanted]
    return answer


def brightness(scene: Scene) -> str:
    return {"sand": "bright", "pink": "bright", "navy": "dark", "brown": "dark", "teal": "dark"}[
        scene.background.colour
    ]


# What a question says, and how its answer is found; the first that fits counts.
SOLVERS: list[tuple[str, Callable[..., str]]] = [
    ("(?:What|Which) colour (?:is|does) the background(?: have)?", lambda scene: scene.background.colour),
    (
        "What pattern does the background have|Is the background plain, stripes or dots",
        lambda scene: scene.background.texture,
    ),
    ("Is the (?:background|picture) (?:dark or bright|bright or dark)", brightness),
    ("(?:What|Which) colour (?:is|does) the (.+?)(?: have)?", lambda scene, words: the_one(scene, words).colour),
    ("What shape is the (.+)", lambda scene, words: the_one(scene, words).category),
    ("Is the (.+) (?:small or large|large or small)", lambda scene, words: the_one(scene, words).size),
    ("(?:Which|What) (letter|digit) is (?:in|at|on) the (.+)", read_in),
    ("Which (.+) is (.+)", lambda scene, noun, word: the_one(scene, f"{word} {noun}").category),
    ("(?:What is|Read) the (.+)", lambda scene, words: the_one(scene, words).category),
    ("How many (.+?) (?:are there|can you see)", lambda scene, words: str(len(all_that_are(scene, words)))),
    (
        "(?:Is there|Can you see|Does the picture show) an? (.+)",
        lambda scene, words: is_so(is_true=bool(all_that_are(scene, words))),
    ),
    (
        "Is the (.+) (left|right|above|below) or (left|right|above|below)(?: of)? the (.+)",
        lambda scene, first, word, other, second: side_of(scene, first, (word, other), second),
    ),
    ("(?:Is|Does) the (.+?)(?: stand)? (left|right|above|below)(?: of)? the (.+)", stands),
    ("(?:Where|In which part|Where in the picture) is the (.+)", lambda scene, words: region(the_one(scene, words))),
    ("Which is (larger|smaller), the (.+) or the (.+)", larger),
    ("Are there more (.+) or (.+) objects", more_of),
    ("(?:Are there more|Which are there more of,) (.+) or (.+)", more_of),
    (
        "(?:Do|Are) the (.+) and the (.+?) (?:have )?the same colour",
        lambda scene, first, second: is_so(is_true=the_one(scene, first).colour == the_one(scene, second).colour),
    ),
]


def solve(scene: Scene, question: str) -> str:
    for pattern, solver in SOLVERS:
        found = re.fullmatch(pattern, question.rstrip("?."))
        if found is not None:
            return solver(scene, *found.groups())
    raise AssertionError(f"not understood: {question}")


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    """Every kind asked twice of 1,500 scenes."""
    pairs: list[Asked] = []
    for index in range(1500):
        rng = np.random.default_rng([11, index])
        scene = make_scene(rng, "test")
        turns = [ask(rng, scene, kind) for kind in (*KINDS, *KINDS)]
        pairs += [(scene, turn) for turn in turns if turn is not None]
    return pairs


def answers_of(asked: list[Asked], start: str) -> Counter[str]:
    """Count the answers to the questions that begin with a pattern."""
    return Counter(turn.answers[0] for _, turn in asked if re.match(start, turn.question))


def test_every_answer_is_what_the_objects_say(asked: list[Asked]):
    wrong = [(turn.question, turn.answers) for scene, turn in asked if solve(scene, turn.question) != turn.answers[0]]
    assert wrong == []


def test_a_wrong_answer_is_found(asked: list[Asked]):
    scene, turn = next((scene, turn) for scene, turn in asked if turn.kind == "existence")
    assert solve(scene, turn.question) != {"yes": "no", "no": "yes"}[turn.answers[0]]


def test_every_template_is_asked(asked: list[Asked]):
    used: set[str] = set()
    for _, turn in asked:
        used.add(next(pattern for pattern, _ in SOLVERS if re.fullmatch(pattern, turn.question.rstrip("?."))))
    assert used == {pattern for pattern, _ in SOLVERS}


@pytest.mark.parametrize("kind", KINDS)
def test_nearly_every_scene_offers_a_kind(asked: list[Asked], kind: str):
    assert sum(turn.kind == kind for _, turn in asked) > 0.97 * 2 * 1500


@pytest.mark.parametrize(
    "start",
    [
        "Is there|Can you see|Does the picture show",
        r"Is there .* (letter|digit) .",
        "Is there .* (red|blue|white) (letter|digit)",
        "Is .* (left of|right of|above|below) the|Does .* stand",
        "Do .* the same colour|Are the .* the same colour",
    ],
)
def test_yes_and_no_are_equally_frequent(asked: list[Asked], start: str):
    answers = answers_of(asked, start)
    yes, no = answers["yes"], answers["no"]
    # Three standard errors beside the five points, for the questions that are rare.
    assert yes / (yes + no) == pytest.approx(0.5, abs=0.05 + 1.5 / (yes + no) ** 0.5)


def test_existence_is_as_often_true_as_false(asked: list[Asked]):
    answers = Counter(turn.answers[0] for _, turn in asked if turn.kind == "existence")
    assert set(answers) == {"yes", "no"}
    assert 0.45 < answers["yes"] / answers.total() < 0.55


@pytest.mark.parametrize(
    ("start", "share"),
    [
        ("How many", 0.3),
        ("Where|In which part", 0.2),
        ("Are there more .* objects", 0.4),
        ("Are there more .*s or .*s|Which are there more of", 0.45),
        ("Is .* (left or right|right or left)", 0.55),
        ("Is .* (above or below|below or above)", 0.55),
        ("Which is (larger|smaller)", 0.2),
        ("Is .* (small or large|large or small)", 0.55),
        (r"(What|Which) colour", 0.2),
        ("(Which|What) (letter|digit)|Read", 0.12),
        ("What shape|Which shape", 0.2),
    ],
)
def test_no_answer_is_much_more_frequent_than_others(asked: list[Asked], start: str, share: float):
    answers = answers_of(asked, start)
    assert answers.most_common(1)[0][1] / answers.total() < share


def test_counts_reach_from_0_to_5(asked: list[Asked]):
    assert set(answers_of(asked, "How many")) == set("012345")


def test_half_of_the_coloured_shapes_that_are_missing_are_hard(asked: list[Asked]):
    is_hard: list[bool] = []
    for scene, turn in asked:
        found = re.search(r"an? (\w+) (\w+)\?", turn.question)
        if turn.answers[0] == "no" and found is not None and found[2] in SHAPES:
            is_hard.append(all(all_that_are(scene, word) for word in found.groups()))
    assert sum(is_hard) / len(is_hard) > 0.5


def test_an_article_fits_the_next_word(asked: list[Asked]):
    for _, turn in asked:
        for article, letter in re.findall(r"\b(an?) (\w)", turn.question):
            assert (article == "an") == (letter in "aeiou")


def test_questions_are_short(asked: list[Asked]):
    assert max(len(turn.question.split()) for _, turn in asked) <= 12


def test_answers_are_one_word_or_a_place(asked: list[Asked]):
    answers = {turn.answers[0] for _, turn in asked}
    assert {answer for answer in answers if " " in answer} <= set(REGIONS)


def test_no_answer_is_accepted_for_two_references(asked: list[Asked]):
    accepted = {answer: turn.answers for _, turn in asked for answer in turn.answers[:1]}
    others: defaultdict[str, int] = defaultdict(int)
    for answers in accepted.values():
        for answer in answers:
            others[answer] += 1
    assert set(others.values()) == {1}


def test_a_scene_without_letters_and_digits_has_nothing_to_read():
    scene, _, _ = make_example(0, "train", 0, 1)
    bare = Scene(background=scene.background, objects=tuple(item for item in scene.objects if item.kind == "shape"))
    assert ask(np.random.default_rng(0), bare, "reading") is None
