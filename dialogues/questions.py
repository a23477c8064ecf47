"""Questions about a scene, and their answers.

A kind has several templates. A template that the scene cannot answer without doubt is left out, and one with
answers yes and no is asked only of scenes that allow both: what is asked then says nothing about the answer.
"""

from collections.abc import Callable, Sequence
from itertools import combinations, product

import numpy as np

from tokexport.dialogues.scene import (
    BRIGHTNESS,
    DIGITS,
    LETTERS,
    SHAPES,
    SIDE,
    SIZES,
    Scene,
    SceneObject,
    palette,
    pick,
)
from tokexport.dialogues.schema import Turn

# A question and its answer; None where the scene offers none of the kind.
Asked = tuple[str, str] | None
Template = Callable[[np.random.Generator, Scene], Asked]

MIN_SEPARATION = 30
BORDER_MARGIN = 10
MAX_COUNT = 5

REGIONS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
_PREPOSITIONS = {"top": "at", "bottom": "at", "left": "on", "right": "on"}

# How often each count is the answer, before what the scene allows.
_COUNT_WEIGHTS = (0.14, 0.2, 0.22, 0.22, 0.22, 0.22)
_HARD_SHARE = 0.75

_COUNT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_OTHER_ANSWERS = {
    **{str(i): (word,) for i, word in enumerate(_COUNT_WORDS)},
    "centre": ("center", "middle"),
    "top left": ("upper left",),
    "top right": ("upper right",),
    "bottom left": ("lower left",),
    "bottom right": ("lower right",),
    "grey": ("gray",),
    "stripes": ("striped",),
    "dots": ("dotted",),
}


def plural(noun: str) -> str:
    """Return the plural of a shape or a kind."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def region_of(item: SceneObject) -> str | None:
    """Return the ninth of the image that holds an object's centre; None within 10 px of a border of the ninths."""
    column, row = (_third(position) for position in item.centre)
    return None if column is None or row is None else REGIONS[3 * row + column]


def _third(position: float) -> int | None:
    borders = (SIDE / 3, 2 * SIDE / 3)
    if any(abs(position - border) < BORDER_MARGIN for border in borders):
        return None
    return sum(position > border for border in borders)


def plain_name(scene: Scene, item: SceneObject) -> str | None:
    """Return the name that tells no colour, like ``the star`` or ``the letter K``; None where it is not unique."""
    if scene.num_of[(item.category,)] > 1:
        return None
    return f"the {item.category}" if item.kind == "shape" else f"the {item.kind} {item.category}"


def names(scene: Scene, item: SceneObject) -> list[str]:
    """Return every name that is the object's alone."""
    noun = item.category if item.kind == "shape" else item.kind
    coloured = [f"the {item.colour} {noun}"] if scene.num_of[(item.colour, noun)] == 1 else []
    plain = plain_name(scene, item)
    return coloured if plain is None else [*coloured, plain]


def _name(rng: np.random.Generator, scene: Scene, item: SceneObject) -> str:
    return pick(rng, names(scene, item))


def _named(scene: Scene) -> list[SceneObject]:
    return [item for item in scene.objects if names(scene, item)]


def _plainly_named(scene: Scene) -> list[tuple[SceneObject, str]]:
    return [(item, name) for item in scene.objects if (name := plain_name(scene, item)) is not None]


def _flip(rng: np.random.Generator) -> bool:
    return rng.random() < 0.5


def _yes(*, is_true: bool) -> str:
    return "yes" if is_true else "no"


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _colour_of(rng: np.random.Generator, scene: Scene) -> Asked:
    found = _plainly_named(scene)
    if not found:
        return None
    item, name = pick(rng, found)
    return pick(rng, ("What colour is {}?", "Which colour does {} have?")).format(name), item.colour


def _shape_of(rng: np.random.Generator, scene: Scene) -> Asked:
    shapes = [item for item in scene.objects if item.kind == "shape"]
    alone = [item for item in shapes if scene.num_of[(item.colour,)] == 1]
    if alone and _flip(rng):
        item = pick(rng, alone)
        return f"What shape is the {item.colour} object?", item.category
    alone = [item for item in shapes if scene.num_of[item.colour, "shape"] == 1]
    if not alone:
        return None
    item = pick(rng, alone)
    return pick(rng, ("Which shape is {}?", "What is the {} shape?")).format(item.colour), item.category


