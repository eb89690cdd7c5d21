"""A token of this mesh is told from a made-up one by any center, without asking."""

from random import Random

import pytest

from runtime.ids import Place, RandomIds, place_of
from runtime.token_seal import TokenSeal

OLD, NEW = b"the key until yesterday", b"the key from today on"
SEED, FORGERIES = 7, 100_000


def test_a_token_is_known_everywhere_and_says_who_made_it() -> None:
    token = TokenSeal([OLD]).token("b", RandomIds().secret())
    assert TokenSeal([OLD]).holds(token)
    assert place_of(token) == Place(origin="b")


def test_no_forgery_passes() -> None:
    """Bits turned, ends cut or added, the seals of other tokens, and pure invention."""
    random, seal = Random(SEED), TokenSeal([OLD])  # noqa: S311 - forgeries may be guessed
    real = [seal.token("b", f"{number:043}") for number in range(100)]
    for _ in range(FORGERIES // 4):
        token, other = random.sample(real, 2)
        at, bit = random.randrange(len(token)), 1 << random.randrange(7)
        forged = (
            token[:at] + chr(ord(token[at]) ^ bit) + token[at + 1 :],
            token[: random.randrange(len(token))] + random.choice(["", "x", ".", "\0", "é"]),
            token.rpartition(".")[0] + "." + other.rpartition(".")[2],
            f"s-b-{random.getrandbits(256):043x}.{random.getrandbits(88):022x}",
        )
        for one in forged:
            assert not seal.holds(one), f"seed {SEED}"


def test_a_key_is_exchanged_without_ending_a_session() -> None:
    before, both, after = TokenSeal([OLD]), TokenSeal([NEW, OLD]), TokenSeal([NEW])
    secret = RandomIds().secret()
    assert both.holds(before.token("a", secret))
    assert after.holds(both.token("a", secret))
    assert not after.holds(before.token("a", secret))


@pytest.mark.parametrize("keys", [[], [b"short"], [OLD, b""]])
def test_keys_that_could_be_guessed_are_refused(keys: list[bytes]) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        TokenSeal(keys)
