"""Money: the ledger, transfers within and across centers, and queued applications.

Owns CONSERVE, NO-OVERDRAFT and ONCE. An account's balance is moved by its home center alone, in one
transaction with its entries; other centers hold copies. Read `states` (the two state machines),
`rules`, `ledger` (double entry), `transfers` (deciding, crediting, refunding), `applications` (the
queue), then `service` and `dispatch` (the task that works through the queue); `app` wires.
"""
