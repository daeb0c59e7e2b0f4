"""Stage 1: decode and encode each video once, its frames spread over the ranks of the replica."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from megalong.config.tree import VideoDecoder
from megalong.data.video import DecodeError, VideoIndex
from megalong.data.video_decoder import open_decoder
from megalong.data.video_layout import VideoLayout
from megalong.parallel.collectives import gather_objects
from megalong.parallel.exchange import exchange_rows, plan_exchange
from megalong.parallel.layout import ParallelLayout
from megalong.parallel.split import shard_range
from megalong.records import Dropped, FrameSelection, Prompt, Sample
from megalong.vision.disk import open_disk_store
from megalong.vision.fetches import Fetches
from megalong.vision.settings import VisionSettings
from megalong.vision.store import ByteStore, FileContents, encoder_digest, file_digest, selection_key
from megalong.vision.tiers import EmbeddingPart, EmbeddingStore
from megalong.vision.tower import encode_nothing, run_tower


class VisionStage:
    """Owns the decoded frames of this rank and the embeddings of its replica's videos.

    Every rank of a replica calls the same methods with the same arguments. A rank decodes and encodes only its
    share of each video's frames; paths and frame indexes travel between ranks, pixels never do. A family without vision
    has neither encoder nor video layout: samples without videos pass, others raise ValueError.
    """

    def __init__(
        self, encoder: nn.Module | None, layout: ParallelLayout, settings: VisionSettings, *, videos: VideoLayout | None
    ) -> None:
        self.encoder = encoder
        self.videos = videos
        self.layout = layout
        self.settings = settings
        self.frames = ByteStore[np.ndarray](
            what="decoded frames", budget_bytes=settings.frame_store_bytes, setting="video.frame_cache_gib"
        )
        self.embeds = EmbeddingStore(
            device=layout.device,
            gpu_bytes=settings.embed_gpu_bytes,
            host_bytes=settings.embed_host_bytes,
            disk=open_disk_store(encoder, settings),
        )
        self.frames_encoded = 0  # by this rank, since the start
        # Without vision there is nothing to decode.
        self.decoder = open_decoder(settings.decoder if encoder is not None else VideoDecoder.pyav, layout.device)
        self.decoded_elsewhere: dict[str, str] = {}  # files of the replica that its decoder refused -> why
        self._pool = ThreadPoolExecutor(max_workers=settings.decode_workers, thread_name_prefix="decode")
        self.fetches = Fetches[np.ndarray | EmbeddingPart](self._pool)
        self._indexing: dict[str, Future[tuple[VideoIndex, str]]] = {}  # with the file's digest
        self._indexed: dict[str, FrameSelection | str] = {}  # path -> its frames, or why it cannot be read
        self._contents = FileContents()
        self.weights_changed()

    def select(
        self, samples: Sequence[Sample], choose: Callable[[VideoIndex], FrameSelection]
    ) -> tuple[dict[str, FrameSelection], list[Dropped]]:
        """Index the videos of the samples (files shared out over the replica's ranks) and choose their frames.

        A file is indexed once per run; `choose` is the same for all calls. Returns the selection of each readable
        path and a Dropped for each sample that has an unreadable one.
        """
        paths = sorted({path for sample in samples for path in sample.videos})
        if paths and self.encoder is None:
            raise ValueError(f"{paths[0]}: this model family has no vision, and the sample has a video")
        mine: dict[str, FrameSelection | str] = {}
        contents: dict[str, str] = {}
        for path in self.index_ahead(samples):
            try:
                index, contents[path] = self._indexing.pop(path).result()
                mine[path] = choose(index)
            except DecodeError as error:
                mine[path] = error.reason
        if any(path not in self._indexed for path in paths):  # the same on every rank of the replica
            for part, digests in gather_objects((mine, contents), group=self.layout.replica_host):
                self._indexed.update(part)
                self._contents.update(digests)
            self._indexing = {path: index for path, index in self._indexing.items() if path not in self._indexed}
        found = {path: self._indexed[path] for path in paths}
        reasons = {path: entry for path, entry in found.items() if isinstance(entry, str)}
        selections = {path: entry for path, entry in found.items() if not isinstance(entry, str)}
        return selections, _drops(samples, reasons)

    def index_ahead(self, samples: Sequence[Sample]) -> list[str]:
        """Start indexing this rank's share of the files that select() will not know yet; returns their paths."""
        unknown = sorted({path for sample in samples for path in sample.videos} - self._indexed.keys())
        mine = unknown[self.layout.replica_rank :: self.layout.replica_size] if self.encoder is not None else []
        self._indexing |= {
            path: self._pool.submit(lambda path=path: (self.decoder.probe(path), file_digest(path)))
            for path in mine
            if path not in self._indexing
        }
        return mine

    def prefetch(self, selections: Sequence[FrameSelection]) -> bool:
        """Start reading from disk, or decoding, this rank's share of the videos that are not in memory yet: in this
        order, and as many as decoded frames have room for beside those of the step in progress. Whether all were."""
        return self._begin(self._by_content(selections))

    def prepare(self, samples: Sequence[Sample], selections: dict[str, FrameSelection]) -> list[Dropped]:
        """Decode (and, for a frozen tower, encode) what the samples need and no store has.

        Afterwards embeddings() serves every sample that is not in the returned list, until release(). A frozen tower's
        frames are let go as they are encoded, so that a step's videos need not fit into video.frame_cache_gib at once.
        """
        wanted = self._by_content([selections[path] for sample in samples for path in sample.videos])
        self.frames.pin(wanted)
        self.embeds.pin(self.embed_key(selection) for selection in wanted.values())
        reasons: dict[str, str] = {}  # by content
        pending: list[FrameSelection] = []  # decoded, and to be encoded
        items = [(key, selection) for key, selection in wanted.items() if not self._has_embeds(selection)]
        missing = dict(sorted(items, key=lambda item: item[0] not in self.fetches))  # first what holds memory
        for key, selection in list(missing.items()):
            try:
                is_decoded = key in self.frames or self._fetch_next(missing, pending, keep=wanted)
            except DecodeError as error:
                is_decoded, reasons[key] = False, error.reason
            del missing[key]
            if is_decoded and self.settings.frozen:
                pending.append(selection)
                # A few at a time: the embeddings of a batch of hours would not fit on the device at once.
                if sum(len(item.frames) for item in pending) >= 4 * self.settings.tower_batch_frames:
                    self._encode_into_store(pending)
        self._encode_into_store(pending)
        for bad, elsewhere in gather_objects((reasons, self.decoder.fallbacks), group=self.layout.replica_host):
            reasons.update(bad)
            self.decoded_elsewhere.update(elsewhere)
        bad = {path: key for path, item in selections.items() if (key := self.key(item)) in reasons}
        return _drops(samples, {path: reasons[key] for path, key in bad.items()})

    def release(self, *, keep: Sequence[FrameSelection] = ()) -> None:
        """The step is over: what prepare() made ready for it, but for `keep`, may make room for other videos."""
        self.frames.release(keep={self.key(selection) for selection in keep})
        self.embeds.release(keep={self.embed_key(selection) for selection in keep})

    def embeddings(
        self,
        selections: Sequence[FrameSelection],
        wanted: Sequence[Tensor] | None = None,
        *,
        returns: Sequence[bool] | None = None,
    ) -> Tensor | None:
        """Embeddings for the selections' MEDIA_TOKEN places, straight from the ranks that encoded their frames.

        wanted[r]: which of the N embeddings of all selections rank r of the replica needs, int64, in its order;
        returns[r]: whether its gradients go back (of ranks that compute the same, one should). By default every rank
        gets all, and computes the same with them. Returns [n, D'], this rank's; D' is the encoder's output width, a
        multiple of the LLM's. From the store for a frozen tower; encoded here, with gradients, for a trained one.
        None without videos.
        """
        if not selections:
            return None
        size, rank = self.layout.replica_size, self.layout.replica_rank
        if wanted is None:
            everything = torch.arange(sum(self._rows(item, (0, len(item.frames))) for item in selections))
            wanted, returns = [everything] * size, [index == 0 for index in range(size)]
        if not self.settings.share_frames or size == 1:
            rows_nD = self._rows_alone(selections, wanted[rank])
            if returns is None or returns[rank]:
                return rows_nD
            # A leaf in their place: the ranks of a tensor-parallel group must have the same graph.
            return rows_nD.detach().requires_grad_(rows_nD.requires_grad)
        local_ND = self._local_rows(selections)
        owner_N, place_N = self._homes(selections)
        plan = plan_exchange(owner_N, place_N, wanted, rank=rank, returns=returns)
        return exchange_rows(local_ND, plan, group=self.layout.replica)

    @torch.no_grad()
    def embeddings_of(
        self, prompts: Sequence[Prompt], owners: Sequence[int], *, room_ND: Tensor | None = None
    ) -> list[Tensor | None]:
        """The embeddings of each prompt that this rank of the replica owns, [N, D']; None for the others.

        Prompts about the same videos have the very same tensor. owners: the rank of the replica that each prompt is for
        (the same on every rank). room_ND: of as many rows as there are here, each video's counted once, where they are
        written one after the other: on the device are those of one prompt at a time.
        """
        found, first = {}, 0
        keys = [(owner, prompt.selections) for prompt, owner in zip(prompts, owners, strict=True)]
        for owner, selections in dict.fromkeys(keys):
            everything = torch.arange(sum(self._rows(item, (0, len(item.frames))) for item in selections))
            wanted = [everything if rank == owner else everything[:0] for rank in range(self.layout.replica_size)]
            rows_nD = self.embeddings(selections, wanted)
            if rows_nD is None or not len(rows_nD):
                found[owner, selections] = None
            elif room_ND is None:
                found[owner, selections] = rows_nD
            else:
                found[owner, selections] = room_ND[first : first + len(rows_nD)].copy_(rows_nD)
                first += len(rows_nD)
        return [found[key] for key in keys]

    def weights_changed(self) -> None:
        """Call after the tower or the projector was loaded: embeddings made before no longer match any key."""
        self.embeds.clear()
        self.fetches.clear()  # what was fetched from disk for the old weights
        if self.encoder is None:
            return
        self._weights_digest = encoder_digest(self.encoder)

    def __enter__(self) -> VisionStage:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(wait=kind is None)

    def close(self, *, wait: bool = True) -> None:
        """Stop decoding: what is under way is for nobody. wait: until PyAV, which nothing can stop, has ended."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.decoder.close()
        self._pool.shutdown(wait=wait)

    def key(self, selection: FrameSelection) -> str:
        """Key of decoded frames: file, frames, resolution."""
        return selection_key(selection, self._contents[selection.path])

    def embed_key(self, selection: FrameSelection) -> str:
        """Key of embeddings: the frames' key, what decodes them, and the weights and dtype of tower and projector."""
        return f"{self.key(selection)}/{self.decoder.settings}/{self._weights_digest}"

    def _by_content(self, selections: Sequence[FrameSelection]) -> dict[str, FrameSelection]:
        """One selection for each content key: several paths may name the same content."""
        return {self.key(selection): selection for selection in selections}

    def _begin(self, wanted: dict[str, FrameSelection]) -> bool:
        """See prefetch(). wanted: by content."""
        for key, selection in wanted.items():
            if key in self.frames or key in self.fetches or self._has_embeds(selection):
                continue
            num_bytes = self._frame_bytes(selection)
            if not self.frames.fits(self.fetches.num_bytes + num_bytes, beside=wanted):
                return False
            self._start(key, selection, num_bytes=num_bytes, beside=wanted)
        return True

    def _fetch_next(self, missing: dict[str, FrameSelection], pending: list[FrameSelection], keep: Container) -> bool:
        """Wait for the first of the missing videos, as many others under way as have room, and put what came where it
        belongs. Whether it is frames. keep: keys of the step; others under way make room where it lacks."""
        key, selection = next(iter(missing.items()))
        if not self._begin(missing):
            self.fetches.drop_others(keep)
            if not self._begin(missing) and key not in self.fetches:
                self._encode_into_store(pending)
                self._begin(missing)
        if key not in self.fetches:
            self._start(key, selection, num_bytes=self._frame_bytes(selection))  # says what has no room
        fetched = self.fetches.take(key)  # no other reference to it remains
        if isinstance(fetched, EmbeddingPart):
            self.embeds.put(self.embed_key(selection), fetched)
            return False
        if not self.frames.fits(fetched.nbytes):  # in the place of embeddings that were damaged
            self._encode_into_store(pending)
        self.frames.put(key, fetched, num_bytes=fetched.nbytes)
        return True

    def _frame_bytes(self, selection: FrameSelection) -> int:
        """Of this rank's share of the frames; none where the disk store has embeddings in their place."""
        first, last = self._share(selection)
        disk = self.embeds.disk
        if disk is not None and first < last and disk.holds(self.embed_key(selection), *self._share_rows(selection)):
            return 0
        return (last - first) * selection.height * selection.width * 3

    def _start(self, key: str, selection: FrameSelection, *, num_bytes: int, beside: Container[str] = ()) -> None:
        """Raises StoreFullError where the frames of the step in progress leave no room."""
        self.frames.make_room(self.fetches.num_bytes + num_bytes, beside=beside)
        self.fetches.start(key, partial(self._fetch, selection), num_bytes=num_bytes)

    def _fetch(self, selection: FrameSelection) -> np.ndarray | EmbeddingPart:
        """This rank's share of the frames, or what the disk store has in their place. Runs on a thread."""
        first, last = self._share(selection)
        disk = self.embeds.disk
        if disk is not None and first < last:
            start, stop = self._share_rows(selection)
            embeds_nD = disk.read(self.embed_key(selection), start, stop)
            if embeds_nD is not None:
                return EmbeddingPart(start, embeds_nD)
        clip = self.decoder.decode(selection, first=first, last=last)
        if file_digest(selection.path) != self._contents[selection.path]:
            raise DecodeError(selection.path, "it has changed since it was indexed")
        return clip.frames_FHWC

    def _has_embeds(self, selection: FrameSelection) -> bool:
        return self.settings.frozen and self.embed_key(selection) in self.embeds

    @torch.no_grad()
    def _encode_into_store(self, pending: list[FrameSelection]) -> None:
        """This rank's share of each video, whose frames and places in the list are free then; nothing is sent."""
        if not pending:
            return
        counts = [self._rows(item, self._share(item)) for item in pending]
        for item, local_nD in zip(pending, self._encode_local(pending).split(counts), strict=True):
            self.embeds.put(self.embed_key(item), EmbeddingPart(self._share_rows(item)[0], local_nD))
            self.frames.drop(self.key(item))
        pending.clear()

    def _local_rows(self, selections: Sequence[FrameSelection]) -> Tensor:
        """[M, D'] embeddings of this rank's frames, selection after selection."""
        if not self.settings.frozen:
            return self._encode_local(selections)
        return torch.cat([self.embeds.get(self.embed_key(item)) for item in selections])

    def _rows_alone(self, selections: Sequence[FrameSelection], wanted_n: Tensor) -> Tensor:
        """[n, D'] the wanted embeddings of the selections, all made here: videos of which none is wanted are not."""
        chosen: list[FrameSelection] = []
        local_n = torch.empty_like(wanted_n)
        first = held = 0
        for item in selections:
            count = self._rows(item, (0, len(item.frames)))
            inside_n = (wanted_n >= first) & (wanted_n < first + count)
            if inside_n.any():
                chosen.append(item)
                local_n[inside_n] = wanted_n[inside_n] - first + held
                held += count
            first += count
        if not chosen:
            return encode_nothing(self.encoder, selections[0], step=self.videos.frames_per_step)
        local_ND = self._local_rows(chosen)
        return local_ND.index_select(0, local_n.to(local_ND.device))

    def _homes(self, selections: Sequence[FrameSelection]) -> tuple[Tensor, Tensor]:
        """Of every embedding of the selections, the rank of the replica that has it and its place there, [N] int64."""
        size = self.layout.replica_size
        owners, places, held = [], [], [0] * size
        for selection in selections:
            shares = self._shares(selection)
            for rank in sorted(range(size), key=lambda rank: shares[rank]):
                count = self._rows(selection, shares[rank])
                owners.append(torch.full((count,), rank))
                places.append(torch.arange(count) + held[rank])
                held[rank] += count
        return torch.cat(owners), torch.cat(places)

    def _encode_local(self, selections: Sequence[FrameSelection]) -> Tensor:
        """[n, D'] embeddings of this rank's frames, selection after selection. Each resolution has its own batches."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, selection in enumerate(selections):
            first, last = self._share(selection)
            if first < last:
                by_size.setdefault((selection.height, selection.width), []).append(index)
        if not by_size:
            return encode_nothing(self.encoder, selections[0], step=self.videos.frames_per_step)
        pieces: dict[int, Tensor] = {}
        for indexes in by_size.values():
            clips = [self.frames.get(self.key(selections[index])) for index in indexes]
            on_device = [torch.from_numpy(clip).to(self.layout.device, non_blocking=True) for clip in clips]
            frames_FHWC = torch.cat(on_device)
            rows_ND = run_tower(self.encoder, frames_FHWC, self.settings, step=self.videos.frames_per_step)
            self.frames_encoded += len(frames_FHWC)
            counts = [self._rows(selections[index], (0, len(clip))) for index, clip in zip(indexes, clips, strict=True)]
            pieces.update(zip(indexes, rows_ND.split(counts), strict=True))
        return torch.cat([pieces[index] for index in sorted(pieces)])

    def _rows(self, selection: FrameSelection, frames: tuple[int, int]) -> int:
        """Embeddings of frames [first, last) of the selection."""
        first, last = frames
        return (last - first) // self.videos.frames_per_step * self.videos.tokens_per_step(selection)

    def _share(self, selection: FrameSelection) -> tuple[int, int]:
        """Frames [first, last) of the selection that this rank decodes and encodes."""
        return self._shares(selection)[self.layout.replica_rank]

    def _share_rows(self, selection: FrameSelection) -> tuple[int, int]:
        """Those frames' embeddings [start, stop) of the selection's."""
        first, last = (self._rows(selection, (0, frame)) for frame in self._share(selection))
        return first, last

    def _shares(self, selection: FrameSelection) -> list[tuple[int, int]]:
        """Frames [first, last) that each rank of the replica decodes and encodes: whole tower steps.

        Depends on the content alone, so decoded frames stay useful when batches and paths differ; starts at a rank that
        the content picks, so that remainders do not all land on rank 0.
        """
        size, step = self.layout.replica_size, self.videos.frames_per_step
        if not self.settings.share_frames:
            return [(0, len(selection.frames))] * size
        turn = zlib.crc32(self.key(selection).encode()) % size
        parts = [shard_range(len(selection.frames) // step, (rank + turn) % size, size) for rank in range(size)]
        return [(first * step, last * step) for first, last in parts]


def _drops(samples: Sequence[Sample], reasons: dict[str, str]) -> list[Dropped]:
    """One Dropped per sample with a bad video, naming the first."""
    dropped = []
    for sample in samples:
        bad = next((path for path in sample.videos if path in reasons), None)
        if bad is not None:
            dropped.append(Dropped(sample_id=sample.sample_id, stage="decode", reason=f"{bad}: {reasons[bad]}"))
    return dropped
