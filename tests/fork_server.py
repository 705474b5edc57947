"""Processes that have imported the package already: one server imports it, and forks for each piece of code.

A fresh interpreter takes seconds to import torch and transformers, which a test of what another process does need not
wait for each time. A server has one environment for its whole life, since libraries read it when they are imported.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Done:
    """What a forked process did."""

    returncode: int
    stdout: str
    stderr: str


class ForkServer:
    """A process that imports, then forks.

    Args:
        imports: code that runs once, in whose namespace all else runs.
        env: its environment.
    """

    def __init__(self, imports: str, env: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory()  # what imports write to a relative path is not for the others
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], env=dict(env), cwd=self._folder.name, **pipes)
        self._ask(imports)

    def run(self, code: str, arguments: Sequence[str] = (), cwd: str | os.PathLike[str] | None = None) -> Done:
        """Run code in a process of its own, with ``sys.argv[1:]`` as given."""
        return Done(**self._ask({"code": code, "arguments": list(arguments), "cwd": os.fspath(cwd or os.getcwd())}))

    def _ask(self, question: object) -> dict:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the server of processes has ended"
        return json.loads(answer)

    def close(self) -> None:
        self.process.kill()  # there is nothing to save, and torch takes its time to leave
        self.process.communicate()
        self._folder.cleanup()


class ForkServers:
    """A server for each environment that is asked for."""

    def __init__(self, imports: str) -> None:
        self.imports, self.servers = imports, {}

    def run(
        self,
        code: str,
        arguments: Sequence[str] = (),
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] = os.environ,
    ) -> Done:
        """Run code in a process of its own that was forked from one with that environment."""
        key = frozenset(item for item in env.items() if item[0] != "PYTEST_CURRENT_TEST")
        if key not in self.servers:
            self.servers[key] = ForkServer(self.imports, env)
        return self.servers[key].run(code, arguments, cwd)

    def close(self) -> None:
        for server in self.servers.values():
            server.close()


def _child(code: str, namespace: dict, arguments: Sequence[str], cwd: str, out: Path) -> None:
    """What the fork does: it never returns."""
    status = 1
    try:
        os.chdir(cwd)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(out / name, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.argv[:] = ["-c", *arguments]
        exec(compile(code, "<forked>", "exec"), namespace)
        status = 0
    except SystemExit as left:
        if left.code is not None and not isinstance(left.code, int):
            sys.stderr.write(f"{left.code}\n")
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is not an answer
    namespace = {"__name__": "__main__"}
    exec(json.loads(sys.stdin.readline()), namespace)
    answers.write("{}\n")
    answers.flush()
    for line in sys.stdin:
        question = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            child = os.fork()
            if not child:
                _child(question["code"], namespace, question["arguments"], question["cwd"], Path(folder))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = {name: (Path(folder) / name).read_text() for name in ("stdout", "stderr")}
        answers.write(json.dumps({"returncode": status, **texts}) + "\n")
        answers.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve()
