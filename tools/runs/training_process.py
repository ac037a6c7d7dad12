"""Start trainings as processes, and stop all of them together."""

import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import IO


class Processes:
    """Processes of trainings, each waited for in one of `threads`. Ctrl-C does not reach them directly."""

    def __init__(self, keep_open: IO[str]) -> None:
        """Create none yet.

        Args:
            keep_open: a file whose lock the processes hold too.
        """
        self._keep_open = keep_open
        self._started: list[subprocess.Popen[str]] = []
        self._stopped, self._starting = False, Lock()

    @contextmanager
    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        output: IO[str] | int = subprocess.PIPE,
    ) -> Iterator[subprocess.Popen[str]]:
        """Start a training, and wait for its end after the body of `with`.

        Raises:
            KeyboardInterrupt: all were stopped; the body has run, unless it was too late to start.
        """
        with self._starting:
            if self._stopped:
                raise KeyboardInterrupt
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
                pass_fds=(self._keep_open.fileno(),),
            )
            self._started.append(process)
        try:
            yield process
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.communicate()  # nobody else reads its output now
            raise
        process.wait()
        if self._stopped:
            raise KeyboardInterrupt

    @contextmanager
    def threads(self, at_once: int, say: Callable[[str], None]) -> Iterator[ThreadPoolExecutor]:
        """Yield threads to start trainings in. If the body is interrupted or fails, stop all trainings and say so."""
        with ThreadPoolExecutor(at_once) as threads:
            try:
                yield threads
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self._stop(say)
                raise

    def _stop(self, say: Callable[[str], None]) -> None:
        """Let all trainings save a checkpoint and end; Ctrl-C meanwhile ends them at once."""
        try:
            with self._starting:
                self._stopped = True
            if self._running():
                say("Each training is saving a checkpoint; Ctrl-C now ends them at once, without one.")
            for process in self._running():
                process.send_signal(signal.SIGTERM)
            for process in self._started:
                process.wait()
        except KeyboardInterrupt:
            self._stopped = True
            for process in self._running():
                process.send_signal(signal.SIGINT)  # makes the launch script kill the training
            for process in self._started:
                process.wait()

    def _running(self) -> list[subprocess.Popen[str]]:
        return [process for process in self._started if process.poll() is None]
