"""follower: every block in order, by copies, a few behind at most; an error stops both sides and neither waits for ever."""

from __future__ import annotations

import threading
import time

import pytest

from loratools.follower import DEPTH, Follower
from loratools.refs import BLOCK_BYTES, Buffer


@pytest.mark.parametrize("pause", [0.0, 0.002], ids=["fast", "slow"])
def test_blocks_come_in_order_though_their_buffer_is_used_again(pause: float) -> None:
    seen: list[bytes] = []

    def take(block: memoryview) -> None:
        time.sleep(pause)
        seen.append(bytes(block))

    buffer = bytearray(3)
    with Follower(take) as follower:
        for number in range(5 * DEPTH):
            buffer[:] = bytes([number] * 3)
            follower.put(buffer)
        follower.finish()
    assert seen == [bytes([number] * 3) for number in range(5 * DEPTH)]


def test_blocks_of_any_size_and_kind() -> None:
    import torch

    from loratools.tensors import tensor_bytes

    large = bytes(range(256)) * (BLOCK_BYTES // 256) + b"and more"
    given: list[Buffer] = [b"", large, tensor_bytes(torch.zeros(0, 3)), tensor_bytes(torch.ones(2, 3)), memoryview(b"ab")]
    seen = bytearray()
    with Follower(seen.extend) as follower:
        for block in given:
            follower.put(block)
        follower.finish()
    assert seen == b"".join(map(bytes, given))


def test_it_is_a_few_blocks_behind_at_most() -> None:
    gate, put = threading.Event(), list[int]()

    def take(block: memoryview) -> None:
        assert gate.wait(20)

    with Follower(take) as follower:

        def maker() -> None:
            for number in range(3 * DEPTH):
                follower.put(b"x")
                put.append(number)

        making = threading.Thread(target=maker)
        making.start()
        time.sleep(0.1)
        held = len(put)
        gate.set()
        making.join(20)
        follower.finish()
    assert held == DEPTH and len(put) == 3 * DEPTH


def test_an_error_reaches_the_maker() -> None:
    """While it makes more, which it is not left waiting for, or at the end."""

    def take(block: memoryview) -> None:
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"), Follower(take) as follower:
        for _ in range(1000):
            follower.put(b"x")
        raise AssertionError("the error was not told")
    with pytest.raises(ValueError, match="no more"), Follower(take) as follower:
        follower.put(b"x")
        follower.finish()


def test_what_is_on_its_way_is_dropped_when_the_maker_fails() -> None:
    seen: list[bytes] = []

    def take(block: memoryview) -> None:
        time.sleep(0.05)
        seen.append(bytes(block))

    with pytest.raises(KeyError), Follower(take) as follower:
        for _ in range(DEPTH):
            follower.put(b"x")
        raise KeyError
    assert len(seen) < DEPTH
