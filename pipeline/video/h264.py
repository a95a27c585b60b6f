"""Reads H.264 parameter sets and slice headers. Section numbers are those of ITU-T H.264."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from vidshard.pipeline.video.bit_reader import Bits, payload, units

_WITH_CHROMA_FORMAT = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135})
_P, _B, _I, _SP, _SI = range(5)


def parameter_sets(extradata: bytes) -> tuple[int, list[tuple[bytes, int]]]:
    """Locate parameter sets in an mp4's configuration record (ISO 14496-15, 5.3.3.1) or behind start codes.

    Returns:
        Bytes of a unit's length in packets, 0 for start codes; and for each parameter set the data and its offset.
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
class SequenceParameters:
    """A sequence parameter set (SPS) up to frame_mbs_only_flag, 7.3.2.1.1."""

    id: int
    separate_planes: bool
    has_chroma: bool
    """Whether slices hold chroma; False for three separate planes."""
    frame_num_bits: int
    order_type: int
    """pic_order_cnt_type."""
    order_bits: int
    """Bits of pic_order_cnt_lsb, for type 0."""
    states_order: bool
    """Whether slice headers hold delta_pic_order_cnt, for type 1."""
    allows_gaps: bool
    """gaps_in_frame_num_value_allowed_flag."""
    frames_only: bool
    """Whether no picture is a field: two fields make a frame, and they may come in two packets."""

    @classmethod
    def read(cls, bits: Bits) -> SequenceParameters:
        """Parse the bits after the unit's first byte.

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
        frame_num_bits = bits.take_unsigned() + 4
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
        allows_gaps = bool(bits.take(1))
        bits.take_unsigned()
        bits.take_unsigned()
        return cls(
            id=number,
            separate_planes=bool(separate_planes),
            has_chroma=chroma_format != 0 and not separate_planes,
            frame_num_bits=frame_num_bits,
            order_type=order_type,
            order_bits=order_bits,
            states_order=states_order,
            allows_gaps=allows_gaps,
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
    """Facts from the only SPS of an mp4's header that tell whether the header is enough to open a stream."""

    square: bool
    """Whether pixels are square, or their shape is not stated."""
    num_reordered: int | None
    """Pictures that may precede another one in decoding order and follow it in presentation (max_num_reorder_frames);
    None where that is not stated."""


def usability_of(extradata: bytes) -> Usability | None:
    """Read an mp4's configuration record (ISO 14496-15, 5.3.3.1); None where it is none, or has several SPS."""
    if extradata[:1] != b"\1" or len(extradata) <= 8 or extradata[5] & 31 != 1:
        return None
    bits = payload(extradata, 9)
    try:
        if not SequenceParameters.read(bits).frames_only:
            bits.take(1)
        bits.take(1)
        if bits.take(1):
            for _ in range(4):
                bits.take_unsigned()
        return _usability(bits) if bits.take(1) else Usability(square=True, num_reordered=None)
    except EOFError:
        return None


def _usability(bits: Bits) -> Usability:
    """Parse the video usability information, E.1.1."""
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
    if not bits.take(1):
        return Usability(square=square, num_reordered=None)
    bits.take(1)
    for _ in range(4):
        bits.take_unsigned()
    return Usability(square=square, num_reordered=bits.take_unsigned())


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
class _PictureParameters:
    """A picture parameter set (PPS), 7.3.2.2, as far as slice headers depend on it."""

    id: int
    sequence_id: int
    states_field_order: bool
    num_references: tuple[int, int]
    is_weighted: tuple[bool, bool]
    """Whether weights are explicit, for P and for B slices."""
    may_be_redundant: bool

    @classmethod
    def read(cls, bits: Bits) -> _PictureParameters | None:
        """Parse the bits after the unit's first byte; None for slice groups, which no encoder writes.

        Raises:
            EOFError: it is cut off.
        """
        number, sequence_id = bits.take_unsigned(), bits.take_unsigned()
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
            sequence_id=sequence_id,
            states_field_order=states_field_order,
            num_references=references,
            is_weighted=weighted,
            may_be_redundant=bool(bits.take(1)),
        )


