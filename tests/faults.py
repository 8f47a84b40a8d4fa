"""The long fault test: kill -9 at random moments, resume, and compare with the undisturbed run, byte for byte.

  python tests/faults.py --kills 50

Also measures a merge of 50,000 × 64 × 64 × 3 samples, and what the store costs. Not run by `make test`.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from guided_diffusion.runs.sample_store import SampleStore, Shard

ROOT = Path(__file__).parent.parent
SHARDS = 24


def command(folder, ranks=1):
    flags = {
        "config": ROOT / "configs" / "emoji.yaml", "timestep_respacing": 4, "num_samples": 2 * SHARDS, "batch_size": 2,
        "out_dir": folder,
    }  # fmt: skip
    words = [str(part) for key, value in flags.items() for part in (f"--{key}", value)]
    launcher = [] if ranks == 1 else [str(Path(sys.executable).parent / "mpiexec"), "-n", str(ranks)]
    return [*launcher, sys.executable, str(ROOT / "scripts" / "image_sample.py"), *words]


def start(folder, ranks):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        command(folder, ranks), stdin=quiet, stdout=quiet, stderr=quiet, env=environment, start_new_session=True
    )


def result(folder):
    [path] = Path(folder).glob("samples_*.npz")
    return path.read_bytes()


def kill_and_resume(folder, kills, seed):
    chance = random.Random(seed)
    whole = folder / "whole"
    started = time.monotonic()
    assert start(whole, 1).wait() == 0
    seconds = time.monotonic() - started
    done = 0
    rounds = 0
    while done < kills:
        broken = folder / f"broken{rounds}"
        rounds += 1
        while done < kills:
            ranks = chance.choice([1, 1, 1, 2])
            process = start(broken, ranks)
            try:
                process.wait(timeout=chance.uniform(0.3, 1.0) * seconds)
                break  # it came to its end
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                subprocess.run(["pkill", "-9", "-f", str(broken)], check=False)
                done += 1
        while start(broken, 1).wait() != 0:
            time.sleep(0.5)
        assert result(broken) == result(whole), f"{broken} differs"
        left = [path for path in broken.rglob(".*") if path.name != ".lock"]
        print(f"{done} kills, {rounds} runs, byte-identical; {len(left)} temporary files left by kill -9", flush=True)


def merge_memory(folder):
    store = SampleStore(str(folder / "big"), {}, 50_000, 1000, (64, 64, 3), labelled=True)
    chance = np.random.RandomState(0)
    for number in store.shards:
        count = len(store.indices(number))
        images = chance.randint(0, 256, (count, 64, 64, 3), dtype=np.uint8)
        store.write(number, Shard(images, chance.randint(0, 1000, count), 1.0))
    code = (
        "import resource, sys; from guided_diffusion.runs.sample_store import SampleStore; "
        f"SampleStore({store.folder!r}, {{}}, 50_000, 1000, (64, 64, 3), True).merge(); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    size = os.path.getsize(store.samples_path)
    peak = int(done.stdout) / 1024
    print(
        f"merge of 50,000 × 64 × 64 × 3 ({size / 1e6:.0f} MB): {time.monotonic() - started:.1f} s, peak {peak:.0f} MB"
    )
    assert peak < 400


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults"))
    try:
        merge_memory(folder)
        kill_and_resume(folder, args.kills, args.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"all well; this process used {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
