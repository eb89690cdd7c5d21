"""Losing JetStream's whole directory loses nothing, applies nothing twice, and needs no operator."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.integration.conftest import RunningMesh, is_alive, wait_until
from tests.integration.load import Load, load_on

pytestmark = pytest.mark.timeout(300)
WHO = pytest.mark.parametrize("who", [("a",), ("a", "b")], ids="+".join)


@WHO
async def test_its_files_vanish_under_it(mesh: RunningMesh, who: tuple[str, ...]) -> None:
    async with load_on(mesh) as load:
        await load.more()
        for center in who:
            await load.fill_jetstream(center)
            shutil.rmtree(load.stage.jetstream(center), ignore_errors=True)
            # As long as it need not open one of its files again, it does not notice.
            await load.fill_jetstream(center)
        await _nothing_is_lost_and_it_carries_again(load)


@WHO
async def test_it_dies_and_comes_back_empty(mesh: RunningMesh, who: tuple[str, ...]) -> None:
    async with load_on(mesh) as load:
        await load.more()
        for center in who:
            await load.fill_jetstream(center)
            _kill(mesh, center)
            shutil.rmtree(load.stage.jetstream(center), ignore_errors=True)
        await _nothing_is_lost_and_it_carries_again(load)


@WHO
async def test_it_is_rolled_back(mesh: RunningMesh, tmp_path: Path, who: tuple[str, ...]) -> None:
    async with load_on(mesh) as load:
        await load.more()
        for center in who:
            with suppress(shutil.Error):  # files that came and went meanwhile
                shutil.copytree(load.stage.jetstream(center), tmp_path / center)
            await load.fill_jetstream(center)
        await load.more()
        with _supervisor_held(mesh):
            for center in who:
                _kill(mesh, center)
                shutil.rmtree(load.stage.jetstream(center), ignore_errors=True)
                shutil.copytree(tmp_path / center, load.stage.jetstream(center))
        await _nothing_is_lost_and_it_carries_again(load)


@contextmanager
def _supervisor_held(mesh: RunningMesh) -> Iterator[None]:
    """So that it does not start a NATS again in the middle of the change of its files."""
    mesh.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        mesh.process.send_signal(signal.SIGCONT)


def _kill(mesh: RunningMesh, center: str) -> None:
    pid = mesh.described["centers"][center]["pids"]["nats"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid))


async def _nothing_is_lost_and_it_carries_again(load: Load) -> None:
    await load.more()
    await load.settled()
    await load.jetstream_carries_again()
