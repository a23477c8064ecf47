"""Made pictures: what splits share, what stands where, and what the patches are said to show."""

from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise
from typing import get_args

import numpy as np
import pytest

from tokexport.dialogues.scene import (
    BACKGROUNDS,
    CATEGORIES,
    CELL,
    COLOURS,
    MAX_OBJECTS,
    MIN_OBJECTS,
    PATCH,
    SIDE,
    SIZES,
    TEXTURES,
    Background,
    Scene,
    SceneObject,
    make_scene,
    palette,
    patch_labels,
    render,
)
from tokexport.dialogues.schema import Split
from tokexport.dialogues.sprites import (
    DIGITS,
    FACES,
    LETTERS,
    PLAIN,
    SHAPES,
    STYLES,
    Style,
    digit_mask,
    digit_samples,
    letter_mask,
    shape_mask,
)

SPLITS: tuple[Split, ...] = get_args(Split)
EVEN = Background(
    colour="grey",
    texture="plain",
    texture_angle=0,
    texture_spacing=24,
    texture_phase=0,
    texture_level=0,
    gradient_angle=0,
    gradient_level=0,
    noise_level=0,
    noise_seed=0,
)


def scene_of(index: int, split: Split = "train") -> Scene:
    return make_scene(np.random.default_rng([3, index]), split)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene_of(index) for index in range(300)]


def square_at(left: int, top: int, colour: str = "red") -> SceneObject:
    """A square of 18 x 18 pixels."""
    return SceneObject(
        category="square", colour=colour, size="small", rgb=COLOURS[colour], pixels=20, left=left, top=top
    )


def overlap(first: SceneObject, second: SceneObject) -> bool:
    left, top, right, bottom = first.bounds
    other_left, other_top, other_right, other_bottom = second.bounds
    return left < other_right and other_left < right and top < other_bottom and other_top < bottom


def test_a_scene_is_always_painted_the_same():
    assert render(scene_of(1)).tobytes() == render(scene_of(1)).tobytes()


def test_other_numbers_make_other_pictures():
    assert render(scene_of(1)).tobytes() != render(scene_of(2)).tobytes()


def test_a_picture_is_336_pixels_wide_and_high():
    picture = render(scene_of(1))
    assert (picture.mode, picture.size) == ("RGB", (336, 336))


@pytest.mark.parametrize(("first", "second"), list(combinations(SPLITS, 2)))
def test_two_splits_share_no_font(first: Split, second: Split):
    assert set(FACES[first]).isdisjoint(FACES[second])


@pytest.mark.parametrize("value", DIGITS)
def test_every_digit_sample_is_in_one_split(value: str):
    samples = [set(digit_samples(split, value)) for split in SPLITS]
    assert len(set.union(*samples)) == sum(len(part) for part in samples)


def test_every_digit_sample_is_used():
    assert sum(len(digit_samples(split, value)) for split in SPLITS for value in DIGITS) == 1797


@pytest.mark.parametrize("split", SPLITS)
def test_letters_and_digits_come_from_the_split(split: Split):
    objects = [item for index in range(60) for item in scene_of(index, split).objects]
    assert {item.source for item in objects if item.kind == "letter"} == set(FACES[split])
    for item in objects:
        assert item.kind != "digit" or item.source in digit_samples(split, item.category)


def test_objects_do_not_overlap(scenes: list[Scene]):
    assert not any(overlap(*pair) for scene in scenes for pair in combinations(scene.objects, 2))


def test_overlapping_objects_are_found():
    assert overlap(square_at(10, 10), square_at(27, 27))
    assert not overlap(square_at(10, 10), square_at(28, 10))


def test_no_object_leaves_the_picture(scenes: list[Scene]):
    for scene in scenes:
        for item in scene.objects:
            left, top, right, bottom = item.bounds
            assert 0 <= left < right <= SIDE
            assert 0 <= top < bottom <= SIDE


