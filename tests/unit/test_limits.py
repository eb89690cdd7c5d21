"""One caller's flood is refused, with a time to come back; others do not notice."""

import pytest
from grpc import StatusCode

from gateway import limits
from gateway.limits import Bucket, Limiter, Limits, take
from runtime.errors import RpcError
from tests.fakes import FakeClock, account

ALICE, BOB = account(1), account(2)
LIMITS = Limits(user_calls_per_s=10, address_calls_per_s=50, streams_max=2)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def limiter(clock: FakeClock) -> Limiter:
    return Limiter(LIMITS, clock)


def flood(limiter: Limiter, user: str, calls: int) -> list[RpcError]:
    refused = []
    for _ in range(calls):
        try:
            limiter.count_user(user, f"token of {user}")
        except RpcError as error:
            refused.append(error)
    return refused


@pytest.mark.parametrize(
    ("bucket", "now_ms", "left", "early_ms"),
    [
        (None, 0, 19, 0),
        (Bucket(1, 0), 0, 0, 0),
        (Bucket(0.4, 0), 0, 0.4, 60),
        (Bucket(0, 0), 100, 0, 0),
        (Bucket(0, 0), 99, 0.99, 1),
        (Bucket(0, 0), 1_000_000, 19, 0),
    ],
)
def test_a_bucket_fills_with_time_and_no_further_than_it_holds(
    bucket: Bucket | None, now_ms: int, left: float, early_ms: int
) -> None:
    after, early = take(bucket, 10, now_ms)
    assert after.calls == pytest.approx(left)
    assert early == early_ms


def test_a_flood_is_refused_with_a_time_to_come_back(limiter: Limiter, clock: FakeClock) -> None:
    (first, *more) = flood(limiter, ALICE, 120)
    assert len(more) == 99  # a burst of 20 was taken
    assert (first.code, first.reason) == (StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    assert first.retry_after_ms == 100
    assert not first.ran
    assert ALICE not in str(first)
    clock.advance(100)
    assert len(flood(limiter, ALICE, 2)) == 1


def test_who_has_just_been_refused_is_refused_by_the_token_alone(
    limiter: Limiter, clock: FakeClock
) -> None:
    limiter.check("token of alice")
    (first, *_) = flood(limiter, "alice", 30)
    with pytest.raises(RpcError) as refused:
        limiter.check("token of alice")
    assert refused.value.to_status() == first.to_status()
    limiter.check("token of bob")
    clock.advance(first.retry_after_ms or 0)
    limiter.check("token of alice")


def test_others_do_not_notice(limiter: Limiter) -> None:
    flood(limiter, ALICE, 1000)
    assert flood(limiter, BOB, 20) == []


def test_an_address_has_a_limit_of_its_own(limiter: Limiter) -> None:
    for _ in range(100):
        limiter.count_address("192.0.2.1")
    with pytest.raises(RpcError, match="this address may make 50 a second"):
        limiter.count_address("192.0.2.1")
    limiter.count_address("192.0.2.2")
    for _ in range(1000):
        limiter.count_address("")


def test_a_user_has_only_so_many_streams_at_a_time(limiter: Limiter) -> None:
    with limiter.stream(ALICE):
        with limiter.stream(ALICE):
            with pytest.raises(RpcError, match="STREAMS_LIMITED"), limiter.stream(ALICE):
                pass
            with limiter.stream(BOB):
                pass
        with limiter.stream(ALICE):
            pass


def test_what_is_remembered_is_bounded(limiter: Limiter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CALLERS_MAX", 3)
    flood(limiter, ALICE, 30)
    for number in range(10):
        limiter.count_address(f"192.0.2.{number}")
    assert len(limiter._buckets) == 3
