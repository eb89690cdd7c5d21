"""`duohuo simulate`: the real services, gateways, log and retry code of several centers on a virtual clock.

One process, one thread, one seed. The seed picks the schedule of tasks, every delay, loss and
duplicate on the network and the bus, every crash, cut and clock jump, and what the users do. Nothing of
the product is replaced but what is handed to it: clock, randomness, ids, store driver, bus, peers and
password hashing.

`loop` virtual time and seeded scheduling; `world` one simulated mesh; `network`, `bus`, `disk`, `clocks`
its outside world; `faults` what goes wrong; `workload` what users do; `checks` the guarantees by name;
`run` one seed from start to verdict. After TigerBeetle's VOPR and FoundationDB's simulator.
"""
