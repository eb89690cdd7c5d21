"""The gateway: where users' calls enter a center, and find the center that may answer them.

`ring` computes placements. `routes` decides, per call, which centers may answer; `health` says which of
them are asked first; `router` asks them. `authenticator` turns a bearer token into an account.
`announcements`, `operator` and `mesh_operator` are what the gateway role answers itself. `homes` hears of
slots that have moved. What a user's call needs is declared in its .proto file.
"""
