"""Writes to a store until it is killed, and prints each name once its write has been acknowledged."""

import asyncio
import sys
from pathlib import Path

from runtime.store import Store, query
from tests.contract.backends import BACKENDS

WRITERS = 8


async def write_for_ever(store: Store, writer: int) -> None:
    number = 0
    while True:
        name = f"{writer}-{number}"
        await store.write("item", query("INSERT INTO item VALUES (?, ?)", name, number))
        sys.stdout.write(f"{name}\n")
        sys.stdout.flush()
        number += 1


async def main(backend: str, folder: Path) -> None:
    store = await BACKENDS[backend](folder).open()
    await asyncio.gather(*(write_for_ever(store, writer) for writer in range(WRITERS)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
