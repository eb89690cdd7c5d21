"""Sessions: who is logged in. A session lives only at the center that made it, its origin.

Tokens name their origin and are stored hashed. Other centers read a session back from its origin;
revocations travel over the log. Read `store`, `sessions`, `service`; `app` wires.
"""
