"""However users spell an identifier, it is one and the same."""

import phonenumbers
import pytest
from hypothesis import given
from hypothesis import strategies as st
from phonenumbers import PhoneNumberFormat, PhoneNumberType

from runtime.identifiers import InvalidIdentifier, normalise


@pytest.mark.parametrize(
    ("spelling", "normal"),
    [
        ("alice@example.com", "alice@example.com"),
        ("  alice@example.com\n", "alice@example.com"),
        ("Alice@EXAMPLE.com", "alice@example.com"),
        ("a.b+tag@example.com", "a.b+tag@example.com"),
        ("BÜCHER@example.com", "bücher@example.com"),
        ("bu\u0308cher@example.com", "bücher@example.com"),
        ("x@BÜCHER.example", "x@bücher.example"),
        ("x@xn--bcher-kva.example", "x@bücher.example"),
        ("+8613912345678", "+8613912345678"),
        (" +86 139-1234-5678 ", "+8613912345678"),
        ("+86 (139) 1234.5678", "+8613912345678"),
        ("\uff0b86\uff11\uff13\uff1912345678", "+8613912345678"),
        ("+49 (0) 171 1234567", "+491711234567"),
    ],
)
def test_all_spellings_have_one_normal_form(spelling: str, normal: str) -> None:
    assert normalise(spelling) == normal
    assert normalise(normal) == normal


@pytest.mark.parametrize(
    "rubbish",
    [
        "",
        " ",
        "alice",
        "@",
        "alice@",
        "@example.com",
        "alice@localhost",
        "alice@@example.com",
        "alice bob@example.com",
        "Alice <alice@example.com>",
        "alice@[127.0.0.1]",
        "alice@exam\x00ple.com",
        "\x00alice@example.com",
        "al\nice@example.com",
        "\udcff@example.com",
        "alice@example..com",
        "alice@" + "a" * 250 + ".com",
        "13912345678",
        "+",
        "+86",
        "+1234",
        "+1 234 567 890",
        "+861391234567890",
        "+999123456789",
        "+86139123456789012345",
    ],
)
def test_what_is_neither_address_nor_number_is_refused(rubbish: str) -> None:
    with pytest.raises(InvalidIdentifier):
        normalise(rubbish)


@given(st.text() | st.emails())
def test_normalising_again_changes_nothing(text: str) -> None:
    try:
        normal = normalise(text)
    except InvalidIdentifier:
        return
    assert normalise(normal) == normal


@pytest.mark.parametrize("kind", [PhoneNumberType.MOBILE, PhoneNumberType.FIXED_LINE])
def test_numbers_of_all_countries_are_understood_as_people_write_them(kind: int) -> None:
    for region in phonenumbers.SUPPORTED_REGIONS:
        number = phonenumbers.example_number_for_type(region, kind)
        if number is None:
            continue
        normal = phonenumbers.format_number(number, PhoneNumberFormat.E164)
        written = phonenumbers.format_number(number, PhoneNumberFormat.INTERNATIONAL)
        assert normalise(written) == normalise(normal) == normal
