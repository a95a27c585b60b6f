"""What H.264 says in its parameter sets and at the head of its pictures. Sections are those of ITU-T H.264."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from vidshard.pipeline.video.bit_reader import Bits, payload, units

_WITH_CHROMA_FORMAT = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135})
_P, _B, _I, _SP, _SI = range(5)


def parameter_sets(extradata: bytes) -> tuple[int, list[tuple[bytes, int]]]:
    """How many bytes a unit's length takes in packets, 0 for start codes, and where parameter sets lie in what.

    Of an mp4's configuration record, 5.3.3.1 of ISO 14496-15, or of units behind start codes.
    """
    if extradata[:1] != b"\1" or len(extradata) <= 8:
        return 0, [(extradata, at) for at in units(extradata, 0)]
    found = []
    at = 5
    for mask in (31, 255):  # sequence parameter sets, then picture parameter sets
        if at >= len(extradata):
            break
        count = extradata[at] & mask
        at += 1
        for _ in range(count):
            if at + 2 < len(extradata):
                found.append((extradata, at + 2))
            at += 2 + int.from_bytes(extradata[at : at + 2], "big")
    return (extradata[4] & 3) + 1, found


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequence:
    """A sequence parameter set up to frame_mbs_only_flag, 7.3.2.1.1."""

    id: int
    separate_planes: bool
    has_chroma: bool
    """In the slices of a picture: not of three separate planes."""
    number_bits: int
    order_type: int
    order_bits: int
    """Of a picture's order, with type 0."""
    states_order: bool
    """Whether pictures say how far they are from the order that is expected, with type 1."""
    may_skip_numbers: bool
    frames_only: bool
    """Whether no picture is a field: two of those make a frame, and they may come in two packets."""

    @classmethod
    def read(cls, bits: Bits) -> Sequence:
        """From the bits behind the unit's first byte.

        Raises:
            EOFError: it is cut off.
        """
        profile = bits.take(8)
        bits.take(16)
        number = bits.take_unsigned()
        chroma_format, separate_planes = 1, 0
        if profile in _WITH_CHROMA_FORMAT:
            chroma_format = bits.take_unsigned()
            if chroma_format == 3:
                separate_planes = bits.take(1)
            bits.take_unsigned()
            bits.take_unsigned()
            bits.take(1)
            if bits.take(1):
                for matrix in range(8 if chroma_format != 3 else 12):
                    if bits.take(1):
                        _skip_scaling_list(bits, 16 if matrix < 6 else 64)
        number_bits = bits.take_unsigned() + 4
        order_type, order_bits, states_order = bits.take_unsigned(), 0, False
        if order_type == 0:
            order_bits = bits.take_unsigned() + 4
        elif order_type == 1:
            states_order = not bits.take(1)
            bits.take_signed()
            bits.take_signed()
            for _ in range(bits.take_unsigned()):
                bits.take_signed()
        bits.take_unsigned()
        may_skip_numbers = bool(bits.take(1))
        bits.take_unsigned()
        bits.take_unsigned()
        return cls(
            id=number,
            separate_planes=bool(separate_planes),
            has_chroma=chroma_format != 0 and not separate_planes,
            number_bits=number_bits,
            order_type=order_type,
            order_bits=order_bits,
            states_order=states_order,
            may_skip_numbers=may_skip_numbers,
            frames_only=bool(bits.take(1)),
        )


def _skip_scaling_list(bits: Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.take_signed()) % 256
        last = following or last


@dataclass(frozen=True, kw_only=True, slots=True)
class Usability:
    """What the one sequence parameter set of an mp4's header says beside the size."""

    square: bool
    """Whether it states no other shape of its pixels."""
    states_reordering: bool
    """Whether it limits by how many pictures the order shown differs from that of decoding."""


def usability_of(extradata: bytes) -> Usability | None:
    """Of an mp4's configuration record, 5.3.3.1 of ISO 14496-15; None where it is none, or has several sets."""
    if extradata[:1] != b"\1" or len(extradata) <= 8 or extradata[5] & 31 != 1:
        return None
    bits = payload(extradata, 9)
    try:
        if not Sequence.read(bits).frames_only:
            bits.take(1)
        bits.take(1)
        if bits.take(1):
            for _ in range(4):
                bits.take_unsigned()
        return _usability(bits) if bits.take(1) else Usability(square=True, states_reordering=False)
    except EOFError:
        return None


def _usability(bits: Bits) -> Usability:
    """Annex E.1.1."""
    square = True
    if bits.take(1):
        square = bits.take(8) in (0, 1)
    if bits.take(1):
        bits.take(1)
    if bits.take(1):
        bits.take(4)
        if bits.take(1):
            bits.take(24)
    if bits.take(1):
        bits.take_unsigned()
        bits.take_unsigned()
    if bits.take(1):
        bits.take(65)
    with_buffers = [bits.take(1) and _skip_buffer_model(bits), bits.take(1) and _skip_buffer_model(bits)]
    if any(with_buffers):
        bits.take(1)
    bits.take(1)
    return Usability(square=square, states_reordering=bool(bits.take(1)))


