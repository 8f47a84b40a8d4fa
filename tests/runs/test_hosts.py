"""Jobs over simulated machines: the short part of tests/hosts.py."""

import hosts
import pytest
from hosts import Hosts

pytestmark = pytest.mark.skipif(not hosts.can_be_made(), reason="machines are namespaces: Linux, root, ip and nsenter")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return hosts.tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The samples of one process."""
    out = tmp_path_factory.mktemp("whole")
    hosts.alone(flags, out)
    return hosts.result(out)


SCENARIOS = {
    "no name leads to another machine": {"launch": Hosts.mpiexec, "fault": hosts.nothing, "prepare": hosts.one_name},
    "a rank is lost": {"launch": Hosts.torchrun, "fault": hosts.killed, "patience": 3},
    "rank 0 is lost": {"launch": Hosts.by_hand, "fault": hosts.store_killed},
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_job_over_machines_ends_well(flags, whole, tmp_path, name):
    well, words, _ = hosts.run(tmp_path, flags, whole, **SCENARIOS[name])
    assert well, words
