"""Accounts: who the users are, their passwords and profiles.

Owns UNIQUE (an identifier belongs to at most one account, ever): claims are decided by the
identifier's home center alone, in one transaction. Passwords and profiles may be written anywhere and
merge by last writer. Read `rules`, `store`, `service`; `app` wires.
"""
