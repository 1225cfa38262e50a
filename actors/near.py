"""Buckets between processes of one machine: the memory is handed over, its bytes stay where they are.

Over gloo a bucket crosses the kernel twice and is written once more by its receiver. Here rank 0 packs it into a memory
file; a receiver on the same machine gets the file's descriptor over a Unix socket, maps it and reads in place.

    sender     post(buffer) --- number, size, and the descriptor if it is new ---> receiver    take() -> the same memory

The memory is used again: two publications later (the one between is the copy for a roll-back) its pages are there on
both sides, and nothing is left to fault in. Whoever gives memory back (`Memory.give`) says that no receiver reads it
any more. Knows neither torch's process groups nor vLLM; `wire.WireGroup` decides who is near.
"""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import struct
import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch

_NOTE = struct.Struct("qq")  # the memory's number, its bytes
_RANK = struct.Struct("i")
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid of the other end


@dataclass
class Memory:
    """Host memory that other processes can map, used again once it is given back. Lives as long as its owner."""

    _free: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))  # size -> buffers
    _files: dict[int, tuple[int, int]] = field(default_factory=dict)  # address -> (number, descriptor)

    def take(self, size: int) -> torch.Tensor:
        """uint8 [size], contents undefined."""
        if self._free[size]:
            return self._free[size].pop()
        descriptor = os.memfd_create("aster-weights", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        buffer = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
        self._files[buffer.data_ptr()] = len(self._files), descriptor
        return buffer

    def __contains__(self, buffer: torch.Tensor) -> bool:
        return buffer.data_ptr() in self._files

    def give(self, buffer: torch.Tensor) -> None:
        """`buffer` may be overwritten: whoever received it has read it."""
        self._free[len(buffer)].append(buffer)

    def file(self, buffer: torch.Tensor) -> tuple[int, int]:
        """(number, descriptor) of memory that `take` gave."""
        return self._files[buffer.data_ptr()]

    def __del__(self) -> None:
        for _, descriptor in self._files.values():
            os.close(descriptor)


class NearSender:
    """Rank 0's end: `name` is where receivers find it, an abstract Unix socket."""

    def __init__(self) -> None:
        self.name = f"aster-weights-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"\0{self.name}")
        self._listener.listen(1024)
        self._peers: dict[int, socket.socket] = {}
        self._told: set[int] = set()  # numbers of memories whose descriptor the peers have

    def accept(self, ranks: set[int], *, timeout_s: float) -> None:
        """Until all of `ranks` are connected. Raises RuntimeError naming those that are not."""
        deadline = time.monotonic() + timeout_s
        while missing := ranks - self._peers.keys():
            self._listener.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                peer, _ = self._listener.accept()
            except TimeoutError:
                raise RuntimeError(f"ranks {sorted(missing)} did not connect within {timeout_s:g} s") from None
            peer.settimeout(timeout_s)
            if hello := peer.recv(_RANK.size):  # "" = it saw a stranger here and left
                self._peers[_RANK.unpack(hello)[0]] = peer
        self._listener.close()

    def post(self, memory: Memory, buffer: torch.Tensor) -> None:
        """Every peer may read `buffer`. Raises RuntimeError naming one that is gone or takes nothing any more."""
        number, descriptor = memory.file(buffer)
        new = [] if number in self._told else [descriptor]
        for rank, peer in self._peers.items():
            try:
                socket.send_fds(peer, [_NOTE.pack(number, len(buffer))], new)
            except OSError as error:
                raise RuntimeError(f"rank {rank} of the weight group is gone: {error}") from error
        self._told.add(number)

    def close(self) -> None:
        for end in (self._listener, *self._peers.values()):
            end.close()


class NearReceiver:
    """The end of a rank on the sender's machine."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._mapped: dict[int, torch.Tensor] = {}

    @classmethod
    def connect(cls, name: str, rank: int, *, timeout_s: float) -> NearReceiver | None:
        """None where no process of our user answers to `name`: the sender is on another machine, or sealed off."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(timeout_s)
        try:
            connection.connect(f"\0{name}")
        except OSError:
            connection.close()
            return None
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(credentials)[1] != os.getuid():
            connection.close()
            return None
        connection.send(_RANK.pack(rank))
        return cls(connection)

    def take(self) -> torch.Tensor:
        """The next bucket, uint8; valid until the sender uses that memory again. Writing to it changes nothing there.

        Raises RuntimeError when the sender is gone or silent.
        """
        try:
            note, descriptors, _, _ = socket.recv_fds(self._connection, _NOTE.size, 1)
        except OSError as error:
            raise RuntimeError(f"the sender of the weights sent nothing: {error}") from error
        if not note:
            raise RuntimeError("the sender of the weights closed the connection")
        number, size = _NOTE.unpack(note)
        for descriptor in descriptors:
            mapped = mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE)
            os.close(descriptor)
            self._mapped[number] = torch.frombuffer(mapped, dtype=torch.uint8)
        return self._mapped[number]

    def close(self) -> None:
        self._connection.close()
        self._mapped.clear()
