"""The guarantees under real faults, on a real mesh: `duohuo drill nemesis`.

The users and the checks are the simulator's (`ops.simulation`); `stage` puts them on a running mesh,
`faults` breaks it, `run` is the drill from start to verdict.
"""