def test_every_mask_fits_into_a_cell():
    shapes = [shape_mask(shape, 36, angle) for shape in SHAPES for angle in (-12, 0, 12)]
    faces = [face for split in SPLITS for face in FACES[split]]
    letters = [letter_mask(letter, 36, angle, face) for letter in LETTERS for face in faces for angle in (-4, 4)]
    letters += [letter_mask(letter, 36, 4, FACES["train"][0], style) for letter in LETTERS for style in STYLES]
    assert max(max(mask.shape) for mask in [*shapes, *letters]) <= CELL


def test_a_style_changes_how_a_character_looks_and_not_how_high_it_is():
    heavy = Style(weight=1)
    plain, bold = letter_mask("H", 32, 0, "DejaVuSans"), letter_mask("H", 32, 0, "DejaVuSans", heavy)
    assert bold.sum() / bold.size > 1.2 * plain.sum() / plain.size
    assert abs(bold.shape[0] - plain.shape[0]) <= 1
    narrow = letter_mask("H", 32, 0, "DejaVuSans", Style(stretch=0.8))
    assert narrow.shape[1] == pytest.approx(0.8 * plain.shape[1], abs=1.5)
    (sample, *_) = digit_samples("train", "7")
    assert digit_mask(sample, 32, heavy).sum() > 1.2 * digit_mask(sample, 32).sum()


def test_only_styled_scenes_have_styles():
    def styles(*, is_styled: bool) -> set[Style]:
        rng = np.random.default_rng(0)
        scene = make_scene(rng, "train", min_objects=36, max_objects=36, is_for_questions=False, is_styled=is_styled)
        return {item.style for item in scene.objects}

    assert styles(is_styled=False) == {PLAIN}
    assert len(styles(is_styled=True)) > 5


@pytest.mark.parametrize("face", [face for split in SPLITS for face in FACES[split]])
def test_no_two_letters_of_a_font_look_alike(face: str):
    masks = {letter: np.zeros((48, 48)) for letter in LETTERS}
    for letter, canvas in masks.items():
        mask = letter_mask(letter, 32, 0, face)
        canvas[: mask.shape[0], : mask.shape[1]] = mask / 255
    assert min(np.abs(masks[a] - masks[b]).sum() for a, b in combinations(LETTERS, 2)) > 40


def test_a_scene_has_four_to_ten_objects(scenes: list[Scene]):
    assert {len(scene.objects) for scene in scenes} == set(range(MIN_OBJECTS, MAX_OBJECTS + 1))


def test_a_third_of_the_scenes_at_most_has_free_places(scenes: list[Scene]):
    def is_in_cells(scene: Scene) -> bool:
        return all(
            left // CELL == (right - 1) // CELL and top // CELL == (bottom - 1) // CELL
            for left, top, right, bottom in (item.bounds for item in scene.objects)
        )

    assert 0.6 < sum(is_in_cells(scene) for scene in scenes) / len(scenes) < 0.8


def test_every_category_colour_size_and_background_occurs(scenes: list[Scene]):
    objects = [item for scene in scenes for item in scene.objects]
    assert {item.category for item in objects} == set(CATEGORIES)
    assert {item.colour for item in objects} == set(COLOURS)
    assert {item.size for item in objects} == set(SIZES)
    assert {scene.background.colour for scene in scenes} == set(BACKGROUNDS)
    assert {scene.background.texture for scene in scenes} == set(TEXTURES)


def test_half_of_the_objects_are_shapes(scenes: list[Scene]):
    kinds = Counter(item.kind for scene in scenes for item in scene.objects)
    assert kinds["shape"] / kinds.total() == pytest.approx(0.5, abs=0.06)
    assert kinds["letter"] / kinds.total() == pytest.approx(0.25, abs=0.04)


def test_objects_stand_out_from_their_background(scenes: list[Scene]):
    assert all(item.colour in palette(scene.background.colour) for scene in scenes for item in scene.objects)
    assert "black" not in palette("navy")
    assert "white" not in palette("pink")


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_background_leaves_five_colours(background: str):
    assert len(palette(background)) >= 5


def test_a_large_object_covers_more_than_a_small_one(scenes: list[Scene]):
    shapes = [item for scene in scenes for item in scene.objects if item.kind == "shape"]
    heights = {size: [item.mask.shape[0] for item in shapes if item.size == size] for size in SIZES}
    assert max(heights["small"]) < min(heights["large"])


