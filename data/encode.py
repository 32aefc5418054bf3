"""From records to tokens: the main process reads records in order, worker processes decode and tokenize batches of
them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from data.files import file_size
from data.indexed_dataset import MAX_DOCUMENT_TOKENS, token_dtype
from data.readers import BadRecord, FileOffset, Record, decode_text, read_records
from data.sources import TextSource
from data.tokenizer import TokenizerSpec, UnencodableText
from utils.errors import UserError

BATCH_BYTES = 1 << 19  # text in a batch
RECORD_BYTES = 100  # memory of a record beside its content


@dataclass(frozen=True)
class RecordBatch:
    """Records in order, and where reading resumes behind them.

    Attributes:
        records: (index of the file, record); a BadRecord stands for the rest of a file that cannot be read.
        file, offset: what is read next.
        consumed: stored bytes of all files up to there.
    """

    records: list[tuple[int, Record | BadRecord]]
    file: int
    offset: FileOffset
    consumed: int


@dataclass(frozen=True)
class EncodedBatch:
    """A batch's tokens. Attributes: lengths: tokens of each document; empty: records without text."""

    tokens: bytes
    lengths: np.ndarray
    empty: int
    bad: list[BadRecord]
    text_bytes: int


def read_record_batches(
    source: TextSource, first: int, offset: FileOffset, *, skip_bad: bool
) -> Generator[RecordBatch, None, None]:
    """The records from `offset` of file number `first` on, in batches of about `BATCH_BYTES`.

    Raises:
        BadRecord: the rest of a file cannot be read, and `skip_bad` is false.
    """
    records: list[tuple[int, Record | BadRecord]] = []
    sizes = [file_size(file) for file in source.files]
    size = 0
    for number in range(first, len(source.files)):
        start = offset if number == first else FileOffset()
        bytes_before = sum(sizes[:number])
        try:
            for record in read_records(
                source.files[number], kind=source.kinds[number], json_key=source.json_key, start=start
            ):
                records.append((number, record))
                size += len(record.content or b"") + RECORD_BYTES
                if size >= BATCH_BYTES:
                    behind = FileOffset(record.end, record.number or 1)
                    yield RecordBatch(records, number, behind, bytes_before + record.consumed)
                    records, size = [], 0
        except BadRecord as error:
            if not skip_bad:
                raise
            records.append((number, error))
    yield RecordBatch(records, len(source.files), FileOffset(), sum(sizes))


class Encoder:
    """Tokenizes record batches; each worker process has one."""

    def __init__(self, tokenizer: TokenizerSpec, source: TextSource, append_eod: bool) -> None:
        self.tokenizer, self.source = tokenizer.load(), source
        self.dtype, self.append_eod = np.dtype(token_dtype(self.tokenizer.vocab_size)), append_eod

    def __call__(self, batch: RecordBatch) -> EncodedBatch:
        """Raises nothing for bad records: they are listed in the result, in order."""
        texts, numbers, bad, empty = [], [], {}, 0
        for number, (file, record) in enumerate(batch.records):
            try:
                text = self._decode(file, record)
            except BadRecord as error:
                bad[number] = error
                continue
            if text:
                texts.append(text)
                numbers.append(number)
            else:
                empty += 1
        parts, lengths, text_bytes = [], [], 0
        for number, text, ids in zip(numbers, texts, self._encode(texts), strict=True):
            if isinstance(ids, UnencodableText):
                file, record = batch.records[number]
                bad[number] = BadRecord(self.source.files[file], record.number, str(ids))
                continue
            document = self.tokenizer.frame(ids, append_eod=self.append_eod)
            if len(document) > MAX_DOCUMENT_TOKENS:
                file, record = batch.records[number]
                reason = f"has {len(document)} tokens; the format ends at {MAX_DOCUMENT_TOKENS} a document"
                bad[number] = BadRecord(self.source.files[file], record.number, reason)
                continue
            parts.append(document)
            lengths.append(len(document))
            text_bytes += len(text.encode())
        tokens = np.concatenate(parts).astype(self.dtype).tobytes() if parts else b""
        in_order = [bad[number] for number in sorted(bad)]
        return EncodedBatch(tokens, np.array(lengths, np.int32), empty, in_order, text_bytes)

    def _encode(self, texts: list[str]) -> list[np.ndarray | UnencodableText]:
        """The ids, or the error, of each text."""
        try:
            return list(self.tokenizer.encode_batch(texts))
        except UnencodableText as error:
            return [error] if len(texts) == 1 else [one for text in texts for one in self._encode([text])]

    def _decode(self, file: int, record: Record | BadRecord) -> str:
        if isinstance(record, BadRecord):
            raise record
        source = self.source
        return decode_text(source.files[file], record, kind=source.kinds[file], json_key=source.json_key)


_encoder: Encoder | None = None  # of a worker process


def _start_worker(parent: int, tokenizer: TokenizerSpec, source: TextSource, append_eod: bool) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    _encoder = Encoder(tokenizer, source, append_eod)


def _exit_with_parent(parent: int) -> None:
    """Ends a worker whose parent was killed; without this, the worker waits for work for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _encode(batch: RecordBatch) -> EncodedBatch:
    assert _encoder is not None
    return _encoder(batch)


def encode_in_order(
    batches: Iterator[RecordBatch], tokenizer: TokenizerSpec, source: TextSource, *, append_eod: bool, workers: int
) -> Generator[tuple[RecordBatch, EncodedBatch], None, None]:
    """Each batch with its tokens, in order; at most 2 * workers + 2 batches are in flight.

    Args:
        workers: processes; 0: this process encodes.

    Raises:
        UserError: a worker died.
    """
    if not workers:
        encoder = Encoder(tokenizer, source, append_eod)
        for batch in batches:
            yield batch, encoder(batch)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn"),
        initializer=_start_worker,
        initargs=(os.getpid(), tokenizer, source, append_eod),
    )
    in_flight: deque[tuple[RecordBatch, Future[EncodedBatch]]] = deque()
    try:
        for batch in batches:
            in_flight.append((batch, pool.submit(_encode, batch)))
            if len(in_flight) > 2 * workers + 1:
                first, future = in_flight.popleft()
                yield first, future.result()
        while in_flight:
            first, future = in_flight.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise UserError(f"a worker died ({error}); out of memory? The same command resumes from there") from error
    finally:
        pool.shutdown(cancel_futures=True)
