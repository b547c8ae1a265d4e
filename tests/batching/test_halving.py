"""Batches that exceed a GPU's memory, which the tests raise as torch does."""

import torch

from fusion_hf.inference.halving import run_halving


class Memory:
    """Holds up to `room` items of a batch, and none called "huge"."""

    def __init__(self, room: int):
        self.room = room
        self.calls: list[int] = []

    def run(self, batch: list[str]) -> list[str]:
        self.calls.append(len(batch))
        if len(batch) > self.room or "huge" in batch:
            raise torch.OutOfMemoryError("no room")
        return batch


def refuse(batch: list[str], reason: str) -> list[str]:
    assert "no room" in reason
    return [f"refused {name}" for name in batch]


def test_one_that_is_too_large_is_halved_and_so_are_those_behind_it():
    memory = Memory(2)
    outputs = list(run_halving([["a"], list("bcdefghi"), list("jklm")], memory.run, refuse))
    assert [name for output in outputs for name in output] == list("abcdefghijklm")
    assert memory.calls == [1, 8, 4, 2, 2, 2, 2, 2, 2]


def test_what_has_no_room_alone_is_refused_and_the_others_are_not():
    outputs = list(run_halving([["a", "huge", "b"], ["c"]], Memory(3).run, refuse))
    assert [name for output in outputs for name in output] == ["a", "refused huge", "b", "c"]
