"""A run spread over jobs: it measures what the run without them does, and loses nothing that a job has finished."""

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import tiny_studies

from experiments import config, folders, jobs, manifest, studies
from experiments.__main__ import main
from experiments.interrupt import OnInterrupt

COIN = "configs/coin.toml"
GRID = ["run", COIN, "--set", "grid.arms=['A', 'B']", "--set", "grid.seeds=[1]"]


@pytest.fixture(autouse=True)
def _tiny_studies(monkeypatch, tmp_path):
    tiny_studies.install(monkeypatch, tmp_path)
    monkeypatch.setattr("experiments.data._loaded", {})  # a job is a new process, which has loaded nothing yet
    # Python runs this file as it starts: the jobs are to find these studies too.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        f"from experiments import studies\nstudies.__path__[:] = [{str(tiny_studies.FOLDER)!r}]\n", encoding="utf-8"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["site", tiny_studies.environment()["PYTHONPATH"]]))


def tables(folder):
    """Every row that a run has stored; the records of a study in their order."""
    queries = [
        "SELECT study FROM studies ORDER BY study",
        "SELECT * FROM runs ORDER BY study, rowid",
        "SELECT * FROM measurements ORDER BY run, name, step",
        "SELECT * FROM hypotheses",
    ]
    with folders.existing(Path(folder)) as run:
        return [run.store.database.execute(query).fetchall() for query in queries]


def stored_manifest(folder):
    return json.loads((Path(folder) / folders.MANIFEST).read_text())


def launched(errors):
    return set(re.findall(r"^(\S+): job \d+$", errors, re.MULTILINE))


def test_a_launched_run_measures_what_the_run_without_jobs_does_and_the_same_command_what_a_killed_job_left(capsys):
    assert main([*GRID, "--out", "plain"]) == 0
    shown = capsys.readouterr().out
    Path("deadly-A").touch()
    assert main([*GRID, "--out", "run", "--launch", "local:2"]) == 1
    errors = capsys.readouterr().err
    assert launched(errors) == {"coin", "grid-1", "grid-2"}
    assert len(re.findall(r"^\S+: finished in \d+\.\d s, [12] records$", errors, re.MULTILINE)) == 2
    assert len(re.findall(r"^grid-1: job (\d+) failed: /.*/run/jobs/\w+/\1_0_log\.err$", errors, re.MULTILINE)) == 1
    assert errors.endswith("\nrun: grid-1 failed, all else is kept; the same command does the rest\n")
    with folders.existing(Path("run")) as run:
        assert run.store.finished().keys() == {"coin"}
        assert not run.store.records("grid")

    Path("deadly-A").unlink()
    assert main([*GRID, "--out", "run", "--launch", "local:1"]) == 0
    printed = capsys.readouterr()
    assert printed.out == shown.replace("plain", "run")
    assert printed.err.startswith("finished before, kept as it is: coin, grid-2\n")
    assert launched(printed.err) == {"grid-1"}
    assert tables("run") == tables("plain")
    for name in ("config", "source", "versions", "device", "numerics", "data"):
        assert stored_manifest("run")[name] == stored_manifest("plain")[name]
    assert stored_manifest("run")["seconds"].keys() == {"coin", "grid"}

    assert main([*GRID, "--out", "run", "--launch", "local:9"]) == 0
    assert capsys.readouterr().err == "finished before, kept as it is: coin, grid\n"


# ---- Parts without jobs: each is a run, and a run in its place is taken for it


@pytest.fixture
def parts(capsys):
    """A launched run that has no study merged yet, and two finished parts."""
    with folders.create(Path("run"), manifest.describe(config.load(Path(COIN), GRID[3::2]), None)):
        pass
    for name, override in [("coin", "coin.seed=7"), ("grid-1", "grid.arms=['A']"), ("grid-2", "grid.arms=['B']")]:
        text = tiny_studies.COIN if name == "coin" else 'backend = "cpu"\n[grid]\narms = []\nseeds = [1]'
        Path("configs/part.toml").write_text(text, encoding="utf-8")
        assert main(["run", "configs/part.toml", "--set", override, "--out", f"run/parts/{name}"]) == 0
    capsys.readouterr()
    return Path("run/parts")


