"""Users who come, leave something of everything behind, and have it erased."""

from collections.abc import Iterator

from account_svc.erasure import placeholder
from ops.simulation.history import History, Outcome
from ops.simulation.stage import Stage
from ops.simulation.workload import User, Workload
from runtime.placement import slot_of

FIRST_NUMBER = 1000
THINK_S = 1.0
_PERSONAL = ("credential", "profile_field", "history", "request", "notification_setting", "claim")


async def come_and_go(workload: Workload, until_s: float) -> None:
    """One leaver after the other."""
    stage, number = workload.stage, FIRST_NUMBER
    while stage.now_s() < until_s:
        user = workload.new_user(number)
        number += 1
        for work in (
            workload.register,
            workload.login,
            workload.ask_for_notifications,
            workload.edit,
            workload.add_identifier,
            workload.edit,
        ):
            if user.account_id or work == workload.register:
                await work(user)
            await workload.think(THINK_S)
        if user.account_id:
            await _erase(workload, user)


async def _erase(workload: Workload, user: User) -> None:
    """What an operator does at the account's home, repeated until it is certain."""
    stage = workload.stage
    operation = workload.begin("erase", user, id=user.account_id)

    async def erase() -> None:
        await stage.erase(stage.placement.home(slot_of(user.identifier)), user.account_id)

    await workload.insist(operation, erase)


def left(stage: Stage, history: History) -> Iterator[str]:
    """ERASED: nothing is left of those who were erased, but for the account's id."""
    for one in history.of("erase", Outcome.OK):
        account = one.facts["id"]
        for name in stage.names:
            disk = stage.disk(name)
            for table in _PERSONAL:
                if disk.rows("account", f"SELECT 1 FROM {table} WHERE account_id = ?", account):  # noqa: S608 - constant names
                    yield f"ERASED: {name} still has a {table} of {account}"
            identifiers = disk.rows(
                "account", "SELECT identifier FROM account WHERE account_id = ?", account
            )
            if identifiers != [(placeholder(account),)]:
                yield f"ERASED: {name} still knows who {account} was"
            if disk.rows("session", "SELECT 1 FROM session WHERE account_id = ?", account):
                yield f"ERASED: {name} still has a session of {account}"
