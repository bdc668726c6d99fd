"""Jobs by submitit: processes of this machine, or jobs of Slurm. Begun, watched, and ended with the command.

The requests to Slurm (partition, time, devices, memory) stand in the environment variables that sbatch reads. Without
them they are the cluster's default; see `man sbatch`, "INPUT ENVIRONMENT VARIABLES".
"""

import contextlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import folders
from experiments.errors import InputError, shown
from experiments.interrupt import OnInterrupt

Job = Any  # submitit.Job: submitit is imported only where something is launched


class Target(NamedTuple):
    """The place where jobs run, and how many at a time; None is all."""

    cluster: str  # a key of _CLUSTERS
    jobs: int | None


def target(text: str) -> Target:
    """Reads `--launch`.

    Raises:
      InputError: it names no place, or one that is not to be had from here.
    """
    match = re.fullmatch(r"(local(?=:)|slurm)(?::([1-9][0-9]{0,5}))?", text)
    if match is None:
        raise InputError(f"--launch: expected local:N, slurm or slurm:N for N jobs at a time, got {shown(text)}")
    for command in _CLUSTERS[match[1]].commands:
        if shutil.which(command) is None:
            raise InputError(f"--launch: {match[1]} is not available here: there is no command {command}")
    if importlib.util.find_spec("submitit") is None:
        raise InputError('--launch: expected the library submitit, got none; pip install -e ".[study]" brings it')
    return Target(match[1], int(match[2]) if match[2] else None)


def ended(
    calls: Mapping[str, Callable[[], None]], logs: Path, where: Target, on_interrupt: OnInterrupt
) -> Generator[tuple[str, Job], None, None]:
    """Makes each call in a separate job, in order; yields its name as the job ends, for any reason.

    However the generator or the process ends, it ends the jobs that are left: all but a SIGKILL of the process.

    Raises:
      InputError: a job cannot be begun.
    """
    cluster, waiting, running, launching = _CLUSTERS[where.cluster], list(calls), {}, threading.Lock()

    def end() -> None:
        launching.acquire(timeout=10)  # for good: what was launched from now on would be left
        cluster.end(list(running.values()))

    on_interrupt.ending = end
    with folders.writing(logs):
        executor = cluster.executor(logs)
    try:
        while waiting or running:
            with launching:
                while waiting and len(running) < (where.jobs or len(calls)):
                    name = waiting.pop(0)
                    running[name] = _submit(executor, calls[name])
                    print(f"{name}: job {running[name].job_id}", file=sys.stderr)
                over = cluster.over(list(running.values()))
                for name in [name for name, job in running.items() if job in over]:
                    yield name, running.pop(name)
            time.sleep(cluster.pause)
    finally:
        cluster.end(list(running.values()))


def _submit(executor: Any, call: Callable[[], None]) -> Job:
    from submitit.core.utils import FailedJobError

    # Ctrl-C at a terminal goes to every process there. The jobs leave it to this one, or each would show a traceback.
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with folders.writing(executor.folder), contextlib.redirect_stderr(io.StringIO()):  # it is in the error, too
            return executor.submit(_work, call)
    except FailedJobError as error:  # sbatch's: no such partition, too many jobs
        raise InputError(f"--launch: {error}") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)


def _work(call: Callable[[], None]) -> None:
    """Runs the call in the job."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it, and the job would not end when told to
    threading.Thread(target=_follow, args=[os.getppid()], daemon=True).start()
    call()


def _follow(parent: int) -> None:
    """Ends this process after the one that started it, which leaves it behind where it is killed itself."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


# ---- The places


class _Cluster(NamedTuple):
    commands: tuple[str, ...]  # that it takes
    executor: Callable[[Path], Any]
    over: Callable[[Sequence[Job]], Sequence[Job]]
    end: Callable[[Sequence[Job]], None]
    pause: float  # seconds from one look to the next


def _local(logs: Path) -> Any:
    import submitit

    # By itself submitit hides the GPUs from a local job, and ends it after two minutes.
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    setting = "-u CUDA_VISIBLE_DEVICES" if gpus is None else f"CUDA_VISIBLE_DEVICES={shlex.quote(gpus)}"
    executor = submitit.LocalExecutor(logs, python=f"env {setting} {shlex.quote(sys.executable)}")
    executor.update_parameters(timeout_min=60 * 24 * 365)
    return executor


def _local_over(jobs: Sequence[Job]) -> Sequence[Job]:
    return [job for job in jobs if job.done()]


def _local_end(jobs: Sequence[Job]) -> None:
    for number in [*[signal.SIGTERM] * 50, signal.SIGKILL]:  # a job that is just starting may miss the first ones
        running = [job for job in jobs if not job.done()]
        for job in running:
            os.kill(int(job.job_id), number)
        if not running:
            break
        time.sleep(0.1)


def _slurm(logs: Path) -> Any:
    import submitit

    executor = submitit.SlurmExecutor(logs)
    # Left to itself submitit limits a job to 5 minutes.
    executor.update_parameters(job_name="experiments", time=None, wckey=None, use_srun=False)
    return executor


def _slurm_over(jobs: Sequence[Job]) -> Sequence[Job]:
    """Those that have left the queue. submitit asks sacct, which knows nothing where a cluster keeps no accounts."""
    command = ["squeue", "--noheader", "--format=%A", f"--user={os.getuid()}"]
    queue = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    queued = queue.stdout.split()
    return [] if queue.returncode else [job for job in jobs if job.job_id not in queued]


def _slurm_end(jobs: Sequence[Job]) -> None:
    if jobs:
        subprocess.run(["scancel", *(job.job_id for job in jobs)], capture_output=True)


_CLUSTERS = {
    "local": _Cluster((), _local, _local_over, _local_end, 0.2),
    "slurm": _Cluster(("sbatch", "squeue", "scancel", "srun"), _slurm, _slurm_over, _slurm_end, 5.0),
}
