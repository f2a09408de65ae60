"""A real Ray cluster of two nodes on this machine: same trials as here, and a node that dies costs its running ones only."""

import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import compressor
from compressor import AACP, Compensation, Fitness, Target
from compressor.errors import BackendError
from compressor.methods import Problem
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.tracing.portable import assembled, portable
from compressor.search.samplers import ABANDONED
from compressor.search.study import OUTCOME
from compressor.values.plan import Structure
from tests.methods.conftest import digits, net  # noqa: F401 - fixtures
from tests.methods.digits import pairs

ray = pytest.importorskip("ray", reason="the cluster needs the package ray")
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's own sockets and files
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def problem(net, digits):  # noqa: F811
    graph = compressor.trace(net, (torch.zeros(2, 1, 8, 8),))
    channels = compressor.analyze(graph)
    full = float(channels.costs_of(channels.full).macs[0])
    calibration = Calibration.read([(x,) for x, _ in pairs(digits["train"])], graph, 300)
    return Problem(channels, {"macs": 0.5 * full}, Target("fake", align=4), None, None, 0, pairs(digits["holdout"]), calibration)


@pytest.fixture
def cluster(monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 10**8, "include_dashboard": False})
    found.second = found.add_node(num_cpus=1, object_store_memory=10**8, resources={"compressor_target": 1})
    found.wait_for_nodes()
    yield found
    ray.shutdown()
    found.shutdown()


def method(parallel):
    fitness = Fitness("compensate", holdout=400, images=200)
    return AACP(24, fitness, steps="align", population=5, parallel=parallel, compensation=Compensation(images=200, positions=8))


def trials(url):
    import optuna

    (summary,) = optuna.get_all_study_summaries(url)
    study = optuna.load_study(study_name=summary.study_name, storage=url)
    return [(t.params, t.state, t.value) for t in study.trials if ABANDONED not in t.system_attrs], study


@pytest.mark.slow
def test_a_node_killed_in_the_middle_changes_nothing(problem, cluster, tmp_path):
    here, there = (f"sqlite:///{tmp_path / name}.db" for name in ("here", "there"))
    expected = method(3).plan(replace(problem, storage=here))

    killed_at = []

    def kill():
        while True:
            time.sleep(0.05)
            try:
                finished = sum(1 for t in trials(there)[0] if t[1].is_finished())
            except Exception:
                continue
            if finished >= 6:
                cluster.remove_node(cluster.second, allow_graceful=False)
                killed_at.append(finished)
                return

    killer = threading.Thread(target=kill)
    killer.start()
    plan = method(3).plan(replace(problem, storage=there, cluster=cluster.address))
    killer.join()
    assert 6 <= killed_at[0] < 20
    deadline = time.monotonic() + 60
    while [node["Alive"] for node in ray.nodes()].count(True) > 1 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [node["Alive"] for node in ray.nodes()].count(True) == 1
    own, study = trials(there)
    sequential, _ = trials(here)
    assert [t[:2] for t in own] == [t[:2] for t in sequential]
    assert [t[2] for t in own] == pytest.approx([t[2] for t in sequential], rel=1e-4)
    assert plan == expected
    assert sum(t.user_attrs[OUTCOME]["images"] > 0 for t in study.trials) > 12


@pytest.mark.slow
def test_whoever_measures_has_the_device_and_its_node_alone(problem, cluster):
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from compressor.search.cluster import RemoteDevice, has_device

    assert has_device(cluster.address)
    device = RemoteDevice(cluster.address, problem.channels, problem.target, 0)
    assert device.fingerprint() == problem.target.fingerprint()
    plan = problem.channels.plan(0.5)
    assert device.trial(plan).ratio < 1

    @ray.remote(num_cpus=1)
    def judging():
        time.sleep(8)
        return time.time()

    place = NodeAffinitySchedulingStrategy(cluster.second.node_id, soft=False)
    busy = judging.options(scheduling_strategy=place).remote()
    time.sleep(2)
    device.trial(plan)
    measured_at = time.time()
    assert ray.get(busy) <= measured_at, "it has waited for what was judged there"
    full = problem.channels.full
    narrow = problem.channels.structure(plan)
    found = device.observe([full, Structure(narrow.widths)])
    assert found[1].median_ms < found[0].median_ms


@pytest.mark.slow
def test_through_a_ray_client_the_search_is_the_same(problem, tmp_path):
    """`ray://`: from a machine that is no node of the cluster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray_command = [sys.executable, "-m", "ray.scripts.scripts"]
    options = ["--head", "--port=0", f"--ray-client-server-port={port}", "--num-cpus=2", "--include-dashboard=false"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(Path(compressor.__file__).parents[1])}
    subprocess.run([*ray_command, "start", *options], env=environment, check=True, capture_output=True, timeout=120)
    try:
        assert method(3).plan(replace(problem, cluster=f"ray://127.0.0.1:{port}")) == method(3).plan(problem)
    finally:
        ray.shutdown()
        subprocess.run([*ray_command, "stop", "--force"], env=environment, check=False, capture_output=True, timeout=60)


@pytest.mark.slow
def test_a_cluster_without_the_device_says_how_to_start_the_node_that_has_it(problem, cluster):
    from compressor.search.cluster import RemoteDevice

    cluster.remove_node(cluster.second, allow_graceful=True)
    deadline = time.monotonic() + 60
    ray.init(address=cluster.address, log_to_driver=False)
    while ray.cluster_resources().get("compressor_target") and time.monotonic() < deadline:
        time.sleep(0.2)
    with pytest.raises(BackendError, match=r"--resources='\{\"compressor_target\": 1\}'"):
        RemoteDevice(cluster.address, problem.channels, problem.target, 0)


def test_a_graph_that_was_sent_is_the_graph(problem):
    graph = problem.channels.graph
    other = assembled(portable(graph))
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(other(x), graph(x))
    assert compressor.analyze(other).digest == problem.channels.digest
    plan = problem.channels.plan(0.5)
    assert torch.equal(compressor.apply(plan, other)(x), compressor.apply(plan, graph)(x))
