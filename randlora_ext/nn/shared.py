"""Weights that lie in the same memory: merging into one of them changes the others, too."""

from collections.abc import Hashable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ..ranks import local_tensor

Owner = TypeVar("Owner", bound=Hashable)


def sharing_pairs(tensors: Mapping[Owner, Tensor]) -> Iterator[tuple[Owner, Owner]]:
    """The pairs of owners whose tensors share numbers."""
    places = {owner: _addresses(tensor) for owner, tensor in tensors.items()}
    before: list[Owner] = []  # those that reach as far as the next one begins
    for owner in sorted(tensors, key=lambda owner: places[owner].start):
        begin = places[owner].start
        before = [other for other in before if places[other].stop > begin]
        for other in before:
            if share_numbers(tensors[other], tensors[owner]):
                yield other, owner
        before.append(owner)


def share_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether writing into one tensor may change the other: views may begin at different places."""
    if one is other:
        return True
    place, other_place = _addresses(one), _addresses(other)
    if place.stop <= other_place.start or other_place.stop <= place.start:
        return False
    one, other = local_tensor(one), local_tensor(other)
    if one.dtype != other.dtype:
        return True
    if one.is_contiguous() and other.is_contiguous():
        return True
    # Of two slices of columns each lies between the rows of the other: mark the numbers of one.
    origin = min(place.start, other_place.start)
    end = max(place.stop, other_place.stop)
    used = torch.zeros((end - origin) // one.itemsize, dtype=torch.bool)
    offset = (place.start - origin) // one.itemsize
    used.as_strided(one.shape, one.stride(), offset).fill_(True)
    offset = (other_place.start - origin) // one.itemsize
    return bool(used.as_strided(other.shape, other.stride(), offset).any())


def _addresses(tensor: Tensor) -> range:
    """Of its bytes; of a tensor without numbers an address that no other has."""
    local = local_tensor(tensor)
    try:
        begin = local.data_ptr()
    except RuntimeError:  # of sparse and other special tensors
        begin = 0
    if begin == 0 or local.numel() == 0:
        return range(id(tensor), id(tensor) + 1)
    steps = zip(local.shape, local.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return range(begin, begin + (last + 1) * local.itemsize)
