"""A camera and three programs that look at its pictures: a ring of frames in shared memory, sent once; then only numbers travel.

    python examples/camera.py --frames 300

The camera draws each picture into a free place of the ring and tells the consumers which one; each answers when it has looked,
and a place is free again when all have.  A consumer that is slow misses pictures, as with a real camera, and holds nobody up.
Consumers get the ring read-only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fdshare import Channel, Pipe, shared_array, wait

HEIGHT, WIDTH = 480, 640
PLACES = 8
AT_ONCE = 2  # pictures that one consumer may have before it

Frame = NDArray[np.uint8]


# --- consumers: each runs in a process of its own --------------------------------------------------------------------


def brightness() -> Callable[[Frame], float]:
    """Return a function that is given each picture; its last answer is the consumer's result."""
    seen: list[float] = []

    def look(frame: Frame) -> float:
        seen.append(float(frame.mean()))
        return sum(seen) / len(seen)

    return look


def motion() -> Callable[[Frame], int]:
    """Count the pixels that changed between the pictures that were seen."""
    before: list[Frame] = []
    changed = 0

    def look(frame: Frame) -> int:
        nonlocal changed
        if before:
            changed += int(np.count_nonzero(frame[1:] != before.pop()[1:]))
        before.append(frame.copy())  # the place will be drawn over
        return changed

    return look


def recorder() -> Callable[[Frame], int]:
    """Compress each picture, which takes its time."""
    size = 0

    def look(frame: Frame) -> int:
        nonlocal size
        size += len(zlib.compress(frame.tobytes(), 6))
        return size

    return look


def consume(channel: Channel, make: Callable[[], Callable[[Frame], Any]]) -> None:
    """Be a consumer: look at each picture that is announced, until None is."""
    look, seen, torn, result = make(), 0, 0, None
    with channel:
        ring: NDArray[np.uint8] = channel.recv()
        while (message := channel.recv()) is not None:
            number, place = message
            frame = ring[place]
            result = look(frame)
            torn += stamp_of(frame) != number
            seen += 1
            channel.send(place)
        channel.send((seen, torn, result, ring.flags.writeable))


# --- the camera ------------------------------------------------------------------------------------------------------


def draw(frame: Frame, number: int) -> None:
    """Draw picture ``number``: a square that moves over a background, and the number as a stamp in the first line."""
    frame[:] = 32
    top, left = 40 + number % 300, 40 + number * 3 % 500
    frame[top : top + 80, left : left + 80] = 220
    frame[0, :8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)


def stamp_of(frame: Frame) -> int:
    """Return the number of the picture that is in the frame now."""
    return int.from_bytes(frame[0, :8].tobytes(), "little")


class Consumer:
    """What the camera knows of a consumer."""

    def __init__(self, ring: Frame, make: Callable[[], Callable[[Frame], Any]]) -> None:
        self.name = make.__name__
        self.channel, other = Pipe()
        self.process = multiprocessing.Process(target=consume, args=(other, make))
        self.process.start()
        other.close()
        self.looking = 0
        self.missed = 0
        self.channel.send(ring)  # the one message with a descriptor


def main() -> None:
    """Run the camera, then say who saw what."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=300)
    options = parser.parse_args()
    multiprocessing.set_start_method("spawn")

    ring = shared_array((PLACES, HEIGHT, WIDTH), np.uint8)
    for_reading = ring[:]
    for_reading.flags.writeable = False
    consumers = [Consumer(for_reading, make) for make in (brightness, motion, recorder)]
    by_channel = {consumer.channel: consumer for consumer in consumers}
    users = [0] * PLACES  # how many look at each place

    def collect(timeout: float | None) -> None:
        for channel in wait(by_channel, timeout):
            users[channel.recv()] -= 1
            by_channel[channel].looking -= 1

    begin = time.perf_counter()
    for number in range(options.frames):
        collect(0)
        while all(users):
            collect(None)
        place = users.index(0)
        draw(ring[place], number)
        for consumer in consumers:
            if consumer.looking < AT_ONCE:
                consumer.looking += 1
                users[place] += 1
                consumer.channel.send((number, place))
            else:
                consumer.missed += 1
        if all(consumer.looking == AT_ONCE for consumer in consumers):
            collect(None)  # nobody is ready: the next picture can wait
    while any(users):
        collect(None)
    took = time.perf_counter() - begin

    good = True
    for consumer in consumers:
        consumer.channel.send(None)
        seen, torn, result, writeable = consumer.channel.recv()
        consumer.channel.close()
        consumer.process.join()
        print(
            f"{consumer.name} saw {seen} pictures and missed {consumer.missed}, {torn} torn; result {result}"
        )
        good &= seen + consumer.missed == options.frames and not torn and seen > 0 and not writeable
    megabytes = options.frames * HEIGHT * WIDTH / 1e6
    print(
        f"{options.frames} pictures, {megabytes:.0f} MB, in {took:.2f} s; each consumer was sent 1 descriptor"
    )
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
