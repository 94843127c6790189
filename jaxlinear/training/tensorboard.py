"""Curves for TensorBoard."""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import summary
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c


class TensorBoard:
    """A separate event file in a directory; TensorBoard reads the files of a directory in the order of their names.

    Points are written here and not by tensorboardX's ``SummaryWriter``. Its thread keeps them for up to two minutes, in
    which a killed run loses the points of steps that it has saved; when the disk is full the thread ends, and whoever then
    adds a point waits for ever. Its files are named by the second, so two of the same second are the same file.
    """

    def __init__(self, directory: str | os.PathLike, purge_step: int | None = None):
        """With ``purge_step``, TensorBoard forgets what older files have for this step and later ones."""
        begun = [path.name.split(".")[3] for path in Path(directory).glob("events.out.tfevents.*")]
        # After all existing files, whatever the clock says.
        number = max([int(time.time()), *(int(second) + 1 for second in begun if second.isdigit())])
        path = Path(directory) / f"events.out.tfevents.{number:010}.{socket.gethostname()}.{os.getpid()}"
        self._file = path.open("xb")
        self._add(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(event_pb2.Event(wall_time=time.time(), step=purge_step, session_log=start))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds one point for each value that is a number."""
        points = [
            point
            for name, value in values.items()
            if isinstance(value, int | float)
            for point in summary.scalar(name, value).value
        ]
        self._add(event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=points)))

    def sync(self) -> None:
        """Returns when all points are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _add(self, event: event_pb2.Event) -> None:
        """Writes a TFRecord record: the length, its checksum, the content, its checksum."""
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
        self._file.write(length + checksums[0] + content + checksums[1])
        self._file.flush()
