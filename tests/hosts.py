"""Jobs over several machines, and their faults; a machine is a network, UTS and mount namespace here (Linux, root).

  python tests/hosts.py                                      every scenario, about 20 minutes
  python tests/hosts.py --only killed,torchrun --tries 3     those whose name has all of these words

Each job must end within two minutes, with the samples of one process or with a sentence and a status that is not 0, and
one process must then go on to the same bytes. Prints a table: fault, tries, ended well, silent wrong results.
"""

import argparse
import contextlib
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
NAMES = ("node1", "node2", "node3")
WORKER = re.compile(r"\S*python\S* (-u )?\S*hosts\.py sample ")
SHARDS = 10
LIMIT_S = 120
ENTER = """#!/bin/sh
# As ssh: a host's name and a command.
[ "$1" = -x ] && shift
host=$1; shift
exec nsenter --net=/run/netns/{prefix}$host unshare --uts --mount \\
    sh -c 'hostname "$(cat {folder}/$0.name)" && mount --bind {folder}/$0.hosts /etc/hosts && eval "$*"' $host "$@"
"""


def can_be_made():
    """Whether this process may make namespaces."""
    tools = all(shutil.which(tool) for tool in ("ip", "nsenter", "unshare"))
    return (
        tools and os.geteuid() == 0 and subprocess.run(["unshare", "--net", "--uts", "--mount", "true"]).returncode == 0
    )


