"""`sgl-lmcache simulate`: what a trace of requests would have hit, with which policy and with how much memory.

In the order in which data flows: `trace` reads the requests, `machine` says how fast everything is assumed to be,
`replay` runs them through the engine over a `tier` for each one that is configured, `bound` is the clairvoyant policy
beside it, `runs` does this for every policy and capacity on all cores, and `report` and `plot` show it. `command` is
the command line.

None of this imports SGLang or torch.
"""
