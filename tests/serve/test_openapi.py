"""The server does what its OpenAPI page says: Schemathesis asks, and checks the answers."""

import subprocess
import sys

import pytest
from conftest import make_model
from serving import listening

# That a page says which bodies are valid but cannot say which texts a chat template renders, and in
# what order roles may come, is no fault: such bodies are refused.
EXCLUDED = "positive_data_acceptance"


@pytest.mark.parametrize("key", [None, "secret"])
def test_the_server_does_what_its_page_says(causal, tmp_path, key):
    with listening(make_model(causal), api_key=key) as (_, port):
        command = [sys.executable, "-m", "schemathesis.cli", "run"]
        command += [f"http://127.0.0.1:{port}/openapi.json", "--exclude-checks", EXCLUDED]
        command += ["--phases", "examples,coverage,fuzzing", "--max-examples", "30", "--seed", "0"]
        if key is not None:
            command += ["--header", f"Authorization: Bearer {key}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Operations:       10 selected" in done.stdout
