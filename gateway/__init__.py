"""The gateway: where users' calls enter a center, and find the center that may answer them.

`ring` computes placements. `routes` decides, per call, which centers to ask in which order; `router`
asks them. `authenticator` turns a bearer token into an account. `announcements` and `operator` are the
two services that the gateway role answers itself. `homes` hears of slots that have moved. No other
service is known here by name: what a call needs is declared in its .proto file.
"""
