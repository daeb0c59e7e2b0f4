"""What a checkpoint's metadata file may be made of, whichever Python wrote it."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.planner import WriteItemType

from checkpoints_tools.megatron_folder import _MetadataUnpickler


class Attribute:
    """Pickled as `getattr(owner, name)`, as Python 3.11.0 to 3.11.3 do with a member of an enum."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, self.name)


def load(value: Any) -> Any:
    return _MetadataUnpickler(io.BytesIO(pickle.dumps(value))).load()


def test_members_of_enums_are_read_as_every_python_3_11_writes_them() -> None:
    assert load(WriteItemType.TENSOR) is WriteItemType.TENSOR
    assert load(Attribute(WriteItemType, "TENSOR")) is WriteItemType.TENSOR


@pytest.mark.parametrize(
    ("owner", "name"), [(WriteItemType, "__init__"), (WriteItemType, "mro"), (torch.Size, "__len__"), ("text", "join")]
)
def test_no_other_attribute_is(owner: Any, name: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=f"attribute '{name}' of .* does not belong into a checkpoint"):
        load(Attribute(owner, name))
