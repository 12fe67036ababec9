"""A Slurm of its own on this host: munged, slurmctld and two slurmd, configured in a temporary folder, without a trace.

The nodes n1 and n2 are both this host, and bind tasks to cores unless told otherwise. Needs root, and Debian's munge,
slurmctld and slurmd.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from launcher import watch

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "sinfo")
_START_SECONDS = 60
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
FirstJobId={job}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
TaskPluginParam=Cores
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
KillWait=5
MinJobAge=300
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs={cores} State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs={cores} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Returns why no cluster can be started here, or ""."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: munge slurmctld slurmd slurm-client)"
    return "" if os.geteuid() == 0 else "needs root"


class SlurmCluster:
    """A running Slurm. `environ` is what its clients need; `close` ends every daemon and removes the folder."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-test-", dir="/tmp"))
        self._daemons: list[subprocess.Popen] = []
        self.environ = os.environ | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        folder = self.folder
        for name in ("state", "spool-n1", "spool-n2", "tmp-n1", "tmp-n2"):
            (folder / name).mkdir()
        controller, first, second = _free_ports(3)
        text = _CONFIGURATION.format(
            folder=folder,
            host=socket.gethostname(),
            cores=os.cpu_count(),
            controller=controller,
            first=first,
            second=second,
            # MPICH names its shared memory after job and step, and killed ranks of an earlier test leave theirs behind.
            job=int.from_bytes(os.urandom(3), "big") + 1,
        )
        (folder / "slurm.conf").write_text(text)
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = [f"--{option}={folder}/munge.{suffix}" for option, suffix in files.items()]
        self._daemon("munged", "--foreground", "--force", *munge)
        _wait_for((folder / "munge.socket").exists, "munged", folder)
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D", "-N", "n1")
        self._daemon("slurmd", "-D", "-N", "n2")
        _wait_for(lambda: self.run("sinfo", "-h", "-o", "%D %t").stdout.split() == ["2", "idle"], "slurmd", folder)

    def _daemon(self, *command: str) -> None:
        tests = os.getpid()
        with open(self.folder / "daemons.log", "ab") as log:
            process = subprocess.Popen(
                command,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: watch.die_with_parent(tests),  # a killed test run takes its daemons along
            )
        self._daemons.append(process)

    def run(self, *command: str, timeout: float = 60, **options) -> subprocess.CompletedProcess:
        """Returns what a client says."""
        return subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=timeout, **options)

    def close(self) -> None:
        """Ends jobs, daemons and folder."""
        if len(self._daemons) == 4:
            self.run("scancel", "--quiet", "--signal=KILL", "--user=root")
            self.run("scancel", "--quiet", "--user=root")
            deadline = time.monotonic() + 20
            while self.run("squeue", "-h").stdout.strip() and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _wait_for(condition, what: str, folder: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("*.log")))
            raise AssertionError(f"{what} did not come up within {_START_SECONDS} s:\n{logs}")
        time.sleep(0.1)