def _size_of(rng: np.random.Generator, scene: Scene) -> Asked:
    named = _named(scene)
    sizes = {item.size for item in named}
    if len(sizes) < 2:
        return None
    size = pick(rng, SIZES)
    name = _name(rng, scene, pick(rng, [item for item in named if item.size == size]))
    return pick(rng, ("Is {} small or large?", "Is {} large or small?")).format(name), size


def _coloured_character(rng: np.random.Generator, scene: Scene) -> Asked:
    alone = [item for item in scene.objects if item.kind != "shape" and scene.num_of[item.colour, item.kind] == 1]
    if not alone:
        return None
    item = pick(rng, alone)
    phrase = pick(rng, ("Which {1} is {0}?", "What is the {0} {1}?", "Read the {0} {1}."))
    return phrase.format(item.colour, item.kind), item.category


def _character_in(rng: np.random.Generator, scene: Scene) -> Asked:
    characters = [item for item in scene.objects if item.kind != "shape"]
    sure: list[tuple[SceneObject, str]] = []
    for item in characters:
        region = region_of(item)
        rivals = [other for other in characters if other.kind == item.kind and other is not item]
        # One that stands on a border may be seen in either.
        if region is not None and all(region_of(other) not in (region, None) for other in rivals):
            sure.append((item, region))
    if not sure:
        return None
    item, region = pick(rng, sure)
    phrase = pick(rng, ("Which {} is {}?", "What {} is {}?"))
    return phrase.format(item.kind, f"{_PREPOSITIONS.get(region, 'in')} the {region}"), item.category


def _character_of_size(rng: np.random.Generator, scene: Scene) -> Asked:
    alone = [item for item in scene.objects if item.kind != "shape" and scene.num_of[item.size, item.kind] == 1]
    if not alone:
        return None
    item = pick(rng, alone)
    return pick(rng, ("Which {1} is {0}?", "What is the {0} {1}?")).format(item.size, item.kind), item.category


def _count(rng: np.random.Generator, scene: Scene) -> Asked:
    counted = {plural(shape): scene.num_of[(shape,)] for shape in SHAPES}
    counted |= {f"{word} objects": scene.num_of[(word,)] for word in (*palette(scene.background.colour), *SIZES)}
    counted |= {plural(kind): scene.num_of[(kind,)] for kind in ("shape", "letter", "digit")}
    by_count = {
        count: nouns
        for count in range(MAX_COUNT + 1)
        if (nouns := [noun for noun, found in counted.items() if found == count])
    }
    weights = np.array([_COUNT_WEIGHTS[count] for count in by_count])
    # The first count whose share of the weights is passed.
    place = int((weights.cumsum() < rng.random() * weights.sum()).sum())
    count = list(by_count)[place]
    return pick(rng, ("How many {} are there?", "How many {} can you see?")).format(pick(rng, by_count[count])), str(
        count
    )


def _exists(rng: np.random.Generator, present: Sequence[str], absent: Sequence[str]) -> Asked:
    if not present or not absent:
        return None
    is_true = _flip(rng)
    words = _with_article(pick(rng, present if is_true else absent))
    phrase = pick(rng, ("Is there {}?", "Can you see {}?", "Does the picture show {}?"))
    return phrase.format(words), _yes(is_true=is_true)


def _coloured_shape_exists(rng: np.random.Generator, scene: Scene) -> Asked:
    shapes = [item for item in scene.objects if item.kind == "shape"]
    present = sorted({(item.colour, item.category) for item in shapes})
    # Hard ones: the colour is there and the shape is there, only not together.
    hard = product(sorted({item.colour for item in scene.objects}), sorted({item.category for item in shapes}))
    absent = [pair for pair in hard if pair not in present]
    if not absent or rng.random() >= _HARD_SHARE:
        absent = [pair for pair in product(palette(scene.background.colour), SHAPES) if pair not in present]
    return _exists(rng, [" ".join(pair) for pair in present], [" ".join(pair) for pair in absent])


