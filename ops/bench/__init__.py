"""`duohuo bench`: figures that anybody can measure again.

`benchmark`  what a benchmark is, and the plain arithmetic on its figures
`run`        runs benchmarks, their cases in turn, and keeps the results
`mesh`       a mesh of a benchmark's own, in real processes
`calls`      how fast a center answers meanwhile
`backlog`    makes the users and the log entries that another center has to catch up with
`catch_up`   the benchmark of that name; add others beside it, and to the list in `run`
"""