def test_an_object_is_painted_where_its_bounds_are():
    pixels = np.asarray(render(Scene(background=EVEN, objects=(square_at(100, 200),))))
    is_red = (pixels == COLOURS["red"]).all(axis=2)
    rows, columns = np.flatnonzero(is_red.any(axis=1)), np.flatnonzero(is_red.any(axis=0))
    assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == (100, 200, 118, 218)


def test_noise_differs_from_pixel_to_pixel():
    noisy = Scene(background=replace(EVEN, noise_level=8), objects=())
    assert np.asarray(render(noisy), np.float64).std() == pytest.approx(8, abs=0.2)


@pytest.mark.parametrize("texture", ["stripes", "dots"])
def test_a_texture_changes_some_of_the_background(texture: str):
    textured = Scene(background=replace(EVEN, texture=texture, texture_level=20), objects=())
    is_changed = (np.asarray(render(textured)) != BACKGROUNDS["grey"]).any(axis=2)
    assert 0.03 < is_changed.mean() < 0.3


def test_a_gradient_is_brighter_on_one_side():
    shaded = Scene(background=replace(EVEN, gradient_level=20), objects=())
    columns = np.asarray(render(shaded))[0, ::48, 0].tolist()
    assert all(left < right for left, right in pairwise(columns))


def test_a_patch_is_labelled_with_what_covers_it():
    # Columns 14 to 32 and rows 28 to 46: patches 1 and 2 across, 2 and 3 down.
    labels = patch_labels(Scene(background=EVEN, objects=(square_at(14, 28, "blue"),)))
    expected = np.zeros((24, 24), np.int64)
    expected[2:4, 1] = expected[2:4, 2] = 1
    # The corner patch holds 4 x 4 pixels: 8 % of the patch and 5 % of the square.
    expected[3, 2] = 0
    assert (labels.category == 2 * expected).all()
    assert (labels.colour == 3 * expected).all()
    assert (labels.size == expected).all()


def test_a_patch_of_two_objects_has_the_label_of_the_one_that_covers_more():
    # In the patch below the first one red has 4 rows of 9 pixels, enough on its own, and blue has 10 rows of 14.
    red, blue = square_at(5, 0, "red"), square_at(0, 18, "blue")
    for objects in ((red,), (red, blue), (blue, red)):
        colours = patch_labels(Scene(background=EVEN, objects=objects)).colour
        assert colours[0, 0] == 1
        assert colours[1, 0] == (1 if objects == (red,) else 3)


def test_every_object_has_a_patch_of_its_own(scenes: list[Scene]):
    for scene in scenes:
        labels = patch_labels(scene)
        for item in scene.objects:
            left, top, right, bottom = item.bounds
            rows = slice(top // PATCH, -(-bottom // PATCH))
            columns = slice(left // PATCH, -(-right // PATCH))
            mine = labels.category[rows, columns] == CATEGORIES.index(item.category) + 1
            assert mine.any()
            assert (list(COLOURS).index(item.colour) + 1) in labels.colour[rows, columns][mine]
            assert (SIZES.index(item.size) + 1) in labels.size[rows, columns][mine]


def test_patches_far_from_every_object_are_background(scenes: list[Scene]):
    for scene in scenes[:50]:
        is_near = np.zeros((SIDE, SIDE), bool)
        for item in scene.objects:
            left, top, right, bottom = item.bounds
            is_near[top:bottom, left:right] = True
        is_near = is_near.reshape(24, PATCH, 24, PATCH).any(axis=(1, 3))
        labels = patch_labels(scene)
        for shown in (labels.category, labels.colour, labels.size):
            assert (shown[~is_near] == 0).all()


def test_labels_name_the_background(scenes: list[Scene]):
    for scene in scenes[:20]:
        labels = patch_labels(scene)
        assert list(BACKGROUNDS)[labels.background] == scene.background.colour
        assert TEXTURES[labels.texture] == scene.background.texture
