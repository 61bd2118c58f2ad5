"""What W&B wrote of an offline run: a LevelDB log of protocol buffers."""

import json
import struct
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7  # of the log; the file's own header has as many bytes as a chunk's


def records(folder: Path):
    """Of the one run under ``folder``, in order."""
    (path,) = folder.rglob("*.wandb")
    data, position, parts = path.read_bytes(), HEADER, []
    assert data[:4] == b":W&B"
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        parts.append(data[position + HEADER : position + HEADER + length])
        position += HEADER + length
        if kind in (1, 4):  # the complete value, or the last part
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def _name(item) -> str:
    return item.key or "/".join(item.nested_key)


def read(folder: Path) -> tuple[list[dict], dict, dict]:
    """What was logged, line by line; the configuration; the summary."""
    history, config, summary = [], {}, {}
    for record in records(folder):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history.append({_name(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "run":
            config |= {_name(item): json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            config |= {_name(item): json.loads(item.value_json) for item in record.config.update}
        elif kind == "summary":
            summary |= {_name(item): json.loads(item.value_json) for item in record.summary.update}
    return history, config, summary


def artifacts(folder: Path, kind: str) -> list[dict[str, bytes]]:
    """The files of each artifact of a kind, in order."""
    return [
        {entry.path: Path(entry.local_path).read_bytes() for entry in record.artifact.manifest.contents}
        for record in records(folder)
        if record.WhichOneof("record_type") == "artifact" and record.artifact.type == kind
    ]


def tables(folder: Path) -> dict[str, tuple[dict, dict[str, bytes]]]:
    """By name, the tables that were logged with their pictures: the table, and each file beside it."""
    found = {}
    for record in records(folder):
        if record.WhichOneof("record_type") == "artifact" and record.artifact.type == "run_table":
            files = {entry.path: Path(entry.local_path).read_bytes() for entry in record.artifact.manifest.contents}
            name = record.artifact.name.rpartition("-")[2]
            found[name] = json.loads(files.pop(f"{name}.table.json")), files
    return found