def _skip_buffer_model(bits: Bits) -> bool:
    count = bits.take_unsigned() + 1
    bits.take(8)
    for _ in range(count):
        bits.take_unsigned()
        bits.take_unsigned()
        bits.take(1)
    bits.take(20)
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pictures:
    """A picture parameter set, 7.3.2.2, as far as the heads of slices depend on it."""

    id: int
    sequence: int
    states_field_order: bool
    num_references: tuple[int, int]
    is_weighted: tuple[bool, bool]
    """P, B."""
    may_be_redundant: bool

    @classmethod
    def read(cls, bits: Bits) -> _Pictures | None:
        """None for slices in groups, which nobody writes."""
        number, sequence = bits.take_unsigned(), bits.take_unsigned()
        bits.take(1)
        states_field_order = bool(bits.take(1))
        if bits.take_unsigned():
            return None
        references = bits.take_unsigned() + 1, bits.take_unsigned() + 1
        weighted = bool(bits.take(1)), bits.take(2) == 1
        for _ in range(3):
            bits.take_signed()
        bits.take(2)
        return cls(
            id=number,
            sequence=sequence,
            states_field_order=states_field_order,
            num_references=references,
            is_weighted=weighted,
            may_be_redundant=bool(bits.take(1)),
        )


class PictureNumbers:
    """Finds out that a picture which others refer to is missing: FFmpeg says nothing, and puts another in its place.

    Pictures are numbered, and the number moves on by one behind each that may be referred to, 7.4.3. Pictures that
    none refers to may be missing unnoticed: no other is wrong without them. Where a stream may skip numbers, or what
    it says is not understood, nothing is missing.
    """

    def __init__(self, extradata: bytes) -> None:
        """Of a stream with these parameter sets; its packets may bring others."""
        self._sequences: dict[int, Sequence] = {}
        self._pictures: dict[int, _Pictures] = {}
        self._before: int | None = None
        """Number of the last picture that may be referred to; None where it is not known."""
        self._head_before = b""
        self._length_bytes, found = parameter_sets(extradata)
        for data, at in found:
            self._learn(data, at)

    def is_one_missing(self, data: bytes, is_keyframe: bool) -> bool:
        """Whether one is missing before the picture of a packet; packets are given in the order of decoding.

        Args:
            data: the packet.
            is_keyframe: whether decoding may begin with it, so that it does no harm.
        """
        for at in units(data, self._length_bytes):
            kind = data[at] & 31
            if kind in (1, 5):
                return self._is_gap(data, at, is_keyframe)
            self._learn(data, at)
        return False

    def _learn(self, data: bytes, at: int) -> None:
        kind = data[at] & 31
        if kind in (7, 8):
            with suppress(EOFError):
                bits = payload(data, at + 1)
                if kind == 7:
                    sequence = Sequence.read(bits)
                    self._sequences[sequence.id] = sequence
                elif (pictures := _Pictures.read(bits)) is not None:
                    self._pictures[pictures.id] = pictures

    def _is_gap(self, data: bytes, at: int, is_keyframe: bool) -> bool:
        before, self._before = self._before, None
        try:
            bits = payload(data, at + 1, 32)
            bits.take_unsigned()
            bits.take_unsigned()
            pictures = self._pictures.get(bits.take_unsigned())
            sequence = None if pictures is None else self._sequences.get(pictures.sequence)
            if sequence is None:
                return False
            if sequence.separate_planes:
                bits.take(2)
            number = bits.take(sequence.number_bits)
        except EOFError:
            return False
        head_before = self._head_before
        if data[at] >> 5 & 3:
            self._before, self._head_before = number, data[at : at + 512]
        else:
            self._before = before
        if before is None or is_keyframe or data[at] & 31 == 5 or sequence.may_skip_numbers:
            return False
        if number in (before, (before + 1) % (1 << sequence.number_bits)):
            return False
        return number > 1 or not self._starts_anew(head_before)

    def _starts_anew(self, head: bytes) -> bool:
        """Whether pictures behind a reference picture are numbered as behind an IDR one, or perhaps are."""
        try:
            return 5 in self._memory_operations(head)
        except (EOFError, KeyError):
            return True

    def _memory_operations(self, head: bytes) -> Iterator[int]:
        """Of a reference picture's first slice, 7.3.3 to 7.3.3.3."""
        is_idr, bits = head[0] & 31 == 5, payload(head, 1)
        bits.take_unsigned()
        kind = bits.take_unsigned() % 5
        pictures = self._pictures[bits.take_unsigned()]
        sequence = self._sequences[pictures.sequence]
        if sequence.separate_planes:
            bits.take(2)
        bits.take(sequence.number_bits)
        is_field = 0
        if not sequence.frames_only and (is_field := bits.take(1)):
            bits.take(1)
        if is_idr:
            return
        two_orders = pictures.states_field_order and not is_field
        if sequence.order_type == 0:
            bits.take(sequence.order_bits)
            if two_orders:
                bits.take_signed()
        elif sequence.order_type == 1 and sequence.states_order:
            bits.take_signed()
            if two_orders:
                bits.take_signed()
        if pictures.may_be_redundant:
            bits.take_unsigned()
        if kind == _B:
            bits.take(1)
        num_references = list(pictures.num_references[: {_I: 0, _SI: 0, _B: 2}.get(kind, 1)])
        if num_references and bits.take(1):
            num_references = [bits.take_unsigned() + 1 for _ in num_references]
        for _ in num_references:
            if bits.take(1):
                while bits.take_unsigned() != 3:
                    bits.take_unsigned()
        if num_references and pictures.is_weighted[kind == _B]:
            _skip_weights(bits, num_references, sequence.has_chroma)
        if not bits.take(1):
            return
        while operation := bits.take_unsigned():
            yield operation
            for _ in range({3: 2, 5: 0}.get(operation, 1)):
                bits.take_unsigned()


def _skip_weights(bits: Bits, num_references: list[int], has_chroma: bool) -> None:
    """7.3.3.2."""
    bits.take_unsigned()
    if has_chroma:
        bits.take_unsigned()
    for count in num_references:
        for _ in range(count):
            for values in (2, 4)[: 2 if has_chroma else 1]:
                if bits.take(1):
                    for _ in range(values):
                        bits.take_signed()
