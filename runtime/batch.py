"""From a scheduled step to the arrays an executor runs on, described in `executor.py`. Only what changes is written."""

from __future__ import annotations

from collections.abc import Mapping

from gptoss_compile.config import Bucket
from gptoss_compile.gumbel import NOTHING, words
from gptoss_compile.runtime.executor import Executor, Ints
from gptoss_compile.runtime.request import Request
from gptoss_compile.runtime.scheduler import Step


class _Written:
    """What a bucket's arrays hold. shown: for each row of the page tables, whose pages it shows (a serial), in which version
    and up to which entry. choosers: for each row of the logits, who has its token chosen there (a rank), if anyone."""

    def __init__(self, bucket: Bucket) -> None:
        self.shown = [(-1, -1, 0)] * bucket.sequences
        self.choosers: list[tuple[int, int] | None] = [None] * bucket.rows
        self.rows = 0  # of the logits, that were in use


class StepInputs:
    """Fills an executor's arrays. limit: ids from it on are never chosen."""

    def __init__(self, executor: Executor, limit: int) -> None:
        self._executor, self._limit = executor, limit
        self._written: dict[Bucket, _Written] = {}

    def build(self, step: Step) -> tuple[int, int]:
        """Writes the step's inputs; returns what `Executor.submit` wants to know of its tables: (rows, columns)."""
        arrays, bucket = self._executor.inputs(step.bucket), step.bucket
        written = self._written.get(bucket)
        if written is None:
            written = self._written[bucket] = _Written(bucket)
        self._write_tokens(step, arrays)
        self._write_words(step, arrays, written)
        return self._write_tables(step, arrays, written)

    def _write_tokens(self, step: Step, arrays: Mapping[str, Ints]) -> None:
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        source: list[int] = []
        rows: list[int] = []
        for number, chunk in enumerate(step.chunks):
            request, start, end = chunk.sequence.request, chunk.start, chunk.end
            size, known = end - start, len(request.tokens)
            rows.extend(len(tokens) + position - start for position in chunk.scored)
            if end > known:  # one token, which the step before chooses
                tokens.append(0)
                source.append(chunk.sequence.row)
            elif size == 1:
                tokens.append(request.tokens[start])
                source.append(-1)
            else:
                tokens += request.tokens[start:end]
                source += [-1] * size
            positions += range(start, end)
            sequences += [number] * size
            if chunk.samples:
                rows.append(len(tokens) - 1)
        used = len(tokens)
        for name, values, padding in (("tokens", tokens, 0), ("positions", positions, -1), ("source", source, -1),
                                      ("sequences", sequences, len(step.chunks) - 1)):
            array = arrays[name]
            array[:used] = values
            array[used:] = padding
        if step.bucket.kind == "extend":
            arrays["rows"][: len(rows)] = rows
            arrays["rows"][len(rows) :] = 0

    def _write_words(self, step: Step, arrays: Mapping[str, Ints], written: _Written) -> None:
        """A row of the logits asks for a token where its chunk samples and the host does not choose."""
        decode = step.bucket.kind == "decode"
        wanted: list[Request | None] = []
        counters: list[int] = []  # of rows that ask for none: anything
        for chunk in step.chunks:
            if chunk.scored:
                wanted += [None] * len(chunk.scored)
                counters += chunk.scored
            if chunk.samples or (decode and not chunk.scored):
                request = chunk.sequence.request
                wanted.append(request if chunk.samples and not request.on_host else None)
                counters.append(chunk.end)
        table, choosers = arrays["words"], written.choosers
        for row, chooser in enumerate(wanted):
            if choosers[row] is not (chooser and chooser.rank):
                self._set_chooser(table, choosers, row, chooser)
        for row in range(len(wanted), written.rows):
            self._set_chooser(table, choosers, row, None)
        table[: len(counters), 4] = counters
        written.rows = len(wanted)

    def _set_chooser(self, table: Ints, choosers: list[tuple[int, int] | None], row: int, request: Request | None) -> None:
        if request is None:
            choosers[row], table[row] = None, NOTHING
        else:
            temperature = 0.0 if request.params.greedy else request.params.temperature
            choosers[row], table[row] = request.rank, words(temperature, self._limit, request.seed)

    def _write_tables(self, step: Step, arrays: Mapping[str, Ints], written: _Written) -> tuple[int, int]:
        changed = False
        for row, chunk in enumerate(step.chunks):
            pages = chunk.sequence.pages
            serial, version, end = written.shown[row]
            if serial == pages.serial and version == pages.version:
                continue
            changed = True
            start = end if serial == pages.serial else 0
            arrays["full_table"][row, start : pages.end] = pages.full_row[start : pages.end]
            arrays["window_table"][row] = pages.window_row
            written.shown[row] = pages.serial, pages.version, pages.end
        return (len(step.chunks), max(chunk.sequence.pages.end for chunk in step.chunks)) if changed else (0, 0)