class Hosts:
    """Machines node1, node2, … on one switch, and the processes of a job on them."""

    def __init__(self, folder, count):
        self.folder, self.names = Path(folder), NAMES[:count]
        self.prefix = f"sag{os.getpid()}"
        self.jobs, self.logs = [], []

    def __enter__(self):
        self._ip("netns", "add", f"{self.prefix}switch")
        self._ip("-n", f"{self.prefix}switch", "link", "add", "switch", "type", "bridge")
        self._ip("-n", f"{self.prefix}switch", "link", "set", "switch", "up")
        for number, name in enumerate(self.names, 1):
            there = f"{self.prefix}{name}"
            self._ip("netns", "add", there)
            self._ip(
                "-n",
                there,
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                "name",
                name,
                "netns",
                f"{self.prefix}switch",
            )
            self._ip("-n", there, "address", "add", f"10.99.0.{number}/24", "dev", "eth0")
            self._ip("-n", there, "link", "set", "eth0", "up")
            self._ip("-n", there, "link", "set", "lo", "up")
            self._ip("-n", f"{self.prefix}switch", "link", "set", name, "master", "switch", "up")
            self.rename(name, name)
            self.resolve(name, "".join(f"10.99.0.{n} {other}\n" for n, other in enumerate(self.names, 1)))
        self.enter = self.folder / "enter"
        self.enter.write_text(ENTER.format(prefix=self.prefix, folder=self.folder))
        self.enter.chmod(0o755)
        return self

    def __exit__(self, *_error):
        for name in self.names:
            self.signal(name, signal.SIGKILL)
        for _, job in self.jobs:
            job.kill()
            job.wait()
        for name in (*self.names, "switch"):
            self._ip("netns", "delete", f"{self.prefix}{name}")

    def _ip(self, *words):
        subprocess.run(["ip", *words], check=True)

    def rename(self, name, known_as):
        """What a host calls itself."""
        (self.folder / f"{name}.name").write_text(known_as)

    def resolve(self, name, lines):
        """What a host's /etc/hosts says beside itself."""
        (self.folder / f"{name}.hosts").write_text("127.0.0.1 localhost\n" + lines)

    def link(self, name, state):
        """Plug a host's cable in (up) or out (down), at the switch."""
        self._ip("-n", f"{self.prefix}switch", "link", "set", name, state)

    def processes(self, name):
        """The processes of a host and their command lines."""
        there = os.stat(f"/run/netns/{self.prefix}{name}").st_ino
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if os.stat(path / "ns" / "net").st_ino == there:
                    found[int(path.name)] = line
            except OSError:
                continue
        return found

    def workers(self, name):
        """The processes of a host that sample."""
        return [pid for pid, line in self.processes(name).items() if WORKER.match(line)]

    def signal(self, name, number):
        """To all processes of a host."""
        send(self.processes(name), number)

    def start(self, name, command, **more):
        """A command on a host; what it says goes to `said`."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PMI", "OMPI", "MPI"))}
        environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)} | more
        log = open(self.folder / f"log{len(self.logs)}", "w+")  # noqa: SIM115
        words = [str(self.enter), name, " ".join(map(str, command))]
        job = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=ROOT)
        self.jobs.append((name, job))
        self.logs.append(log)
        return job

    def ended(self, name):
        """Whether what was started on a host has ended."""
        return all(job.poll() is not None for where, job in self.jobs if where == name)

    def said(self):
        """What was said by each job."""
        return [Path(log.name).read_text() for log in self.logs]

    def mpiexec(self, command, ranks=None):
        launcher = Path(sys.executable).parent / "mpiexec"
        hosts = ["-launcher", "ssh", "-launcher-exec", self.enter, "-hosts", ",".join(self.names)]
        hosts += ["-localhost", "10.99.0.1"]  # hydra's own need of names is none of ours
        return self.start(self.names[0], [launcher, *hosts, "-n", ranks or len(self.names), *command])

    def torchrun(self, command, restarts=0):
        for name in self.names:
            flags = ["--nnodes", len(self.names), "--nproc_per_node", 1, "--max-restarts", restarts]
            flags += ["--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", f"{self.names[0]}:29511"]
            self.start(name, [sys.executable, "-m", "torch.distributed.run", *flags, *command[1:]])

    def by_hand(self, command, late=0):
        """As Kubernetes or a batch script starts ranks; rank 0 so many seconds after the others."""
        for rank, name in sorted(enumerate(self.names), reverse=True):
            time.sleep(0 if rank else late)
            told = {"RANK": rank, "WORLD_SIZE": len(self.names), "MASTER_ADDR": self.names[0], "MASTER_PORT": 29512}
            self.start(name, command, **{key: str(value) for key, value in told.items()})


def tiny(folder):
    """Flags of a run of a 16×16 network."""
    from guided_diffusion.script_util import create_model_and_diffusion
    from small import SMALL, randomised

    torch.manual_seed(0)
    path = Path(folder) / "tiny.pt"
    torch.save(randomised(create_model_and_diffusion(**SMALL)[0]).state_dict(), path)
    return SMALL | {"model_path": path, "batch_size": 2, "num_samples": 2 * SHARDS}


def sampling(flags, seconds, merging=0, **more):
    """The command of a run whose steps take so many seconds longer, and its merge."""
    words = [str(word) for key, value in (flags | more).items() for word in (f"--{key}", value)]
    return [sys.executable, str(Path(__file__).resolve()), "sample", str(seconds), str(merging), *words]


def alone(flags, out):
    """The same run, or the rest of it, by one process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(sampling(flags, 0, out_dir=out), capture_output=True, text=True, cwd=ROOT, env=environment)


def sample_slowly(seconds, merging, argv):
    """scripts/image_sample.py with sleep."""
    from guided_diffusion.runs.progress import Progress
    from guided_diffusion.runs.sample_store import SampleStore

    add, merge = Progress.add, SampleStore.merge

    def slow_add(self, image_steps):
        add(self, image_steps)
        time.sleep(seconds if image_steps else 0)

    def slow_merge(self):
        found = merge(self)
        time.sleep(merging)
        return found

    Progress.add, SampleStore.merge = slow_add, slow_merge
    sys.argv = ["image_sample.py", *argv]
    runpy.run_path(str(ROOT / "scripts" / "image_sample.py"), run_name="__main__")


