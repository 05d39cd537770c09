"""Real workers that die of each cause in mid-answer: the answers end with it at once, and the next one is served."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support import tiny_model
from support.deaths import CAUSES, Dying, possible

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def dying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dying]:
    model = tiny_model.build(tmp_path_factory.mktemp("models").resolve() / "model", context=500_000)
    with Dying.daemon_of() as daemon:
        yield Dying(daemon, str(model))


@pytest.mark.parametrize("name", CAUSES)
def test_a_worker_that_dies_of(dying: Dying, name: str) -> None:
    if not possible(name):
        pytest.skip("this system does not let it be done")
    took_s = dying.die(name)
    if took_s > CAUSES[name].within_s:  # once the machine may have been busy with others; twice is the daemon's doing
        took_s = dying.die(name)
    assert took_s <= CAUSES[name].within_s


def test_the_daemon_has_gone_on_all_the_while(dying: Dying) -> None:
    with dying.daemon.client() as client:
        assert client.status().pid == dying.daemon.pid
        assert "Traceback" not in dying.daemon.log()