LAUNCH = [*GRID, "--out", "run", "--launch", "local:1"]


def test_parts_of_two_devices_are_not_merged(capsys, parts):
    changed = stored_manifest(parts / "grid-2")
    changed["device"]["kind"] = "abacus"
    (parts / "grid-2" / folders.MANIFEST).write_text(json.dumps(changed))
    assert main(LAUNCH) == 2
    errors = capsys.readouterr().err
    line = "run/parts/grid-2: expected device {.*'cpu'.*}, got {.*'abacus'.*}; remove the folder to measure it again\n"
    assert re.fullmatch(rf"finished before, .*\n{line}", errors)
    assert tables("run") == [[], [], [], []]


def test_parts_of_other_code_are_not_merged(capsys, parts):
    changed = stored_manifest(parts / "coin") | {"source": "other"}
    (parts / "coin" / folders.MANIFEST).write_text(json.dumps(changed))
    assert main(LAUNCH) == 2
    assert "\nrun/parts/coin: expected source " in capsys.readouterr().err


def test_parts_that_describe_two_records_alike_are_not_merged(parts, monkeypatch):
    grid = studies.load("grid")
    monkeypatch.setattr(grid, "parts", lambda config: [config, config])
    shutil.copytree(parts / "grid-1", parts / "grid-2", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="two records have the settings"):
        main(LAUNCH)
    assert tables("run")[0] == [("coin",)]


def test_a_launched_run_has_a_report_before_anything_is_finished(capsys, parts):
    assert main(["report", "run"]) == 0
    assert "Not finished, and not shown: coin, grid." in Path("run/report.html").read_text()


# ---- Ends


def job_processes():
    """Those of submitit that work in this folder: the jobs and what watches over each."""
    commands = {path.parent.name: path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")}
    return [pid for pid, text in commands.items() if b"submitit" in text and str(Path.cwd()).encode() in text]


def test_ctrl_c_ends_the_jobs():
    Path("configs/endless.toml").write_text('backend = "cpu"\n[endless]\ninside = "execution"\n')
    command = [
        sys.executable,
        "-m",
        "experiments",
        "run",
        "configs/endless.toml",
        "--out",
        "run",
        "--launch",
        "local:1",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, start_new_session=True)
    tiny_studies.wait_until(Path("run/parts/endless/results.sqlite").exists)
    assert len(job_processes()) == 2
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, errors = process.communicate(timeout=tiny_studies.PATIENCE)
    assert process.returncode == 130
    first, last = errors.splitlines()
    assert re.fullmatch(r"endless: job \d+", first)
    assert last == "interrupted: the jobs are ended, what is finished is in run; the same command does the rest"
    assert out == ""
    tiny_studies.wait_until(lambda: job_processes() == [])


def launch(calls, number):
    return jobs.ended(calls, Path("logs"), jobs.Target("local", number), OnInterrupt())


def test_what_a_killed_job_leaves_behind_ends():
    def orphan():
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)

    assert [name for name, _ in launch({"orphan": orphan}, 1)] == ["orphan"]
    tiny_studies.wait_until(lambda: job_processes() == [])


def test_an_error_is_in_the_log():
    def err():
        raise ValueError("a mistake in the study")

    ((_, job),) = launch({"err": err}, 1)
    assert job.paths.stderr.read_text().endswith("\nValueError: a mistake in the study\n")


def test_no_job_outlives_an_error():
    calls = {"short": lambda: None, "long": lambda: time.sleep(600)}
    with contextlib.closing(launch(calls, 2)) as ended:
        assert next(ended)[0] == "short"
        tiny_studies.wait_until(lambda: len(job_processes()) == 2)
    tiny_studies.wait_until(lambda: job_processes() == [])


# ---- Places


