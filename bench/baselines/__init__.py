"""Baselines: what Forebay is compared with.

- `by_hand`: tasks as one writes them without a supervisor, with a semaphore, `asyncio.timeout` and `gather`;
- `raw_sqlite`: inserts without a task store;
- `dbos_sagas`: workflows on DBOS, in an environment of its own;
- `semaphore`: a fixed semaphore around calls that retry inside it, as SDKs do;
- `bare_proxy`: HTTP proxies that only forward;
- `oracle_limit`, `oracle_schedule`: the optimum, by knowledge of the provider that no client has.

Calls that go to the provider directly are the baseline of `bench.agents` and `bench.gateway`.
"""
