"""How an account hears of its applications: checked when set, the same everywhere, its secret unseen."""

from dataclasses import dataclass
from typing import Any

import pytest

from account_svc import notification
from account_svc import store as accounts
from account_svc.notification import Setting
from account_svc.registry import AccountRow
from account_svc.revoker import Revoker
from account_svc.service import AccountService
from account_svc.store import CHANGES
from duohuo.internal.v1.peer_services_pb2 import LookupContactRequest, LookupContactResponse
from duohuo.v1.account_service_pb2 import (
    GetNotificationRequest,
    Notification,
    SetNotificationRequest,
)
from runtime.dispatcher import Incoming
from runtime.errors import RpcError
from sync_bus.followers import Followers
from sync_bus.merge import Version
from tests.fakes import account, resolves, stamp
from tests.unit.centers import Centers, NoPasswords, centers

ALICE, PHONE = account(0), account(2)
"""At home at a."""
URL = "https://hooks.example.com/alice?key=canary"
SECRET = "a-secret-of-the-test"
INCOMING = Incoming(ALICE, 5.0)
EVERYWHERE = resolves(hooks=["93.184.216.34"], inside=["10.0.0.1"], metadata=["169.254.169.254"])


@dataclass
class Users:
    """What users call at one center."""

    service: AccountService

    async def set(self, request_id: str = "request-1", **given: Any) -> Notification:
        whole = {"account_id": ALICE, "webhook_url": URL, "webhook_secret": SECRET, **given}
        request = SetNotificationRequest(request_id=request_id, **whole)
        return await self.service.SetNotification(request, INCOMING)

    async def get(self) -> Notification:
        return await self.service.GetNotification(
            GetNotificationRequest(account_id=ALICE), INCOMING
        )

    async def contact(self, account_id: str = ALICE) -> LookupContactResponse:
        return await self.service.LookupContact(
            LookupContactRequest(account_id=account_id), INCOMING
        )


def users(made: Centers, name: str, *, email_offered: bool = True) -> Users:
    one = made.service(name)
    return Users(
        AccountService(
            one.site,
            one.store,
            NoPasswords(),
            lambda _source: 0,
            EVERYWHERE,
            Revoker(one.site, one.store),
            Followers(list(one.site.mesh.peers), one.store),
            one.slots,
            email_offered=email_offered,
        )
    )


@pytest.fixture
async def two() -> Any:
    async with centers("a", "b", role="account") as made:
        for number, (account_id, identifier) in enumerate(
            [(ALICE, "alice@example.com"), (PHONE, "+8613912345678")]
        ):
            row = AccountRow(account_id, identifier, f"register-{number}", "a", 0)
            unit = accounts.register(row, "hash", {}, stamp(0))
            await made.service("a").store.write("register", unit)
        await made.settle()
        yield made


async def test_a_setting_is_shown_without_its_secret_and_known_to_every_center(
    two: Centers,
) -> None:
    a, b = users(two, "a"), users(two, "b")
    assert await a.get() == Notification(account_id=ALICE)
    assert not (await a.contact()).known
    shown = await a.set(email=True)
    assert shown == Notification(
        account_id=ALICE, webhook_url=URL, webhook_secret_set=True, email=True
    )
    await two.settle()
    assert await b.get() == shown
    for center in (a, b):
        assert await center.contact() == LookupContactResponse(
            known=True,
            webhook_url=URL,
            webhook_secret=SECRET,
            email_address="alice@example.com",
        )
    assert await two.service("a").digest("a", CHANGES) == await two.service("b").digest(
        "a", CHANGES
    )


async def test_a_contact_is_known_only_with_account_and_setting(two: Centers) -> None:
    """A setting may arrive before its account."""
    store = two.service("b").store
    unit = notification.merge(account(4), Setting(email=True), Version(1, "a"))
    await store.write("merge", unit)
    b = users(two, "b")
    assert not (await b.contact(account(4))).known
    assert not (await b.contact(PHONE)).known


