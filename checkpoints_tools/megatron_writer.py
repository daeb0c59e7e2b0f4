"""Writes a Megatron checkpoint folder (torch_dist) from tensors that are made one at a time."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.filesystem import _StorageInfo  # what every reader of the format unpickles
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from checkpoints_tools.ahead import ahead
from checkpoints_tools.direct_files import DirectWriter
from checkpoints_tools.megatron_folder import COMMON, CONFIG
from checkpoints_tools.places import Place

FILE_BYTES = 5 << 30


class _Planner(DefaultSavePlanner):
    """Plans all places from their shapes; a tensor is made when its turn to be written comes."""

    def __init__(
        self, places: Sequence[Place], dtypes: dict[str, torch.dtype], make: Callable[[Place], Tensor]
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self._places = {MetadataIndex(place.key, place.offsets): place for place in places}
        self._dtypes, self._make = dtypes, make

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=index,
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=torch.Size(place.offsets), sizes=torch.Size(place.sizes)),
                    properties=TensorProperties(dtype=self._dtypes[place.key]),
                    size=torch.Size(place.global_shape),
                ),
            )
            for index, place in self._places.items()
        ]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        place = self._places[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        return self._make(place).view(place.sizes)


class _Stream(io.RawIOBase):
    """A file that is written from its start to its end."""

    def __init__(self, file: DirectWriter) -> None:
        self._file, self._at = file, 0
        self._error: OSError | None = None

    def save(self, tensor: Tensor) -> None:
        """Write the tensor as torch.save does. Raises OSError for a full disk, which torch would call otherwise."""
        try:
            with _without_checksums():
                torch.save(tensor, self)
        except RuntimeError:
            if self._error is not None:
                raise self._error from None
            raise

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:
        piece = np.frombuffer(data, dtype=np.uint8)
        try:
            self._file.write(piece, start=self._at)
        except OSError as error:
            self._error = error
            raise
        self._at += len(piece)
        return len(piece)

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def _without_checksums() -> Iterator[None]:
    """torch.save makes a zip archive whose CRC32 torch.load does not read: half of the time of writing."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Writer(FileSystemWriter):
    """torch's own writer keeps the last tensor of every key until its file is complete; this one keeps none."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # without the path, which is about to change

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        file_number, stream = -1, None
        try:
            for item, tensor in zip(plan.items, ahead(planner.resolve_data, plan.items), strict=True):
                if stream is None or stream.tell() >= FILE_BYTES:
                    if stream is not None:
                        stream.close()
                    file_number += 1
                    name = f"__0_{file_number}.distcp"
                    stream = _Stream(DirectWriter(Path(self.path) / name))
                start = stream.tell()
                if tensor.untyped_storage().nbytes() != tensor.nbytes:
                    tensor = tensor.clone()  # torch.save writes a view's whole storage
                stream.save(tensor)
                length = stream.tell() - start
                results.append(
                    WriteResult(index=item.index, size_in_bytes=length, storage_data=_StorageInfo(name, start, length))
                )
        finally:
            if stream is not None:
                stream.close()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def write_checkpoint(
    folder: Path, places: Sequence[Place], dtypes: dict[str, torch.dtype], *,
    make: Callable[[Place], Tensor], common: dict[str, Any],
) -> None:  # fmt: skip
    """Write all places; make(place) returns the whole parameter in dtypes[place.key], on the CPU.

    common: plain values that `dist_checkpointing.load` returns beside the tensors.
    """
    writer, planner = _Writer(folder, sync_files=False), _Planner(places, dtypes, make)
    planner.set_up_planner({}, is_coordinator=True)
    [plan], metadata = planner.create_global_plan([planner.create_local_plan()])
    writer.set_up_storage_writer(is_coordinator=True)
    writer.finish(metadata, [writer.write_data(plan, planner).wait()])
    torch.save(common, folder / COMMON)
    # Last: megatron-core takes a folder with this file for a checkpoint.
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {f"{name}_version": 1 for name in backends}
    (folder / CONFIG).write_text(json.dumps({**backends, **versions}))
