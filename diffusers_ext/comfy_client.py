"""Runs workflows on a local ComfyUI without a browser: start a server, queue a graph, follow it, fetch the pictures.

Only the standard library is needed (and tqdm for progress).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import socket
import struct
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .comfy_graph import Graph, require_nodes, set_prompt, set_values, substitute, to_api


DEFAULT_URL = "http://127.0.0.1:8188"

Progress = Callable[[str, int, int], None]


class ComfyError(RuntimeError):
    """A server that cannot be reached or started, a graph it refuses, or a run that fails; the message is one line."""


class _EventSocket:
    """The receiving half of a WebSocket, enough for the JSON events ComfyUI sends."""

    def __init__(self, url: str, client_id: str):
        parts = urllib.parse.urlsplit(url)
        self._socket = socket.create_connection((parts.hostname, parts.port or 80), timeout=30)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {parts.path}/ws?clientId={client_id} HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._data = b""
        while b"\r\n\r\n" not in self._data:
            self._receive()
        head, self._data = self._data.split(b"\r\n\r\n", 1)
        if b" 101 " not in head.split(b"\r\n", 1)[0]:
            raise ComfyError(f"{url} does not offer ComfyUI's event socket")

    def _receive(self) -> None:
        chunk = self._socket.recv(65536)
        if not chunk:
            raise ComfyError("ComfyUI closed the connection")
        self._data += chunk

    def _take_frame(self) -> tuple[int, bytes] | None:
        """(opcode, payload) of the next complete frame in the buffer."""
        if len(self._data) < 2:
            return None
        length, start = self._data[1] & 127, 2
        if length > 125:
            size, code = (2, ">H") if length == 126 else (8, ">Q")
            if len(self._data) < 2 + size:
                return None
            (length,) = struct.unpack(code, self._data[2 : 2 + size])
            start += size
        if len(self._data) < start + length:
            return None
        opcode, payload = self._data[0] & 15, self._data[start : start + length]
        self._data = self._data[start + length :]
        return opcode, payload

    def events(self, timeout: float) -> Iterator[dict[str, Any]]:
        """Events that arrived, waiting up to `timeout` seconds for the first."""
        self._socket.settimeout(timeout)
        with contextlib.suppress(TimeoutError):
            self._receive()
        while (frame := self._take_frame()) is not None:
            opcode, payload = frame
            if opcode == 1:
                yield json.loads(payload)

    def close(self) -> None:
        self._socket.close()


class ComfyClient:
    """A ComfyUI server over HTTP.

    Args:
        url: Its address, e.g. `"http://127.0.0.1:8188"`.

    Example:
        >>> client = ComfyClient("http://127.0.0.1:8188")  # doctest: +SKIP
        >>> entry = client.run(graph)                      # doctest: +SKIP
        >>> client.save_outputs(entry, "outputs")          # doctest: +SKIP
    """

    def __init__(self, url: str = DEFAULT_URL):
        self.url = url.rstrip("/")
        self.client_id = uuid.uuid4().hex

    def request(self, path: str, body: Any = None, timeout: float = 60.0) -> bytes:
        """The raw answer to a GET, or to a POST of `body` as JSON. Refusals and silence raise `ComfyError`."""
        data = None if body is None else json.dumps(body).encode()
        headers = {} if data is None else {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url + path, data, headers), timeout=timeout
            ) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise ComfyError(_refusal(error.code, error.read())) from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise ComfyError(f"no ComfyUI answers at {self.url} ({reason})") from None

    def get(self, path: str) -> Any:
        """The JSON answer to a GET."""
        return json.loads(self.request(path))

    def object_info(self) -> dict[str, Any]:
        """The server's description of all its nodes."""
        return self.get("/object_info")

    def queue(self, graph: Graph) -> str:
        """Queue an API graph and return its prompt id. A refused graph raises `ComfyError` naming node and input."""
        answer = json.loads(self.request("/prompt", {"prompt": graph, "client_id": self.client_id}))
        dropped = list(_node_errors(answer.get("node_errors")))
        if dropped:
            self.interrupt(answer["prompt_id"])
            raise ComfyError(f"ComfyUI would leave out a part of the graph: {'; '.join(dropped)}")
        return answer["prompt_id"]

    def interrupt(self, prompt_id: str) -> None:
        """Stop a prompt, whether it waits or runs."""
        self.request("/queue", {"delete": [prompt_id]})
        self.request("/interrupt", {"prompt_id": prompt_id})

    def run(self, graph: Graph, *, timeout: float = 3600.0, progress: Progress | None = None) -> dict[str, Any]:
        """Queue an API graph, follow it to its end and return its history entry.

        Args:
            graph: API format.
            timeout: Seconds after which the run is interrupted.
            progress: Called with (node type, step, steps).

        Raises:
            ComfyError: The graph is refused, fails, is interrupted or takes too long.
        """
        try:
            events = _EventSocket(self.url, self.client_id)
        except OSError as error:
            raise ComfyError(f"no ComfyUI answers at {self.url} ({error})") from None
        with contextlib.closing(events):
            prompt_id = self.queue(graph)
            try:
                entry = self._follow(events, prompt_id, graph, time.monotonic() + timeout, progress)
            except KeyboardInterrupt:
                with contextlib.suppress(ComfyError):  # Ctrl-C ends a server started here as well
                    self.interrupt(prompt_id)
                raise
        if entry is None:
            self.interrupt(prompt_id)
            raise ComfyError(f"no result after {timeout:g} s; the run was interrupted")
        _check_status(entry)
        return entry

    def _follow(
        self, events: _EventSocket, prompt_id: str, graph: Graph, end: float, progress: Progress | None
    ) -> dict[str, Any] | None:
        """The history entry of a finished prompt, or None when the time is over."""
        while time.monotonic() < end:
            for event in events.events(timeout=min(1.0, max(end - time.monotonic(), 0.01))):
                data = event.get("data") or {}
                if progress and event["type"] == "progress" and data.get("prompt_id") == prompt_id:
                    node = graph.get(str(data["node"]), {})
                    progress(node.get("class_type", "node"), int(data["value"]), int(data["max"]))
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry and entry.get("status"):
                return entry
        return None

    def save_outputs(self, entry: Mapping[str, Any], folder: str | Path, prefix: str = "") -> list[Path]:
        """Fetch every file a finished run saved into `folder`; previews only where nothing was saved."""
        files = [f for out in entry["outputs"].values() for f in _files(out)]
        files = [f for f in files if f["type"] == "output"] or files
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for file in files:
            query = urllib.parse.urlencode({k: file.get(k, "") for k in ("filename", "subfolder", "type")})
            path = folder / f"{prefix}{Path(file['filename']).name}"
            path.write_bytes(self.request(f"/view?{query}"))
            paths.append(path)
        return paths


