"""Killed at every file operation, does a run still end with the same bits? `python experiments/kills.py`

A small run on the small world with both perturbations is killed (the process ends at once, no handler runs)
just before its 1st, 2nd, 3rd ... file operation in its folder: a file opened, flushed to the disk (then half
of it is lost), renamed, a folder made. Then the same command is given once more. It must not be refused, and
must end with the log, the adapters and the pictures of a run that nobody killed. All of it twice: for a new
run, and for one that goes on. Then two processes by torchrun, of which one is killed. About four minutes on
2 CPU cores; exit code 1 unless all ends well. Needs os.fork.
"""
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rsaft  # noqa: E402, found through the line above

FLAGS = ["--tiny", "--sam", "--noise", "--sampling-steps", "2", "--batch-size", "2", "--eval-images", "2",
         "--eval-every", "1", "--rank", "2", "--eval-reward", "judge"]
KILLED = 9


def story(out):
    """What must be the same: {file: content}, without the checkpoint and what a clock says."""
    contents = {str(path.relative_to(out)): path.read_bytes()
                for path in sorted(out.rglob("*")) if path.is_file()}
    log = [json.loads(line) for line in contents.pop("log.jsonl").decode().splitlines()]
    for name in "checkpoint.pt", "config.json":
        del contents[name]
    return contents, [{name: value for name, value in line.items() if name != "seconds"} for line in log]


def run(loaded, out, steps, die_at=None):
    """A run in a process of its own, dying just before that file operation.

    Returns (exit code, operations so far).
    """
    counter = Path(f"{out}.count")
    child = os.fork()
    if child == 0:
        for descriptor in 1, 2:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        done = 0

        def operation(descriptor=None):
            nonlocal done
            done += 1
            if done == die_at:
                if descriptor is not None:
                    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                os._exit(KILLED)

        def watch(event, arguments):
            if event in ("open", "os.rename", "os.mkdir") and str(out) in str(arguments[0]) and not (
                    event == "open" and "r" in (arguments[1] or "r")):
                operation()

        def flush(descriptor, fsync=os.fsync):
            operation(descriptor)
            fsync(descriptor)

        sys.addaudithook(watch)
        os.fsync = flush
        rsaft.load = lambda settings: copy.deepcopy(loaded)         # loaded once, by the process that forks
        code = rsaft.main([*FLAGS, "--train-steps", str(steps), "--out", str(out)])
        counter.write_text(str(done))
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, int(counter.read_text()) if code == 0 else None


def every_operation(loaded, folder, begun=None):
    """Kill a run of 2 updates at each of its operations; with a folder `begun`, one that goes on there."""
    expected, out = folder / "whole", folder / "killed"
    count = 1
    while True:
        shutil.rmtree(out, ignore_errors=True)
        if begun:
            shutil.copytree(begun, out)
        code, operations = run(loaded, out, 2, die_at=count)
        if code != KILLED:
            assert code == 0 and operations < count, code
            return count - 1
        code, _ = run(loaded, out, 2)
        assert code == 0, f"after a kill at operation {count} the same command ended with exit code {code}"
        assert story(out) == story(expected), f"after a kill at operation {count} the run ended otherwise"
        count += 1


def finish(command):
    """Run a command that should succeed; if it doesn't, what it said is in the AssertionError."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, f"exit code {result.returncode}:\n{result.stdout}"


def two_processes(folder):
    """One of two processes is killed after the first update; the same command goes on."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(rsaft.HERE / "rsaft.py"), *FLAGS, "--micro-batch-size", "1", "--train-steps", "6", "--out"]
    finish([*command, folder / "two"])
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([*command, folder / "parted"], **quiet)
    while process.poll() is None and not ((folder / "parted" / "log.jsonl").is_file() and
                                          "grad_norm" in (folder / "parted" / "log.jsonl").read_text()):
        time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert process.wait() != 0
    finish([*command, folder / "parted"])
    assert story(folder / "parted") == story(folder / "two")


def main():
    torch.set_num_threads(1)            # threads don't survive a fork
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = rsaft.check(rsaft.parse([*FLAGS, "--out", str(folder / "none")]))
        loaded = rsaft.load(settings)
        assert run(loaded, folder / "whole", 2)[0] == 0 == run(loaded, folder / "begun", 1)[0]
        for what, begun in ("a new run", None), ("one that goes on", folder / "begun"):
            killed = every_operation(loaded, folder, begun)
            print(f"{what}: killed at {killed} operations, always the same end", flush=True)
        two_processes(folder)
        print("two processes, one of them killed: the same end")


if __name__ == "__main__":
    main()