def send(pids, number):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def until(happened: Callable[[], bool], seconds=LIMIT_S):
    """Whether something happened within so many seconds."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def shards(folder):
    return len(list(Path(folder).glob("shards/shard_*.npz")))


def result(folder):
    """The bytes of a run's samples, None if they are not there."""
    found = list(Path(folder).glob("samples_*.npz"))
    return found[0].read_bytes() if found else None


def killed(hosts, out):
    """kill -9 of a worker."""
    until(lambda: shards(out) >= 2)
    send(hosts.workers(hosts.names[-1]), signal.SIGKILL)


def lost(hosts, out, name=None):
    """A machine that is there no more, and closes no connection."""
    until(lambda: shards(out) >= 2)
    hosts.link(name or hosts.names[-1], "down")
    hosts.signal(name or hosts.names[-1], signal.SIGSTOP)


def store_lost(hosts, out):
    """The machine of rank 0 and of the store."""
    lost(hosts, out, hosts.names[0])


def store_killed(hosts, out):
    """kill -9 of rank 0."""
    until(lambda: shards(out) >= 2)
    send(hosts.workers(hosts.names[0]), signal.SIGKILL)


def cut(hosts, out, seconds=None):
    """A link that is down for so many seconds, or for ever."""
    until(lambda: shards(out) >= 2)
    hosts.link(hosts.names[-1], "down")
    if seconds:
        time.sleep(seconds)
        hosts.link(hosts.names[-1], "up")


def cut_30(hosts, out):
    cut(hosts, out, 30)


def stopped_40(hosts, out):
    """SIGSTOP of a worker for 40 s."""
    until(lambda: shards(out) >= 2)
    send(hosts.workers(hosts.names[-1]), signal.SIGSTOP)
    time.sleep(40)
    send(hosts.workers(hosts.names[-1]), signal.SIGCONT)


def killed_at_the_end(hosts, out):
    """kill -9 of a worker when all samples are merged."""
    until(lambda: result(out) is not None)
    send(hosts.workers(hosts.names[-1]), signal.SIGKILL)


def lost_at_the_end(hosts, out):
    until(lambda: result(out) is not None)
    lost(hosts, out)


def killed_twice(hosts, out):
    """kill -9 of a worker, and after the restart of rank 0."""
    killed(hosts, out)
    time.sleep(8)
    send(hosts.workers(hosts.names[0]), signal.SIGKILL)


def nothing(_hosts, _out):
    """No fault."""


def one_name(hosts, _out):
    """All machines have one name, as containers may, which leads each to itself, as RedHat's /etc/hosts did."""
    for name in hosts.names:
        hosts.rename(name, "same")
        hosts.resolve(name, "127.0.0.1 localhost.localdomain same\n")


def no_names(hosts, _out):
    """No machine's name is known to another."""
    for name in hosts.names:
        hosts.rename(name, f"inner-{name}")
        hosts.resolve(name, "")