def _files(output: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for items in output.values():
        if isinstance(items, list):
            yield from (i for i in items if isinstance(i, dict) and "filename" in i)


def _node_errors(node_errors: Mapping[str, Any] | None) -> Iterator[str]:
    for node_id, error in (node_errors or {}).items():
        for e in error.get("errors", []):
            yield f"node {node_id} ({error.get('class_type')}): {e['message']}: {e['details']}".rstrip(": ")


def _refusal(code: int, answer: bytes) -> str:
    """One line from a refused request."""
    try:
        body = json.loads(answer)
        details = list(_node_errors(body.get("node_errors")))
        error = body.get("error", {})
        first = error.get("message", "") if isinstance(error, dict) else str(error)
        return f"ComfyUI refused the request: {'; '.join(details) or first}"
    except (ValueError, AttributeError, KeyError):
        return f"ComfyUI answered HTTP {code}: {answer[:200].decode(errors='replace')}"


def _check_status(entry: Mapping[str, Any]) -> None:
    """Raise `ComfyError` for a run that did not succeed."""
    events = dict(entry["status"].get("messages", []))
    if "execution_error" in events:
        error = events["execution_error"]
        message = " ".join(error["exception_message"].split())
        kind = error["exception_type"].rsplit(".", 1)[-1]
        raise ComfyError(f"node {error['node_id']} ({error['node_type']}) failed: {kind}: {message}")
    if "execution_interrupted" in events:
        raise ComfyError("the run was interrupted")
    if entry["status"].get("status_str") != "success":
        raise ComfyError(f"the run ended as {entry['status'].get('status_str')!r}")


@dataclass(frozen=True)
class ComfyServer:
    """A running server: its address, process and, where output goes to a file, that file."""

    url: str
    process: Any
    log: Path | None


def _spawn_server(command: Sequence[str], log: Path | None):
    """The one place of this package that starts a process: a ComfyUI the user pointed to."""
    import subprocess

    environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONUNBUFFERED": "1"}
    with contextlib.ExitStack() as stack:
        out = None if log is None else stack.enter_context(log.open("wb"))
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _base_arguments(base: Path, pack: Path | None) -> list[str]:
    """Prepare a folder that holds everything a server reads and writes, with `pack` linked in."""
    for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    if pack is not None:
        link = base / "custom_nodes" / "diffusers-ext"
        link.unlink(missing_ok=True)
        link.symlink_to(pack.resolve(), target_is_directory=True)
    return ["--base-directory", str(base), "--database-url", f"sqlite:///{base}/user/comfyui.db"]


@contextlib.contextmanager
def start_server(
    comfyui: str | Path,
    *,
    base_directory: str | Path | None = None,
    pack: str | Path | None = None,
    port: int | None = None,
    log: str | Path | None = None,
    python: str = sys.executable,
    arguments: Sequence[str] = (),
    timeout: float = 300.0,
) -> Iterator[ComfyServer]:
    """Start a ComfyUI on a loopback port and stop it at the end of the `with` block.

    Args:
        comfyui: Folder that holds ComfyUI's `main.py`.
        base_directory: Folder for models, custom_nodes, input, output, temp and user; ComfyUI's own by default.
        pack: Folder to link into `custom_nodes` of `base_directory`.
        port: Port, a free one by default.
        log: File that receives the server's output; it goes to the terminal by default.
        python: Interpreter that has ComfyUI's requirements.
        arguments: More arguments for ComfyUI.
        timeout: Seconds to wait until it answers.

    Raises:
        ComfyError: No ComfyUI there, or it does not come up.
    """
    main = Path(comfyui).expanduser().resolve() / "main.py"
    if not main.is_file():
        raise ComfyError(f"no ComfyUI in {main.parent}: there is no main.py")
    port = port or _free_port()
    command = [python, str(main), "--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch"]
    if base_directory is not None:
        command += _base_arguments(Path(base_directory).resolve(), None if pack is None else Path(pack))
    command += [*_device_arguments(), *arguments]
    log = None if log is None else Path(log)
    process = _spawn_server(command, log)
    try:
        server = ComfyServer(f"http://127.0.0.1:{port}", process, log)
        _await_server(server, timeout)
        yield server
    finally:
        _stop(process)


def _device_arguments() -> list[str]:
    import torch

    return [] if torch.accelerator.is_available() else ["--cpu"]


def _await_server(server: ComfyServer, timeout: float) -> None:
    client, end = ComfyClient(server.url), time.monotonic() + timeout
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise ComfyError(
                f"ComfyUI ended with status {server.process.returncode} while starting{_log_tail(server)}"
            )
        with contextlib.suppress(ComfyError):
            client.request("/system_stats", timeout=5)
            return
        time.sleep(0.2)
    raise ComfyError(f"ComfyUI did not answer within {timeout:g} s{_log_tail(server)}")


def _log_tail(server: ComfyServer) -> str:
    if server.log is None:
        return ""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", server.log.read_text(errors="replace")).strip().splitlines()
    return f": {lines[-1]} (log: {server.log})" if lines else f" (log: {server.log})"


def _stop(process) -> None:
    process.send_signal(signal.SIGTERM)
    end = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.kill()  # does nothing to a process that has ended
    process.wait()


class _Bars:
    """A progress bar per node that reports steps."""

    def __init__(self):
        self._bar, self._name = None, None

    def __call__(self, name: str, step: int, steps: int) -> None:
        from tqdm import tqdm

        if self._bar is None or name != self._name or step < self._bar.n or steps != self._bar.total:
            self.close()
            self._bar, self._name = tqdm(total=steps, desc=name), name
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _read_workflow(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ComfyError(f"no workflow at {path}")
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ComfyError(f"{path} is not a JSON workflow: {error}") from None
    if not isinstance(workflow, dict):
        raise ComfyError(f"{path} is not a ComfyUI workflow")
    return workflow


@contextlib.contextmanager
def _server_url(url: str | None, comfyui: str | Path | None) -> Iterator[str]:
    """Address of the server to use, starting one from `comfyui` where no address is given."""
    comfyui = comfyui or os.environ.get("COMFYUI_DIR")
    if url is not None or not comfyui:
        client = ComfyClient(url or DEFAULT_URL)
        try:
            client.request("/system_stats", timeout=5)
        except ComfyError as error:
            hint = "" if url else ": start it, give its address (--url) or its folder (--comfyui)"
            raise ComfyError(f"{error}{hint}") from None
        yield client.url
        return
    with (
        tempfile.TemporaryDirectory(prefix="comfyui-") as folder,
        start_server(comfyui, log=Path(folder) / "server.log") as server,
    ):
        yield server.url


def run_workflow(
    path: str | Path,
    *,
    url: str | None = None,
    comfyui: str | Path | None = None,
    output_dir: str | Path = "outputs",
    substitutions: Mapping[str, Any] | None = None,
    values: Mapping[str, str] | None = None,
    prompt: str | None = None,
    timeout: float = 3600.0,
    progress: bool = True,
) -> list[Path]:
    """Run a workflow file on a local ComfyUI and save its pictures.

    Args:
        path: Workflow in UI or API format.
        url: Address of a running ComfyUI; `http://127.0.0.1:8188` where neither this nor `comfyui` is given.
        comfyui: Folder of a ComfyUI to start for this run (default: the environment variable `COMFYUI_DIR`).
        output_dir: Folder that receives the pictures, named after the workflow.
        substitutions: Other model files or nodes, see `comfy_graph.substitute`; `comfy_graph.shapes_substitutions`
            runs a workflow on a shipped model.
        values: Other model files and settings by name, see `comfy_graph.set_values`.
        prompt: Text for the positive prompts.
        timeout: Seconds after which the run is interrupted.
        progress: Show progress bars.

    Returns:
        Paths of the saved files.

    Raises:
        ComfyError: With one line that says what is missing, refused or failed.
    """
    path = Path(path)
    workflow = _read_workflow(path)
    with _server_url(url, comfyui) as address:
        client = ComfyClient(address)
        graph = _prepare(workflow, client.object_info(), substitutions, values, prompt)
        with contextlib.closing(_Bars()) as bars:
            entry = client.run(graph, timeout=timeout, progress=bars if progress else None)
        return client.save_outputs(entry, output_dir, prefix=f"{path.stem}-")


def _prepare(
    workflow: Mapping[str, Any],
    info: Mapping[str, Any],
    substitutions: Mapping[str, Any] | None,
    values: Mapping[str, str] | None,
    prompt: str | None,
) -> Graph:
    try:
        graph = to_api(workflow, info)
        if substitutions:
            graph = substitute(graph, substitutions, info)
        graph = set_values(graph, values or {})
        require_nodes((node["class_type"] for node in graph.values()), info)
    except ValueError as error:
        raise ComfyError(str(error)) from None
    return graph if prompt is None else set_prompt(graph, prompt)
