"""Money: the ledger, transfers within and across centers, and queued applications.

Owns CONSERVE, NO-OVERDRAFT and ONCE. An account's balance is moved by its home center alone, in one
transaction with its entries; other centers hold copies. Read `states` (the state machines), `rules`,
`ledger` (double entry), `holds` (money kept back), `controls` (frozen, closed, limited accounts),
`transfers` (deciding, crediting, refunding), `moving` (to another home), `reservations` (what a payer does
with holds), `applications` (the queue), then `service`, `hold_service`, `control_service` and `dispatch`
(the task that works through the queue); `app` wires.
"""
