"""How the centers learn each other's changes: one log, two roads.

`log`         a service's ordered record of what others must learn; appended in the effect's transaction
`inbox`       applying another center's log: in order, exactly once, by a cursor in the same transaction
`bus`         the fast road, JetStream (`jetstream`); it may forget, repeat or reorder
`feed`        the sure road: reading a log over gRPC; carries some topics and fills every gap
`replicator`  the tasks that keep both roads moving for one service
`copies`      the tables that every center has a copy of, row by row
`snapshot`    copying one topic of one center as rows, where its entries are forgotten
`recovery`    how a store begins its life: new, or getting back what its disk has lost
`anti_entropy`  finding what differs between a copy and its owner although it should not
`lag`         how far a copy is behind, in entries and in time, and until it has caught up
`merge`       which of two concurrent writes wins
`homes`       who is home of a slot, and acts for it; `handover` gives one away while users go on
"""