async def test_the_last_writer_wins_at_every_center_whatever_comes_first(two: Centers) -> None:
    a, b = users(two, "a"), users(two, "b")
    await b.set("request-b", email=True)
    two.clock.advance(10)
    await a.set("request-a", webhook_url="", webhook_secret="")
    await two.settle()
    for center in (a, b):
        assert await center.get() == Notification(account_id=ALICE)
        assert await center.contact() == LookupContactResponse(known=True)
    assert await two.service("a").digest("a", CHANGES) == await two.service("b").digest(
        "a", CHANGES
    )


async def test_the_same_request_again_changes_nothing(two: Centers) -> None:
    a = users(two, "a")
    await a.set("request-1", email=True)
    await a.set("request-2", webhook_url="", webhook_secret="")
    await a.set("request-1", email=True)
    assert await a.get() == Notification(account_id=ALICE)


async def test_a_secret_is_kept_until_another_one_is_given(two: Centers) -> None:
    a = users(two, "a")
    await a.set("request-1")
    await a.set("request-2", webhook_url="https://hooks.example.com/2", webhook_secret="")
    assert (await a.contact()).webhook_secret == SECRET
    await a.set("request-3", webhook_secret="another-secret-of-it")
    assert (await a.contact()).webhook_secret == "another-secret-of-it"
    await a.set("request-4", webhook_url="", webhook_secret="")
    with pytest.raises(RpcError, match="16 to 128"):
        await a.set("request-5", webhook_secret="")


@pytest.mark.parametrize(
    ("given", "field", "why"),
    [
        ({"webhook_url": "http://hooks.example.com/"}, "webhook_url", "https"),
        ({"webhook_url": "https://user:pass@hooks.example.com/"}, "webhook_url", "password"),
        ({"webhook_url": "https://127.0.0.1/"}, "webhook_url", "network"),
        ({"webhook_url": "https://[::ffff:169.254.169.254]/"}, "webhook_url", "network"),
        ({"webhook_url": "https://2130706433/"}, "webhook_url", "usual form"),
        ({"webhook_url": "https://inside.example.com/"}, "webhook_url", "network"),
        ({"webhook_url": "https://metadata.example.com/"}, "webhook_url", "network"),
        ({"webhook_url": "https://nowhere.example.com/"}, "webhook_url", "no address"),
        ({"webhook_url": ""}, "webhook_secret", "empty"),
        ({"webhook_secret": ""}, "webhook_secret", "16 to 128"),
        ({"webhook_secret": "too-short"}, "webhook_secret", "16 to 128"),
        ({"webhook_secret": "x" * 129}, "webhook_secret", "16 to 128"),
        ({"webhook_secret": "has a space in it, so"}, "webhook_secret", "16 to 128"),
        ({"account_id": PHONE, "email": True}, "email", "no e-mail address"),
        ({"request_id": "short"}, "request_id", "8 to 64"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_is_not_in_order_is_refused_by_its_name_and_not_repeated(
    two: Centers, given: dict[str, Any], field: str, why: str
) -> None:
    a = users(two, "a")
    with pytest.raises(RpcError, match=why) as refused:
        await a.set(**given)
    assert refused.value.field_name == field
    assert not any(value in str(refused.value) for value in (SECRET, "hooks.", "inside."))
    assert await a.get() == Notification(account_id=ALICE)


async def test_mail_is_refused_where_none_is_sent(two: Centers) -> None:
    with pytest.raises(RpcError, match="EMAIL_NOT_OFFERED"):
        await users(two, "a", email_offered=False).set(email=True)


async def test_a_lost_disk_gets_its_settings_back(two: Centers) -> None:
    await users(two, "a").set(email=True)
    await two.settle()
    before = await users(two, "a").contact()
    await two.recover("a")
    assert before.known
    assert await users(two, "a").contact() == before
