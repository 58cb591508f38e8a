"""SIGKILL and SIGSTOP of whatever a run on a cluster consists of, in the middle of it: real processes, real signals."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .support.commands import Folder
from .support.dask_cluster import running_cluster, wait_for
from .support.dask_kills import (
    DisturbedJob,
    kill_coordinator,
    kill_scheduler,
    kill_worker,
    stop_worker,
    wake_workers,
)

How = Callable[[DisturbedJob, subprocess.Popen[str]], subprocess.Popen[str]]


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", [kill_worker, stop_worker, kill_scheduler, kill_coordinator])
def test_a_run_that_is_disturbed_ends_as_if_it_had_not_been(tmp_path: Path, how: How, rounds: int) -> None:
    """The output is that of an undisturbed run byte for byte, no committed item runs again, and no run hangs."""
    with Folder(tmp_path) as folder, running_cluster(tmp_path, nanny=how is kill_worker) as cluster:
        job = DisturbedJob(folder, cluster, random.Random(f"{how.__name__} {rounds}"))
        for _ in range(rounds):
            wait_for(lambda: len(cluster.worker_pids()) == 2)
            job.disturb(how)
            if how is stop_worker:
                wake_workers(cluster)
        print(f"{how.__name__}: {rounds} rounds, at most {job.longest_s:.1f} s to the end")
        assert job.longest_s < 30
