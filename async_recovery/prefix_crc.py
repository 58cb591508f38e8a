"""The CRC-32 of everything before an offset, kept while bytes go by.

Two earlier points are kept with it, so that the beginning and the end of what went by can be compared again without
reading all of it: the CRC-32 from one point to the next is checked by going on from the CRC-32 at the first.
"""

from __future__ import annotations

from zlib import crc32


class PrefixCrc:
    """A running CRC-32 with its offset.

    :param grain: distance in bytes of the points that are kept.
    :param offset: bytes that went by already; `value`: their CRC-32.
    :param tail: an earlier point, (offset, CRC-32 up to it).
    :param head: the point at the first grain, if it went by already.

    :ivar tail: the last kept point at least one grain back, or (0, 0).
    """

    __slots__ = ("_boundary", "_grain", "head", "offset", "tail", "value")

    def __init__(
        self,
        grain: int,
        offset: int = 0,
        value: int = 0,
        tail: tuple[int, int] = (0, 0),
        head: tuple[int, int] | None = None,
    ) -> None:
        self._grain = grain
        self.offset = offset
        self.value = value
        self.tail = tail
        self.head = head
        self._boundary = tail

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """`data` goes by."""
        view = memoryview(data)
        while view:
            chunk = view[: self._grain - self.offset % self._grain]
            self.value = crc32(chunk, self.value)
            self.offset += len(chunk)
            view = view[len(chunk) :]
            if self.offset % self._grain == 0:
                self.tail, self._boundary = self._boundary, (self.offset, self.value)
                self.head = self.head or self._boundary
