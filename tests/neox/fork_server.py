"""A fork server for GPT-NeoX's programs: one process imports GPT-NeoX, and forks for each start.

A training starts at least three processes (`deepy.py`, DeepSpeed's launcher, the ranks), and each
spends 4 to 6 s on imports. `ForkServer.python` is an executable that stands for `sys.executable`:
it hands its arguments, environment, working directory, input and output to the server, passes
signals on, and ends as the forked process ends. In that process `sys.executable` is the same
executable, so the processes that it starts are forked too. The server is never changed by what the
forks do.

Not for tests that kill processes or look at their family. A server that GPUs are hidden from serves
trainings on the CPU, another one those on GPUs: it imports, and leaves CUDA to the forks.
"""

from __future__ import annotations

import atexit
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

# The executable. -S and -E leave out what its start does not need.
CLIENT = """#!{python} -SE
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
job = dict(argv=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))
socket.send_fds(server, [b"x"], [0, 1, 2])
server.sendall(json.dumps(job).encode() + b"\\n")
answers = server.makefile()
pid = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
code = int(answers.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""

# The first argument after these is a name that the plugin looks for in a rank's parent.
SERVER = """
import atexit, gc, json, os, runpy, selectors, signal, socket, sys, threading, traceback
import deepspeed.launcher.runner, megatron.training, megatron.text_generation_utils
import torch._dynamo  # the first optimizer imports it, which takes 2 s

def accept(listener, events, children):
    connection, _ = listener.accept()
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    job = json.loads(connection.makefile().readline())
    if (pid := os.fork()) == 0:
        events.close()
        listener.close()
        return job, files
    for file in files:
        os.close(file)
    connection.sendall(b"%d\\n" % pid)
    ended = os.pidfd_open(pid)
    children[ended] = children[connection] = (pid, ended, connection)
    events.register(ended, selectors.EVENT_READ)
    events.register(connection, selectors.EVENT_READ)

def serve(address):
    listener, events, children = socket.socket(socket.AF_UNIX), selectors.DefaultSelector(), {}
    listener.bind(address)
    listener.listen(64)
    events.register(listener, selectors.EVENT_READ)
    events.register(sys.stdin, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in events.select():
            file = key.fileobj
            if file is sys.stdin:  # the tests are over
                os._exit(0)
            if file is listener:
                if job := accept(listener, events, children):
                    return job
            elif file in children:
                pid, ended, connection = children[file]
                if file is connection:  # the client was killed
                    os.kill(pid, signal.SIGKILL)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                for other in (ended, connection):
                    events.unregister(other)
                    del children[other]
                try:
                    connection.sendall(b"%d\\n" % code)
                except OSError:
                    pass
                connection.close()
                os.close(ended)

if torch.cuda.is_initialized():
    sys.exit("importing GPT-NeoX has initialized CUDA, which a fork cannot use")
gc.collect()
gc.freeze()  # or collections in the forks would copy all memory
job, files = serve(sys.argv[1])
sys.executable = sys.argv[2]
for target, file in enumerate(files):
    os.dup2(file, target)
    os.close(file)
sys.stdin = open(0, closefd=False)
sys.stdout.reconfigure(line_buffering=True, write_through=True)
os.environ.clear()
os.environ.update(job["environment"])
os.chdir(job["folder"])
added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
sys.path[1:1] = [path for path in added if path and path not in sys.path]
arguments = [argument for argument in job["argv"] if argument != "-u"]
code = 0
try:
    if arguments[0] == "-m":
        sys.path[0], sys.argv = job["folder"], arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.path[0], sys.argv = job["folder"], ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.abspath(arguments[0])), arguments
        runpy.run_path(arguments[0], run_name="__main__")
except SystemExit as end:
    code = end.code if isinstance(end.code, int) else int(end.code is not None)
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
except BaseException:
    traceback.print_exc()
    code = 1
# Does what Python does at its end, without freeing the memory piece by piece.
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""

_servers: dict[tuple[Path, bool], ForkServer] = {}


class ForkServer:
    """A process that has imported the GPT-NeoX of a linked checkout.

    Attributes:
        python: the executable that stands for `sys.executable`.
    """

    def __init__(self, checkout: Path, on_gpus: bool):
        folder = tempfile.TemporaryDirectory(prefix="neox")
        self.python = Path(folder.name) / "forked"
        address = f"{folder.name}/socket"
        self.python.write_text(CLIENT.format(python=sys.executable, address=address))
        self.python.chmod(self.python.stat().st_mode | stat.S_IXUSR)
        self.log = Path(folder.name) / "log"
        hidden = {} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER, address, self.python, "deepspeed.launcher.launch"],
                cwd=checkout,
                env={**os.environ, "OMP_NUM_THREADS": "1", **hidden},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        for line in self.process.stdout:
            if line == "ready\n":
                break
        else:
            raise RuntimeError(self.log.read_text()[-6000:])
        self._folder = folder

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
        self._folder.cleanup()


def fork_server(checkout: Path, on_gpus: bool = False) -> ForkServer:
    """Returns the server of a linked checkout, started when it is first asked for."""
    key = checkout, on_gpus
    if key not in _servers:
        _servers[key] = ForkServer(checkout, on_gpus)
        atexit.register(_servers[key].close)
    return _servers[key]
