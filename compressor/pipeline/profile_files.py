"""The files of a profile: JSON, raw samples, NVIDIA's two files, the page."""

import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from compressor.pipeline.profiling import as_files
from compressor.report.profile_page import write_profile_page
from compressor.runtime.latency_model.staircase import Staircase
from compressor.runtime.measuring.profile_records import Profiled, analyser_files, trtexec_command
from compressor.values.files import write_bytes, write_json


def profile_records(found: Sequence[Profiled], stairs: Sequence[Staircase], source: str, command: str) -> dict[str, object]:
    """All records of a profile as plain data.

    Args:
        found: What was profiled.
        stairs: Measured staircases.
        source: The network, as the user named it.
        command: What was called.
    """
    records = [p.to_dict("raw_samples.npz", {"cli": command, "trtexec": trtexec_command(p, "model.onnx")}) for p in found]
    return {"schema_version": 1, "network": source, "records": records, "staircases": [asdict(s) for s in stairs]}


def write_profile(
    out: Path, source: str, found: Sequence[Profiled], stairs: Sequence[Staircase], records: dict[str, object]
) -> None:
    """Write the JSON, the raw samples, the files for NVIDIA's analysers and the page into a folder."""
    write_json(out / "profile.json", records)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **as_files(found))
    write_bytes(out / "raw_samples.npz", buffer.getvalue())
    for p in found:
        for name, text in analyser_files(p, 30).items() if p.layers else ():
            write_bytes(out / name, text.encode())
    write_bytes(out / "profile.html", write_profile_page(source, found, stairs).encode())