def _character_exists(rng: np.random.Generator, scene: Scene) -> Asked:
    kinds = sorted({item.kind for item in scene.objects if item.kind != "shape"})
    if not kinds:
        return None
    kind = pick(rng, kinds)
    known = LETTERS if kind == "letter" else DIGITS
    present = [f"{kind} {name}" for name in known if scene.num_of[(name,)]]
    return _exists(rng, present, [f"{kind} {name}" for name in known if not scene.num_of[(name,)]])


def _coloured_character_exists(rng: np.random.Generator, scene: Scene) -> Asked:
    kinds = sorted({item.kind for item in scene.objects if item.kind != "shape"})
    if not kinds:
        return None
    kind = pick(rng, kinds)
    colours = palette(scene.background.colour)
    present = [f"{colour} {kind}" for colour in colours if scene.num_of[colour, kind]]
    absent = [colour for colour in colours if not scene.num_of[colour, kind]]
    hard = [colour for colour in absent if scene.num_of[(colour,)]]
    if hard and rng.random() < _HARD_SHARE:
        absent = hard
    return _exists(rng, present, [f"{colour} {kind}" for colour in absent])


def _far_apart(rng: np.random.Generator, scene: Scene) -> tuple[int, SceneObject, SceneObject] | None:
    """Return an axis, 0 for x, and two objects with names, the first clearly before the second along it."""
    named = _named(scene)
    axis = int(rng.integers(2))
    for along in (axis, 1 - axis):
        pairs = [
            (first, second)
            for first, second in product(named, named)
            if second.centre[along] - first.centre[along] >= MIN_SEPARATION
        ]
        if pairs:
            return along, *pick(rng, pairs)
    return None


def _is_before(rng: np.random.Generator, scene: Scene) -> Asked:
    found = _far_apart(rng, scene)
    if found is None:
        return None
    axis, first, second = found
    is_true, is_swapped = _flip(rng), _flip(rng)
    before, after = (("left of", "right of"), ("above", "below"))[axis]
    word = before if is_true != is_swapped else after
    if is_swapped:
        first, second = second, first
    phrase = pick(rng, ("Is {} {} {}?", "Does {} stand {} {}?")).format(
        _name(rng, scene, first), word, _name(rng, scene, second)
    )
    return phrase, _yes(is_true=is_true)


def _which_side(rng: np.random.Generator, scene: Scene) -> Asked:
    found = _far_apart(rng, scene)
    if found is None:
        return None
    axis, first, second = found
    before, after = (("left", "right"), ("above", "below"))[axis]
    answer = before
    if _flip(rng):
        first, second, answer = second, first, after
    words = [before, after] if _flip(rng) else [after, before]
    sides = " or ".join(words) + (" of" if axis == 0 else "")
    return f"Is {_name(rng, scene, first)} {sides} {_name(rng, scene, second)}?", answer


def _where(rng: np.random.Generator, scene: Scene) -> Asked:
    placed = [(item, region) for item in _named(scene) if (region := region_of(item)) is not None]
    if not placed:
        return None
    # By region first, because the corners hold more objects than the middle.
    region = pick(rng, sorted({region for _, region in placed}))
    item = pick(rng, [item for item, found in placed if found == region])
    phrase = pick(rng, ("Where is {}?", "In which part is {}?", "Where in the picture is {}?"))
    return phrase.format(_name(rng, scene, item)), region


def _larger(rng: np.random.Generator, scene: Scene) -> Asked:
    shapes = [(item, name) for item, name in _plainly_named(scene) if item.kind == "shape"]
    pairs = [(first, second) for first, second in product(shapes, shapes) if first[0].size < second[0].size]
    if not pairs:
        return None
    # "large" sorts before "small".
    (large, _), (small, _) = pair = pick(rng, pairs)
    words = [name for _, name in pair]
    if _flip(rng):
        words.reverse()
    question, answer = pick(rng, (("larger", large), ("smaller", small)))
    return f"Which is {question}, {words[0]} or {words[1]}?", answer.category


