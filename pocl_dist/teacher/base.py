"""What the train step asks of a teacher, whether it runs beside the student or was cached."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from pocl_dist.records import Batch, TeacherOutput


class Teacher(Protocol):
    """A source of teacher distributions; one file each in this folder."""

    def answer(self, batch: Batch) -> AbstractContextManager[TeacherOutput]:
        """Yields what the teacher says of the batch's labelled positions, on the batch's device.

        Collective for a teacher that is partitioned: every rank asks for as many batches. What is
        yielded is valid while the context lasts.
        """
        ...
