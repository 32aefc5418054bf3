"""Forward passes over stages: sends and receives never deadlock, even without buffers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from parallel import pipeline


class Group:
    """The part of a process group that `pipeline_forward` uses."""

    def __init__(self, name: str, rank: int, size: int) -> None:
        self.name, self.rank, self.size = name, lambda: rank, lambda: size


def exchanges(
    monkeypatch, size: int, virtual_stages: int, microbatches: int, *, one_group: bool
) -> list[list[tuple[str, int, str]]]:
    """(send or recv, peer, group's name) of each rank, in order."""
    said: list[list[tuple[str, int, str]]] = []
    for rank in range(size):
        own: list[tuple[str, int, str]] = []
        fake = SimpleNamespace(
            get_global_rank=lambda group, peer: peer,
            recv=lambda x, peer, group, own=own: own.append(("recv", peer, group.name)),
            isend=lambda x, peer, group, own=own: (
                own.append(("send", peer, group.name)) or SimpleNamespace(wait=lambda: None)
            ),
        )
        monkeypatch.setattr(pipeline, "dist", fake)
        groups = [Group(name, rank, size) for name in ("pp", "pp" if one_group else "world")]
        forwards = [lambda number, hidden: torch.zeros(1)] * virtual_stages
        results = pipeline.pipeline_forward(
            forwards, *groups, microbatches=microbatches, hidden=lambda n: torch.empty(1)
        )
        assert len(results) == (microbatches if rank == size - 1 else 0)
        said.append(own)
    return said


def ends(said: list[list[tuple[str, int, str]]]) -> bool:
    """Whether all of it can happen as NCCL does it: what two ranks exchange over one communicator happens in the order
    in which each asked for it, a send together with its receive; a rank that receives waits before it asks for anything
    more.
    """
    asked: list[dict] = [{} for _ in said]  # by rank: queues by (peer, group)
    at, waits = [0] * len(said), [False] * len(said)
    moved = True
    while moved:
        moved = False
        for rank, own in enumerate(said):
            while not waits[rank] and at[rank] < len(own):
                what, peer, group = own[at[rank]]
                asked[rank].setdefault((peer, group), []).append(what)
                waits[rank], at[rank], moved = what == "recv", at[rank] + 1, True
        for rank, queues in enumerate(asked):
            for (peer, group), queue in queues.items():
                other = asked[peer].get((rank, group), [])
                if queue and other and queue[0] != other[0]:
                    receiver = rank if queue[0] == "recv" else peer
                    waits[receiver], moved = False, True
                    queue.pop(0), other.pop(0)
    return all(place == len(own) for place, own in zip(at, said, strict=True)) and not any(
        q for queues in asked for q in queues.values()
    )


@pytest.mark.parametrize(("size", "virtual_stages"), [(2, 1), (4, 1), (2, 2), (2, 3), (4, 2)])
def test_no_rank_waits_for_ever(monkeypatch, size: int, virtual_stages: int) -> None:
    assert ends(exchanges(monkeypatch, size, virtual_stages, 4, one_group=False))


def test_on_one_communicator_two_ranks_would(monkeypatch) -> None:
    assert not ends(exchanges(monkeypatch, 2, 2, 4, one_group=True))