def _more_of(rng: np.random.Generator, counts: dict[str, int], phrases: Sequence[str]) -> Asked:
    """Compare two counts, a third of the time equal ones; None unless the scene allows both."""
    pairs = list(combinations(sorted(counts), 2))
    equal = [pair for pair in pairs if counts[pair[0]] == counts[pair[1]]]
    unequal = [pair for pair in pairs if counts[pair[0]] != counts[pair[1]]]
    if not equal or not unequal:
        return None
    first, second = pick(rng, equal if rng.random() < 1 / 3 else unequal)
    if _flip(rng):
        first, second = second, first
    more = "same" if counts[first] == counts[second] else max(first, second, key=lambda name: counts[name])
    return pick(rng, phrases).format(first, second), more


def _more_shapes(rng: np.random.Generator, scene: Scene) -> Asked:
    counts = {plural(shape): count for shape in SHAPES if (count := scene.num_of[(shape,)])}
    return _more_of(rng, counts, ("Are there more {} or {}?", "Which are there more of, {} or {}?"))


def _more_coloured(rng: np.random.Generator, scene: Scene) -> Asked:
    colours = palette(scene.background.colour)
    counts = {colour: count for colour in colours if (count := scene.num_of[(colour,)])}
    return _more_of(rng, counts, ("Are there more {} or {} objects?",))


def _same_colour(rng: np.random.Generator, scene: Scene) -> Asked:
    pairs = list(combinations(_plainly_named(scene), 2))
    same = [pair for pair in pairs if pair[0][0].colour == pair[1][0].colour]
    other = [pair for pair in pairs if pair[0][0].colour != pair[1][0].colour]
    if not same or not other:
        return None
    is_true = _flip(rng)
    words = [name for _, name in pick(rng, same if is_true else other)]
    if _flip(rng):
        words.reverse()
    phrase = pick(rng, ("Do {} and {} have the same colour?", "Are {} and {} the same colour?"))
    return phrase.format(*words), _yes(is_true=is_true)


def _background_colour(rng: np.random.Generator, scene: Scene) -> Asked:
    return pick(
        rng, ("What colour is the background?", "Which colour does the background have?")
    ), scene.background.colour


def _background_texture(rng: np.random.Generator, scene: Scene) -> Asked:
    phrases = ("What pattern does the background have?", "Is the background plain, stripes or dots?")
    return pick(rng, phrases), scene.background.texture


def _letters_or_digits(rng: np.random.Generator, scene: Scene) -> Asked:
    first, second = ("letters", "digits") if _flip(rng) else ("digits", "letters")
    counts = {"letters": scene.num_of[("letter",)], "digits": scene.num_of[("digit",)]}
    more = "same" if counts[first] == counts[second] else max(counts, key=lambda name: counts[name])
    return f"Are there more {first} or {second}?", more


def _brightness(rng: np.random.Generator, scene: Scene) -> Asked:
    answer = BRIGHTNESS.get(scene.background.colour)
    if answer is None:
        return None
    return pick(rng, ("Is the background dark or bright?", "Is the picture bright or dark?")), answer


_TEMPLATES: dict[str, tuple[Template, ...]] = {
    "attribute": (_colour_of, _shape_of, _size_of),
    "reading": (_coloured_character, _character_in, _character_of_size),
    "counting": (_count,),
    "existence": (_coloured_shape_exists, _character_exists, _coloured_character_exists),
    "relation": (_is_before, _which_side),
    "location": (_where,),
    "comparison": (_larger, _more_shapes, _more_coloured, _same_colour),
    "whole_image": (_background_colour, _background_texture, _letters_or_digits, _brightness),
}

KINDS = tuple(_TEMPLATES)


def ask(rng: np.random.Generator, scene: Scene, kind: str) -> Turn | None:
    """Ask a question of one of ``KINDS``; None where the scene offers none of that kind.

    ``comparison.same_colour`` asks of that kind with one template only, the function's name without underscore.
    """
    kind, _, part = kind.partition(".")
    templates = [template for template in _TEMPLATES[kind] if not part or template.__name__ == f"_{part}"]
    assert templates, f"kind {kind} has no template {part}"
    for place in rng.permutation(len(templates)):
        asked = templates[place](rng, scene)
        if asked is not None:
            question, answer = asked
            return Turn(question=question, answers=(answer, *_OTHER_ANSWERS.get(answer, ())), kind=kind)
    return None
