"""What stands beside the written formats."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from elastic.config import ExportConfig
from elastic.exporting import card, proof, push
from elastic.exporting.report import Report
from elastic.files import write_json, write_text
from elastic.models import loading
from elastic.run import Run


def described(building: Path, run: Run, config: ExportConfig, **known: Any) -> Report:
    """The report, written and returned, and the card for Hugging Face: in its folder, or for its
    hub."""
    report = Report(
        config=config,
        trained=run.config(),
        origin=run.origin(),
        license=card.license_of(Path(loading.locate(run.config().model.path))),
        **known,
    )
    placed = push.placed(report) if config.push_to_hub else card.ALONE
    if config.push_to_hub and "hf" not in placed:
        card.write(report, building, placed)
    if (building / "hf").is_dir():
        card.write(report, building / "hf", placed)
        assert not isinstance(report.formats["hf"], proof.Skipped)
        whole = dataclasses.replace(report.formats["hf"], bytes=proof.size_of(building / "hf"))
        report = dataclasses.replace(report, formats={**report.formats, "hf": whole})
    write_json(building / "report.json", report.contents)
    write_text(building / "report.md", report.markdown())
    return report
