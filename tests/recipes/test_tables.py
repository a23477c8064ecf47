"""Tables become dataclasses, or an error that says what is wrong with which key."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from tokexport.errors import RecipeError
from tokexport.recipes.tables import parse_table, table_of


@dataclass(frozen=True, kw_only=True)
class Wheel:
    size: int


@dataclass(frozen=True, kw_only=True)
class Car:
    wheels: tuple[Wheel, ...] = ()
    share: int | float = 1
    speed: float = 1.0
    is_red: bool = False
    note: str | None = None
    gear: Literal["low", "high"] = "low"
    extras: Mapping[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({}, Car()),
        ({"wheels": [{"size": 3}, {"size": 4}]}, Car(wheels=(Wheel(size=3), Wheel(size=4)))),
        ({"note": "fast"}, Car(note="fast")),
        ({"gear": "high", "is_red": True}, Car(gear="high", is_red=True)),
        ({"extras": {"radio": {"on": 1}}}, Car(extras={"radio": {"on": 1}})),
    ],
    ids=["defaults", "nested", "optional", "choice", "free table"],
)
def test_a_table_becomes_its_dataclass(table: dict[str, object], expected: Car):
    assert parse_table(Car, table, "[car]") == expected


@pytest.mark.parametrize(("written", "kind"), [(1, int), (1.0, float)])
def test_a_count_and_a_fraction_stay_what_they_were_written_as(written: float, kind: type):
    assert type(parse_table(Car, {"share": written}, "[car]").share) is kind


def test_a_whole_number_serves_where_a_number_is_wanted():
    speed = parse_table(Car, {"speed": 3}, "[car]").speed
    assert type(speed) is float
    assert speed == 3.0


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"whels": []}, "[car] has no key 'whels'; did you mean 'wheels'?"),
        ({"zzz": 1}, "[car] has no key 'zzz'; choose one of: extras, gear, is_red, note, share, speed, wheels"),
        ({"wheels": [{"size": 1}, {}]}, "[car] wheels[1] needs the key 'size'"),
        ({"wheels": [{"size": 1}, {"size": "x"}]}, '[car] wheels[1] size must be a whole number, not "x"'),
        ({"wheels": {"size": 1}}, "[car] wheels must be a list, not {'size': 1}"),
        ({"wheels": [3]}, "[car] wheels[0] must be a table, not 3"),
        ({"share": True}, "[car] share must be a whole number or a number, not True"),
        ({"share": "half"}, '[car] share must be a whole number or a number, not "half"'),
        ({"speed": "fast"}, '[car] speed must be a number, not "fast"'),
        ({"speed": True}, "[car] speed must be a number, not True"),
        ({"is_red": 1}, "[car] is_red must be true or false, not 1"),
        ({"note": 5}, "[car] note must be a string, not 5"),
        ({"gear": "hihg"}, "[car] gear = \"hihg\" is not known; did you mean 'high'?"),
        ({"gear": ["low"]}, "[car] gear = ['low'] is not known"),
        ({"extras": [1]}, "[car] extras must be a table, not [1]"),
    ],
)
def test_a_wrong_table_is_refused_with_the_key_and_what_came(table: dict[str, object], text: str):
    with pytest.raises(RecipeError) as caught:
        parse_table(Car, table, "[car]")
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("value", [3, "x", [1], None])
def test_only_a_table_is_taken_for_a_table(value: object):
    with pytest.raises(RecipeError, match=r"\[car\] must be a table, not "):
        parse_table(Car, value, "[car]")


def test_a_dataclass_as_a_table_names_every_default_and_leaves_none_out():
    assert table_of(Car(wheels=(Wheel(size=3),))) == {
        "wheels": [{"size": 3}],
        "share": 1,
        "speed": 1.0,
        "is_red": False,
        "gear": "low",
        "extras": {},
    }


@pytest.mark.parametrize("car", [Car(), Car(wheels=(Wheel(size=3),), share=0.5, note="a", extras={"b": [1, 2]})])
def test_a_table_read_again_is_the_same_dataclass(car: Car):
    assert parse_table(Car, table_of(car), "[car]") == car
