"""Reserving, capturing and releasing: what a payer may do with a hold, decided at the payer's home.

Each is one unit. A capture is a transfer like any other (`transfers.decide`), paid from what was held.
"""

from typing import NamedTuple

from duohuo.v1.transfer_service_pb2 import (
    HOLD_STATE_CAPTURED,
    HOLD_STATE_EXPIRED,
    HOLD_STATE_HELD,
    HOLD_STATE_REFUSED,
    HOLD_STATE_RELEASED,
)
from runtime.ids import account_slot
from runtime.store import Unit
from sync_bus import homes
from sync_bus.log import Stamp
from transfer_svc import controls, holds, transfers
from transfer_svc.holds import HoldRow
from transfer_svc.rules import HOLDS_OPEN_MAX, Order
from transfer_svc.states import HoldEvent
from transfer_svc.transfers import TransferRow

_ENDED = {
    HOLD_STATE_REFUSED: "HOLD_NOT_FOUND",
    HOLD_STATE_CAPTURED: "HOLD_CAPTURED",
    HOLD_STATE_RELEASED: "HOLD_RELEASED",
    HOLD_STATE_EXPIRED: "HOLD_EXPIRED",
}


class Capture(NamedTuple):
    """What came of capturing: the transfer that was decided, or why none was."""

    hold: HoldRow | None
    transfer: TransferRow | None
    refused: str = ""


def reserve(
    center: str,
    hold_id: str,
    order: Order,
    refused: str,
    expire_ms: int,
    stamp: Stamp,
) -> Unit[HoldRow]:
    """Holds an order's amount back, or refuses to, once and for ever.

    `refused` is a reason known before the unit. If the hold was decided before, that is returned; compare
    its body hash with the order's.
    """
    present = yield from holds.find(order.payer_account_id, hold_id)
    if present is not None:
        return present
    yield from holds.expire_due(order.payer_account_id, stamp)
    reason = refused
    if not reason:
        # What counts for the day is what leaves the account, so the day's limit is the capture's matter.
        control = yield from controls.find(order.payer_account_id)
        reason = controls.cannot_pay(control._replace(per_day_max=0), order.minor_units, 0)
    if not reason:
        payee_home = yield from homes.payee_home(order.payee_account_id, center)
        reason = yield from transfers.cannot_be_paid(center, order, payee_home)
    if not reason and (yield from holds.open_count(order.payer_account_id)) >= HOLDS_OPEN_MAX:
        reason = "HOLDS_LIMIT"
    row = HoldRow(
        order.payer_account_id,
        hold_id,
        (yield from homes.present(account_slot(order.payer_account_id) or 0)).epoch,
        order.body_hash,
        order.payee_account_id,
        order.currency,
        order.minor_units,
        order.memo,
        HOLD_STATE_REFUSED if reason else HOLD_STATE_HELD,
        reason,
        0,
        "",
        stamp.time_ms,
        expire_ms,
        center,
    )
    yield from holds.add(row, stamp)
    return row


def capture(
    center: str,
    payer_account_id: str,
    hold_id: str,
    transfer_id: str,
    wanted: tuple[str, int] | None,
    body_hash: bytes,
    stamp: Stamp,
) -> Unit[Capture]:
    """Pays a hold's payee from it, all or the wanted (currency, minor units), and gives the rest back.

    If the transfer was decided before, that decision is returned; compare its body hash.
    """
    yield from holds.expire_due(payer_account_id, stamp)
    hold = yield from holds.find(payer_account_id, hold_id)
    present = yield from transfers.find(payer_account_id, transfer_id)
    if present is not None:
        return Capture(hold, present)
    if hold is None or hold.state != HOLD_STATE_HELD:
        return Capture(hold, None, ended(hold))
    currency, minor_units = wanted or (hold.currency, hold.minor_units)
    if currency != hold.currency:
        return Capture(hold, None, "CURRENCY_MISMATCH")
    if minor_units > hold.minor_units:
        return Capture(hold, None, "CAPTURE_TOO_LARGE")
    order = Order(
        transfer_id,
        payer_account_id,
        hold.payee_account_id,
        currency,
        minor_units,
        hold.memo,
        body_hash,
    )
    payee_home = yield from homes.payee_home(hold.payee_account_id, center)
    refused = yield from transfers.cannot_execute(
        center, order, payee_home, stamp, held=hold.minor_units
    )
    if not refused:
        hold = yield from holds.end(hold, HoldEvent.CAPTURE, stamp, minor_units, transfer_id)
    transfer = yield from transfers.decide(center, order, payee_home, refused, stamp)
    return Capture(hold, transfer)


def release(payer_account_id: str, hold_id: str, stamp: Stamp) -> Unit[HoldRow | None]:
    """Gives up a hold, if it is open. Look at the state of what is returned."""
    yield from holds.expire_due(payer_account_id, stamp)
    hold = yield from holds.find(payer_account_id, hold_id)
    if hold is not None and hold.state == HOLD_STATE_HELD:
        hold = yield from holds.end(hold, HoldEvent.RELEASE, stamp)
    return hold


def ended(hold: HoldRow | None) -> str:
    """Why nothing can be done any more with a hold that is not open."""
    return "HOLD_NOT_FOUND" if hold is None else _ENDED[hold.state]
