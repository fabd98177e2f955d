"""The load of bench/server.py: requests from wrk (Debian's package; C, one thread), and single timed answers.

wrk builds each request from a prepared text in which only a 13-digit number changes, so that the generator costs a few
microseconds a request; pipelining is off.
"""

from __future__ import annotations

import http.client
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Final

STAMP: Final = "1700000000000"
"""Wherever these digits stand in a body, each request has a number of its own."""

_LUA: Final = """
local head, body, at = "", "", 0
function init(arguments)
  at = tonumber(arguments[1])
  local file = assert(io.open(arguments[2], "rb"))
  body = file:read("*a")
  file:close()
  head = arguments[3] .. " " .. arguments[4] .. " HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\n"
  head = head .. "Content-Type: application/json\\r\\n"
  if arguments[3] ~= "GET" then head = head .. "Content-Length: " .. #body .. "\\r\\n" end
  head = head .. "\\r\\n"
end
function request()
  at = at + 1
  return head .. (string.gsub(body, "STAMP", string.format("%.0f", at)))
end
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format('{"requests":%d,"us":%d,"bad":%d,"p50":%d,"p99":%d}', summary.requests, summary.duration,
    errors.status + errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50), latency:percentile(99)), "\\n")
end
"""


def rate(port: int, path: str, body: bytes, connections: int, seconds: float, method: str = "POST") -> float:
    """Answers a second over `connections` keep-alive connections; raises where one was not 2xx."""
    wrk = shutil.which("wrk")
    if wrk is None:
        raise FileNotFoundError("the load generator is missing: apt-get install wrk")
    with tempfile.TemporaryDirectory(prefix="runstream-bench-load-") as folder:
        script, content = Path(folder, "load.lua"), Path(folder, "body")
        script.write_text(_LUA.replace("STAMP", STAMP))
        content.write_bytes(body)
        first = 1_700_000_000_000 + time.time_ns() // 10_000 % 10**12
        command = [wrk, "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "30s", "-s", str(script)]
        command += [f"http://127.0.0.1:{port}", "--", str(first), str(content), method, path]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(said.splitlines()[-1])
    if found["bad"]:
        raise RuntimeError(f"{found['bad']} of {found['requests']} requests to {path} failed")
    return float(found["requests"] / (found["us"] / 1e6))


class Caller:
    """Single requests over one kept connection."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def bytes(self, path: str, body: Any = None) -> bytes:
        """The answer's body; raises where it is not 200."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        self._connection.request("GET" if body is None else "POST", path, data, headers)
        with self._connection.getresponse() as answer:
            content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {content[:500]!r}")
        return content

    def json(self, path: str, body: Any = None) -> Any:
        """The answer's JSON."""
        return json.loads(self.bytes(path, body))

    def seconds(self, path: str, body: Any = None, repeats: int = 3) -> float:
        """Median time until the whole answer is here, unparsed."""
        took = []
        for _ in range(repeats):
            began = time.perf_counter()
            self.bytes(path, body)
            took.append(time.perf_counter() - began)
        return statistics.median(took)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
