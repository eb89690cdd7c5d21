"""Ids say where they belong, slots never change, and rubbish names no place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import ids
from runtime.ids import CENTER_NAME, Place, RandomIds, place_of
from runtime.placement import SLOTS, slot_of
from tests.fakes import SEAL, SeededIds

slots = st.integers(0, SLOTS - 1)
centers = st.from_regex(CENTER_NAME, fullmatch=True)
uniques = st.from_regex(r"[0-9a-f]{32}", fullmatch=True)
secrets = st.from_regex(r"[A-Za-z0-9_-]{43}", fullmatch=True)
# Rubbish that looks like an id, for a character or more.
near_misses = st.builds(
    lambda whole, cut, more: whole[:cut] + more + whole[cut + 1 :],
    st.one_of(
        st.builds(ids.account_id, slots, uniques),
        st.builds(ids.application_id, centers, slots, uniques),
        st.builds(SEAL.token, centers, secrets),
        st.just("alice@example.com"),
        st.just("+8613912345678"),
    ),
    st.integers(0, 80),
    st.text(max_size=3),
)


@pytest.mark.parametrize(
    ("identifier", "slot"),
    [
        ("alice@example.com", 10),
        ("bob@example.com", 3487),
        ("bücher@bücher.example", 3660),
        ("+8613912345678", 3248),
        ("+4915112345678", 1342),
    ],
)
def test_an_identifier_keeps_its_slot_for_ever(identifier: str, slot: int) -> None:
    """A failure here means that a new version looks for users at the wrong home."""
    assert slot_of(identifier) == slot


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_identifier_has_a_slot(identifier: str) -> None:
    assert 0 <= slot_of(identifier) < SLOTS


@given(slots, uniques)
def test_an_account_id_carries_its_slot(slot: int, unique: str) -> None:
    made = ids.account_id(slot, unique)
    assert ids.account_slot(made) == slot
    assert place_of(made) == Place(slot=slot)


@given(centers, slots, uniques)
def test_an_application_id_carries_origin_and_slot(origin: str, slot: int, unique: str) -> None:
    made = ids.application_id(origin, slot, unique)
    assert place_of(made) == Place(slot=slot, origin=origin)
    assert ids.account_slot(made) is None


@given(centers, secrets)
def test_a_token_carries_its_origin_and_nothing_else(origin: str, secret: str) -> None:
    assert place_of(SEAL.token(origin, secret)) == Place(origin=origin)


def test_an_identifier_belongs_to_the_slot_of_its_normal_form() -> None:
    assert place_of(" Alice@Example.COM ") == Place(slot=slot_of("alice@example.com"))


@given(st.text() | near_misses)
def test_rubbish_names_no_place_or_a_valid_one(key: str) -> None:
    place = place_of(key)
    if place is not None:
        assert place.slot is not None or place.origin is not None
        assert place.slot is None or 0 <= place.slot < SLOTS
        assert place.origin is None or CENTER_NAME.fullmatch(place.origin)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "alice",
        "u3fa",
        "u3fa-" + "0" * 31,
        "u3fa-" + "0" * 33,
        "u3fa-" + "0" * 32 + "\n",
        "U3FA-" + "0" * 32,
        "uffff-" + "0" * 32,
        "q-a-3fa-" + "g" * 32,
        "q-A-3fa-" + "0" * 32,
        "q-" + "a" * 17 + "-3fa-" + "0" * 32,
        "s-a-" + "x" * 42,
        "s--" + "x" * 43,
        "s-1a-" + "x" * 43,
        "s-a-" + "x" * 43 + "\n",
    ],
)
def test_what_only_resembles_an_id_names_no_place(key: str) -> None:
    assert place_of(key) is None
    assert ids.account_slot(key) is None


@pytest.mark.parametrize(
    ("value", "good"),
    [
        ("x" * 8, True),
        ("x" * 64, True),
        ("0192f0c1-a_Z", True),
        ("x" * 7, False),
        ("x" * 65, False),
        ("", False),
        ("with space", False),
        ("with:colon", False),
        ("with\nnewline", False),
        ("trailing1\n", False),
        ("pünktlich", False),
    ],
)
def test_a_client_made_id_is_8_to_64_plain_characters(value: str, good: bool) -> None:
    assert ids.is_client_made(value) is good


@pytest.mark.parametrize("source", [RandomIds(), SeededIds()], ids=["random", "seeded"])
def test_new_ids_are_distinct_grow_and_have_the_right_form(source: ids.Ids) -> None:
    made = [source.unique() for _ in range(1000)]
    assert made == sorted(set(made))
    assert place_of(ids.account_id(1, made[0])) == Place(slot=1)
    tokens = {SEAL.token("a", source.secret()) for _ in range(1000)}
    assert len(tokens) == 1000
    assert {place_of(token) for token in tokens} == {Place(origin="a")}