def run(folder, flags, whole, launch, fault, count=2, seconds=0.15, merging=0, patience=None, prepare=nothing):
    """One job and its fault: (whether it ended well, what it did in a few words, whether it is silently wrong)."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    out = folder / "out"
    more = {"out_dir": out} | ({"patience": patience} if patience else {})
    with Hosts(folder, count) as hosts:
        prepare(hosts, out)
        began = time.monotonic()
        launch(hosts, sampling(flags, seconds, merging, **more))
        fault(hosts, out)
        faulted = time.monotonic()
        gone = {"lost": hosts.names[-1], "lost_at_the_end": hosts.names[-1], "store_lost": hosts.names[0]}
        left = [name for name in hosts.names if name != gone.get(fault.__name__)]
        worked = faulted if shards(out) else None  # None: no worker has begun

        def ended():
            nonlocal worked
            if any(hosts.workers(name) for name in left):
                worked = time.monotonic()
                return False
            # torchrun waits for minutes for a lost machine, when its own workers have ended.
            waited = worked and time.monotonic() - worked > (20 if result(out) is None else 4)
            return waited or all(hosts.ended(name) for name in left)

        in_time = until(ended)
        took = (worked or time.monotonic()) - faulted
        time.sleep(1)
        codes = [job.poll() for _, job in hosts.jobs]
        said = hosts.said()
    sentences = sorted(
        {line for text in said for line in text.splitlines() if line.startswith(("error:", "rank ", "all is"))}
    )
    ours = [f'File "{ROOT}/{folder}/' for folder in ("guided_diffusion", "evaluations")]  # torch may lie below ROOT too
    tracebacks = sum(place in text for place in ours for text in said)
    made = result(out)
    wrong = made is not None and made != whole
    unheard = fault is store_lost and launch is Hosts.mpiexec  # what a terminal would show is lost with its machine
    refused = 0 not in codes and (bool(sentences) or unheard)
    well = in_time and not wrong and (made is not None or refused) and not tracebacks
    resumed = "not needed"
    if made is None:
        again = alone(flags, out)
        resumed = "byte-identical" if result(out) == whole else f"DIFFERS {again.stderr[-300:]}"
        well, wrong = well and result(out) == whole, wrong or (again.returncode == 0 and result(out) != whole)
    words = (
        f"{took:.0f} s after the fault ({faulted - began:.0f}), status {codes}, {'whole' if made else 'no'} samples; "
    )
    words += f"resumed: {resumed}; {sentences}"
    if not well:
        words += "\n" + "\n".join(f"--- log {n}\n{text[-3000:]}" for n, text in enumerate(said))
    return well, words, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--tries", type=int, default=1)
    args = parser.parse_args()
    if not can_be_made():
        sys.exit("hosts are namespaces: wanted Linux, root, ip, nsenter and unshare")
    by = {"mpiexec": Hosts.mpiexec, "torchrun": Hosts.torchrun, "by hand": Hosts.by_hand}
    scenarios = {}
    for name, launch in by.items():
        for count in (2, 3):
            scenarios[f"{count} hosts, {name}"] = {"launch": launch, "fault": nothing, "count": count, "seconds": 0}
        for fault in (killed, store_killed, lost, store_lost, cut, cut_30, stopped_40):
            scenarios[f"{fault.__name__}, {name}"] = {"launch": launch, "fault": fault}
        scenarios[f"stopped_40 with patience 10, {name}"] = {"launch": launch, "fault": stopped_40, "patience": 10}
        for fault in (killed_at_the_end, lost_at_the_end):
            scenarios[f"{fault.__name__}, {name}"] = {"launch": launch, "fault": fault, "merging": 5}
    for prepare in (one_name, no_names):
        scenarios[f"{prepare.__name__}, mpiexec"] = {"launch": Hosts.mpiexec, "fault": nothing, "prepare": prepare}
    for fault in (killed, store_killed, killed_twice):
        restarting = partial(Hosts.torchrun, restarts=3)
        scenarios[f"restarts after {fault.__name__}, torchrun"] = {"launch": restarting, "fault": fault}
    late = partial(Hosts.by_hand, late=15)
    scenarios["rank 0 is late, by hand"] = {"launch": late, "fault": nothing}
    folder = Path(tempfile.mkdtemp(prefix="hosts"))
    table = []
    try:
        flags = tiny(folder)
        alone(flags, folder / "whole")
        whole = result(folder / "whole")
        for name, scenario in scenarios.items():
            if not all(word in name for word in args.only.split(",")):
                continue
            ended = [run(folder, flags, whole, **scenario) for _ in range(args.tries)]
            for _well, words, _wrong in ended:
                print(f"{name}: {words}", flush=True)
            table.append((name, args.tries, sum(well for well, *_ in ended), sum(wrong for *_, wrong in ended)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("\n| fault | tries | ended well | silent wrong |\n|---|---|---|---|")
    for row in table:
        print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["sample"]:
        sample_slowly(float(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
    else:
        main()
