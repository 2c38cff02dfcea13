"""What we call tells nobody of its use: no network unless the user named a hub model."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import elastic.formats.openvino
import nncf.telemetry.wrapper
import openvino
from openvino.tools.ovc.telemetry_utils import init_ovc_telemetry

print(init_ovc_telemetry().consent, nncf.telemetry.wrapper.telemetry)
"""


def test_openvino_and_nncf_report_nothing():
    """In a process that says nothing of continuous integration."""
    silent = {key: value for key, value in os.environ.items() if key not in ("CI", "NNCF_CI")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=silent, check=True
    )
    assert done.stdout.splitlines()[-1].startswith("False <MagicMock")