@pytest.mark.parametrize("text", ["foo", "", "local", "local:", "local:0", "local:-1", "local:two", "slurm:0", "Slurm"])
def test_a_place_that_is_none_is_one_line(capsys, text):
    before = tiny_studies.tree()
    assert main([*GRID, "--launch", text]) == 2
    line = f'--launch: expected local:N, slurm or slurm:N for N jobs at a time, got "{text}"\n'
    assert capsys.readouterr().err == line
    assert tiny_studies.tree() == before


def test_what_a_launch_takes_and_is_missing_is_one_line(capsys, monkeypatch):
    before = tiny_studies.tree()
    assert main([*GRID, "--launch", "local:2", "--out", "50%a"]) == 2
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main([*GRID, "--launch", "local:2"]) == 2
    monkeypatch.setenv("PATH", "")
    assert main([*GRID, "--launch", "slurm"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "50%a: expected a path without %, which submitit takes for the number of a job",
        '--launch: expected the library submitit, got none; pip install -e ".[study]" brings it',
        "--launch: slurm is not available here: there is no command sbatch",
    ]
    assert tiny_studies.tree() == before


@pytest.mark.parametrize("gpus", [None, "1,3"])
def test_a_local_job_sees_the_gpus_that_the_command_sees(monkeypatch, gpus):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if gpus is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)

    def tell():
        Path("seen").write_text(json.dumps(os.environ.get("CUDA_VISIBLE_DEVICES")))

    assert [name for name, _ in launch({"tell": tell}, 1)] == ["tell"]
    assert json.loads(Path("seen").read_text()) == gpus


# ---- Slurm

MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "squeue") if shutil.which(name) is None]
CLUSTER = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=loopback Nodes=ALL Default=YES
"""


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture
def slurm(monkeypatch):
    """A cluster of one node, this machine, that nobody else can reach."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)  # munge wants its socket open to all
        (folder / "key-file").write_bytes(os.urandom(1024))
        (folder / "key-file").chmod(0o400)
        host, user, ports = socket.gethostname().split(".")[0], pwd.getpwuid(os.getuid()).pw_name, free_ports(2)
        (folder / "slurm.conf").write_text(CLUSTER.format(host=host, user=user, ports=ports, folder=folder))
        monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        places = [f"--{each}={folder / each}" for each in ("socket", "key-file", "pid-file", "log-file", "seed-file")]
        for command in (["munged", "--foreground", *places], ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
            log = stack.enter_context((folder / f"{command[0]}.out").open("w"))
            daemon = stack.enter_context(subprocess.Popen(command, stdout=log, stderr=log))
            stack.callback(daemon.terminate)
        tiny_studies.wait_until(lambda: "idle" in subprocess.run(["sinfo"], capture_output=True, text=True).stdout)
        yield


@pytest.mark.slow  # what is common to all places is tested with processes of this machine
@pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed (Debian: munge, slurmctld, slurmd)")
def test_jobs_of_slurm_measure_what_the_run_without_jobs_does(capsys, monkeypatch, slurm):
    assert main([*GRID, "--out", "plain"]) == 0
    Path("deadly-A").touch()
    capsys.readouterr()
    assert main([*GRID, "--out", "run", "--launch", "slurm"]) == 1
    errors = capsys.readouterr().err
    assert launched(errors) == {"coin", "grid-1", "grid-2"}
    assert re.search(r"^grid-1: job (\d+) failed: .*/\1_0_log\.err$", errors, re.MULTILINE)
    assert errors.endswith("\nrun: grid-1 failed, all else is kept; the same command does the rest\n")
    Path("deadly-A").unlink()

    assert main([*GRID, "--out", "run", "--launch", "slurm:1"]) == 0
    assert launched(capsys.readouterr().err) == {"grid-1"}
    assert tables("run") == tables("plain")

    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
    assert main([*GRID, "--out", "other", "--launch", "slurm"]) == 2
    assert re.fullmatch(r"--launch: sbatch: error: .*partition.*\n", capsys.readouterr().err)
