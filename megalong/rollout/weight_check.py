"""What every engine asks of a weight update: versions go up, names and shapes are known, nothing is missing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from megalong.records import WeightBucket
from megalong.rollout.engine import WeightSyncError


class WeightCheck:
    """The state of a sampler's weights. `model` gives the names and shapes of its parameters.

    name_of: sync name to the name of the model's parameter, None for a weight that the model has no part for.
    """

    def __init__(self, model: nn.Module, *, name_of: Callable[[str], str | None]) -> None:
        # A tied head appears once, under the embedding's name.
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.name_of = name_of
        self.version = -1
        self._broken: str | None = None

    def require(self) -> None:
        """Raises WeightSyncError when there are no weights to sample with."""
        if self.version < 0 or self._broken:
            raise WeightSyncError(self._broken or "no weights were loaded before generate()")

    def begin(self, version: int, *, again: bool = False, in_parts: bool = True) -> Update:
        """An update starts; until it ends well there are no weights.

        again: the weights were thrown away, so it must hold all of them, and may be of the version that they had.
        in_parts: it may hold some of them, when there are others already; False: all or none.
        """
        if version < self.version or (version == self.version and not again):
            raise WeightSyncError(f"weights of version {version} arrived after version {self.version}")
        needs_all = again or self.version < 0 or self._broken is not None
        self._broken = f"the update to version {version} did not finish"
        return Update(self, version, needs_all=needs_all, in_parts=in_parts)

    def ended(self, version: int) -> None:
        self.version, self._broken = version, None


class Update:
    """One update of the weights that a WeightCheck watches."""

    def __init__(self, check: WeightCheck, version: int, *, needs_all: bool, in_parts: bool) -> None:
        self.check, self.version, self.needs_all, self.in_parts = check, version, needs_all, in_parts
        self.missing = set(check.shapes)

    def of(self, bucket: WeightBucket) -> WeightBucket:
        """What of the bucket the model has a part for, by the model's names, with the checksums of the sender.

        Raises WeightSyncError for an unknown name or a wrong shape.
        """
        tensors, checksums = {}, []
        for (full_name, tensor), checksum in zip(bucket.tensors.items(), bucket.checksums_n, strict=True):
            name = self.check.name_of(full_name)
            if name is None:
                continue
            if name not in self.check.shapes:
                raise WeightSyncError(f"version {self.version}: the sampler has no weight {name!r}")
            if self.check.shapes[name] != tensor.shape:
                raise WeightSyncError(
                    f"version {self.version}: {name} is {tuple(tensor.shape)}, expected "
                    f"{tuple(self.check.shapes[name])}"
                )
            tensors[name] = tensor
            checksums.append(checksum)
            self.missing.discard(name)
        # Not by a list of places: it would be copied to the checksums' device, and waited for.
        checksums_n = torch.stack(checksums) if checksums else bucket.checksums_n[:0]
        return WeightBucket(tensors=tensors, checksums_n=checksums_n)

    def end(self, wrong: str | None = None) -> None:
        """The update is complete. Raises WeightSyncError when it is not, or for what the engine found `wrong`."""
        if wrong:
            raise WeightSyncError(f"version {self.version}: {wrong}")
        some = len(self.missing) < len(self.check.shapes)
        if self.missing and (self.needs_all or (some and not self.in_parts)):
            raise WeightSyncError(f"version {self.version}: the update leaves out {sorted(self.missing)[:5]}")
        self.check.ended(self.version)