class ParameterSets:
    """The sequence and picture parameter sets of a stream, the latest of each id."""

    def __init__(self, extradata: bytes) -> None:
        """Learn the sets of a stream's header; packets may bring others."""
        self.sequences: dict[int, SequenceParameters] = {}
        self.pictures: dict[int, _PictureParameters] = {}
        self.length_bytes, found = parameter_sets(extradata)
        """Bytes of a unit's length in packets; 0 for start codes."""
        for data, at in found:
            self.learn(data, at)

    def learn(self, data: bytes, at: int) -> None:
        """Learn the unit at an offset, if it is a parameter set; one that is cut off is ignored."""
        kind = data[at] & 31
        if kind in (7, 8):
            with suppress(EOFError):
                bits = payload(data, at + 1)
                if kind == 7:
                    sequence = SequenceParameters.read(bits)
                    self.sequences[sequence.id] = sequence
                elif (pictures := _PictureParameters.read(bits)) is not None:
                    self.pictures[pictures.id] = pictures


class PictureNumbers:
    """Detects missing reference pictures by frame_num; FFmpeg silently puts another picture in their place.

    frame_num grows by one after each reference picture, 7.4.3. Pictures that none references may be missing
    unnoticed: no other is wrong without them. Nothing counts as missing where a stream allows gaps, or where its
    headers are not understood.
    """

    def __init__(self, extradata: bytes) -> None:
        """Follow a stream with these parameter sets in its header; its packets may bring others."""
        self._sets = ParameterSets(extradata)
        self._frame_num: int | None = None  # the last reference picture's; None where it is not known
        self._slice = b""  # the start of that picture's first slice

    def is_one_missing(self, data: bytes, is_keyframe: bool) -> bool:
        """Whether a reference picture is missing before a packet's picture; packets come in decoding order.

        Args:
            data: the packet.
            is_keyframe: whether decoding may start with it, so that nothing missing does harm.
        """
        for at in units(data, self._sets.length_bytes):
            kind = data[at] & 31
            if kind in (1, 5):
                return self._is_gap(data, at, is_keyframe)
            self._sets.learn(data, at)
        return False

    def _is_gap(self, data: bytes, at: int, is_keyframe: bool) -> bool:
        before, self._frame_num = self._frame_num, None
        try:
            bits = payload(data, at + 1, 32)
            bits.take_unsigned()
            bits.take_unsigned()
            pictures = self._sets.pictures.get(bits.take_unsigned())
            sequence = None if pictures is None else self._sets.sequences.get(pictures.sequence_id)
            if sequence is None:
                return False
            if sequence.separate_planes:
                bits.take(2)
            frame_num = bits.take(sequence.frame_num_bits)
        except EOFError:
            return False
        slice_before = self._slice
        if data[at] >> 5 & 3:  # nal_ref_idc: a reference picture
            self._frame_num, self._slice = frame_num, data[at : at + 512]
        else:
            self._frame_num = before
        if before is None or is_keyframe or data[at] & 31 == 5 or sequence.allows_gaps:
            return False
        if frame_num in (before, (before + 1) % (1 << sequence.frame_num_bits)):
            return False
        return frame_num > 1 or not self._resets_numbers(slice_before)

    def _resets_numbers(self, data: bytes) -> bool:
        """Whether frame_num starts again after a reference picture, as after an IDR picture; True where unknown."""
        try:
            return 5 in _memory_operations(data, self._sets)
        except (EOFError, KeyError):
            return True


def _memory_operations(data: bytes, sets: ParameterSets) -> Iterator[int]:
    """The memory management control operations in a reference picture's first slice header, 7.3.3 to 7.3.3.3.

    Raises:
        EOFError: the header is cut off.
        KeyError: it refers to an unknown parameter set.
    """
    is_idr, bits = data[0] & 31 == 5, payload(data, 1)
    bits.take_unsigned()
    kind = bits.take_unsigned() % 5
    pictures = sets.pictures[bits.take_unsigned()]
    sequence = sets.sequences[pictures.sequence_id]
    _skip_to_references(bits, is_idr, pictures, sequence)
    if is_idr:
        return
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


def _skip_to_references(bits: Bits, is_idr: bool, pictures: _PictureParameters, sequence: SequenceParameters) -> None:
    """Skip the slice header from colour_plane_id to redundant_pic_cnt, 7.3.3; of an IDR picture only its first part."""
    if sequence.separate_planes:
        bits.take(2)
    bits.take(sequence.frame_num_bits)
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


def _skip_weights(bits: Bits, num_references: list[int], has_chroma: bool) -> None:
    """Skip pred_weight_table, 7.3.3.2."""
    bits.take_unsigned()
    if has_chroma:
        bits.take_unsigned()
    for count in num_references:
        for _ in range(count):
            for values in (2, 4)[: 2 if has_chroma else 1]:
                if bits.take(1):
                    for _ in range(values):
                        bits.take_signed()
