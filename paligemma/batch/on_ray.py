"""--ray: the same run on a Ray cluster. Ray hands out numbers of shards; workers write the parts themselves.

So a run on a cluster is what it is on one machine: the same folder, the same parts, the same resumption. What Ray adds
is placement (a worker for each GPU of the cluster) and restarting: an actor that dies is started again, and its shard
is given to another one, which finds the lease of a process that is gone.

The folder lies on a disk that all nodes share. Before work starts each node writes a file to it, and this process looks
whether it can see them.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from paligemma.batch.folder import RunFolder
from paligemma.batch.run import Ended, Progress, opened_tally, stop_signals
from paligemma.batch.shards import Answer
from paligemma.batch.status import write_summary
from paligemma.batch.worker import How, finish_shards
from paligemma.devices import cpu_count

LOCAL = "local"  # the address of a cluster of this machine alone, begun and ended with the run


class ShardWorker:
    """One actor: a model, and the shards that it is given. stop: a file that asks all of them to end. here: the folder
    that the command runs in, to which its names (of a model, of --draw) are relative."""

    def __init__(self, path: str, how: How, stop: str, here: str) -> None:
        with suppress(OSError):  # a node need not have it, if all names are absolute
            os.chdir(here)
        self.folder, self.how, self.stop = RunFolder(path), how, Path(stop)
        self.answer: Answer | None = None

    def load(self) -> Answer:
        if self.answer is None:
            self.answer = self.how.loaded(self.folder.settings)
        return self.answer

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """batch: column shard, with one of them. It returns when the shard is done, by whomever. Column lost: how many
        actors had died while they worked on it, which is seen by the leases that they left."""
        lost: list[int] = []
        shards = [int(shard) for shard in batch["shard"]]
        finish_shards(self.folder, shards, self.load, self.stop.exists, lambda line: None, lost.append)
        return {"shard": shards, "lost": [sum(lost)]}


def run_on_ray(
    folder: RunFolder,
    address: str,
    workers: int,
    how: How,
    stop_after_errors: int | None = None,
    retry_errors: bool = False,
    on_progress: Callable[[Progress], object] = lambda progress: None,
    note: Callable[[str], object] = lambda text: None,
) -> Ended:
    """As `run.run_batch`, with `workers` actors on the cluster at `address` ("local": one on this machine).

    A GPU is reserved for each actor if the cluster has some and the device is not another one, and `how.threads` cores.
    Progress is known shard by shard. ImportError without ray, RuntimeError if a node does not share the folder.
    """
    ray = imported_ray(address)
    tally = opened_tally(folder, how, retry_errors, note)
    before, started = tally.answered + tally.errors.total(), time.monotonic()
    failed_before = tally.errors.total()
    signals: list[int] = []
    failure, stopped, lost = None, False, 0
    if not tally.is_complete:
        start(ray, address, workers, how.threads or 1)
        stop = folder.work / f".stop-{uuid.uuid4().hex}"
        try:
            check_shared(ray, folder.work.absolute())
            with stop_signals(stop.touch) as signals:  # at once: the first shard may be an hour away
                left = sorted(set(tally.shards) - tally.counted.keys())
                for done in handed_out(ray, folder, left, workers, how, stop):
                    lost += int(sum(done["lost"]))
                    tally.update()
                    rows, seconds = tally.answered + tally.errors.total(), time.monotonic() - started
                    on_progress(Progress(rows, tally.rows, tally.errors.total(), seconds, rows - before))
                    stopped = (
                        stop_after_errors is not None and tally.errors.total() - failed_before >= stop_after_errors
                    )
                    if stopped:
                        stop.touch()
        except ray.exceptions.RayError as error:
            failure = f"Ray ended the run: {str(error).strip().splitlines()[-1]}"
        finally:
            with suppress(OSError):
                stop.unlink(missing_ok=True)
            if address == LOCAL:
                ray.shutdown()
    tally.update()
    seconds = time.monotonic() - started
    summary = write_summary(folder, seconds, tally.answered + tally.errors.total() - before, lost)
    kinds = dict(sorted(tally.errors.items()))
    number = signals[0] if signals else None
    return Ended(summary, tally.answered, kinds, tally.is_complete, number, failure, stopped)


def imported_ray(address: str) -> Any:
    """Ray. On this machine alone it listens on loopback and tells nobody; both are read from the environment, and the
    first has an odd name (it is a default elsewhere)."""
    if address == LOCAL:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise ImportError("--ray needs the package ray: pip install 'paligemma[ray]'") from None
    return ray


def start(ray: Any, address: str, workers: int, threads: int) -> None:
    """Joins a cluster, or begins one on this machine that only this machine can reach."""
    if ray.is_initialized():
        return
    if address != LOCAL:
        ray.init(address=address, log_to_driver=False)
        return
    ray.init(
        address=LOCAL,
        num_cpus=max(cpu_count(), workers * threads),
        include_dashboard=False,
        log_to_driver=False,
    )


def check_shared(ray: Any, folder: Path) -> None:
    """RuntimeError, naming the nodes, if a file that a node writes to the folder cannot be seen here."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=0)
    def write(path: str) -> None:
        with suppress(OSError):
            Path(path).write_text("a node was here")

    probes = {}
    for node in ray.nodes():
        if node["Alive"]:
            path = folder / f".node-{uuid.uuid4().hex}"
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            probes[path] = (node["NodeManagerAddress"], write.options(scheduling_strategy=place).remote(str(path)))
    ray.get([task for _, task in probes.values()])
    missing = [address for path, (address, _) in probes.items() if not path.exists()]
    for path in probes:
        path.unlink(missing_ok=True)
    if missing:
        raise RuntimeError(
            f"{folder} is not a folder that all nodes of the cluster share ({', '.join(missing)} cannot write to it): "
            "choose --out on a shared disk"
        )


def handed_out(ray: Any, folder: RunFolder, shards: Sequence[int], workers: int, how: How, stop: Path) -> Any:
    """Yields a batch whenever a shard is done."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # progress is shown by the command itself
    device = folder.settings.device
    gpus = 1 if device is None and ray.cluster_resources().get("GPU") else 0
    gpus = 1 if device is not None and device.startswith("cuda") else gpus
    arguments = (
        str(folder.path.absolute()),
        replace(how, device="cuda" if gpus else device),
        str(stop.absolute()),
        os.getcwd(),
    )
    rows = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    done = rows.map_batches(
        ShardWorker,
        batch_size=1,
        fn_constructor_args=arguments,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(shards)), max_tasks_in_flight_per_actor=1),
        num_cpus=how.threads or 1,
        num_gpus=gpus,
    )
    yield from done.iter_batches(batch_size=None, prefetch_batches=0)
