"""Whatever the OpenAPI document allows, and what it does not, is answered and never with 500."""

import subprocess
import sys
from pathlib import Path

from tests.service import Server


def test_no_request_is_an_error_of_ours(server: Server) -> None:
    command = [str(Path(sys.executable).parent / "schemathesis"), "run"]
    command += [f"{server.url}/openapi.json", "--checks", "not_a_server_error"]
    command += ["--phases", "fuzzing", "--max-examples", "6", "--seed", "1", "--no-color"]
    command += ["--request-timeout", "150"]  # a busy machine is no failure
    found = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout[-3000:]
    assert "passed" in found.stdout
