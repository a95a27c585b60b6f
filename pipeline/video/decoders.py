"""Decoders that a video may run: a list of those that carry video, which a run can change.

FFmpeg brings some 300 video decoders, 210 for audio and 20 for subtitles, most of them for formats of games and
cameras that nobody maintains any more. A file chooses its decoder, so each is open to an attacker. Only listed ones
run: FFmpeg gets the list itself (``codec_whitelist``), for opening a file and for decoding it, and a stream of another
codec is refused by name.

Of audio, a few decoders run while a file is opened, as transport and program streams state neither rate nor channels
elsewhere: without them FFmpeg would read on, and judge the frame rate of the video by other packets. Decoders of
subtitles never run. Images in archives have a list of their own (``pipeline.video.image_archive``).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from av.codec import Codec, codecs_available
from av.video.stream import VideoStream

from vidshard.schemas.errors import UserError
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Limits

DEFAULT_DECODERS = (
    # today's
    "h264", "hevc", "vvc", "av1", "libdav1d", "vp8", "vp9",
    # MPEG, its relatives, and what films and clips were before
    "mpeg1video", "mpeg2video", "mpeg4", "h261", "h263", "h263i", "h263p", "flv", "msmpeg4v1", "msmpeg4v2", "msmpeg4",
    "wmv1", "wmv2", "wmv3", "vc1", "theora", "vp3", "vp6", "vp6f", "vp6a", "rv30", "rv40", "svq3",
    # cameras and editing
    "mjpeg", "jpeg2000", "prores", "dnxhd", "dvvideo", "cfhd", "ffv1", "ffvhuff", "huffyuv", "utvideo", "magicyuv",
    "qtrle", "rawvideo", "v210",
    # moving pictures of the web
    "gif", "apng", "png",
)  # fmt: skip
"""FFmpeg's names of the decoders that run by default."""


_AUDIO_DECODERS = frozenset(
    {"aac", "aac_latm", "ac3", "dca", "eac3", "mlp", "mp1float", "mp2float", "mp3float", "pcm_bluray", "pcm_dvd"}
    | {"opus", "s302m", "truehd"}
)
"""Decoders of the audio that transport and program streams carry."""


@lru_cache(maxsize=16)
def allowed_decoders(names: tuple[str, ...]) -> frozenset[str] | None:
    """FFmpeg's names of the decoders that may run; None for all of them.

    Args:
        names: of ``Limits.decoders``.
    """
    if "all" in names:
        return None
    return frozenset(name for each in names for name in (DEFAULT_DECODERS if each == "default" else (each,)))


def whitelist(limits: Limits) -> dict[str, str]:
    """FFmpeg's option that lets only the allowed decoders run, for decoding."""
    allowed = allowed_decoders(limits.decoders)
    return {} if allowed is None else {"codec_whitelist": ",".join(sorted(allowed)) or "none"}


def opening_whitelist(limits: Limits, among: frozenset[str] | None = None) -> dict[str, str]:
    """FFmpeg's option that lets only the allowed decoders run, for opening a file.

    Args:
        limits: the run's.
        among: allow none but these; None for no further limit.
    """
    allowed = allowed_decoders(limits.decoders)
    if among is not None:
        names = among if allowed is None else allowed & among
    elif allowed is None:
        return {}
    else:
        names = allowed | _AUDIO_DECODERS
    return {"codec_whitelist": ",".join(sorted(names)) or "none"}


def may_decode(stream: VideoStream, limits: Limits) -> bool:
    """Whether the decoder of a stream, which has one, is allowed."""
    allowed = allowed_decoders(limits.decoders)
    return allowed is None or stream.codec_context.codec.name in allowed


def refuse_decoder(stream: VideoStream, limits: Limits) -> None:
    """Refuse a stream whose decoder is not allowed.

    Raises:
        VideoError: UNSUPPORTED; it names the codec and the setting.
    """
    if not may_decode(stream, limits):
        name = stream.codec_context.codec.name
        raise VideoError(
            Reason.UNSUPPORTED,
            f"its codec is {name}, which is not among the decoders of this run: --decoders "
            f"{','.join((*limits.decoders, name))} allows it",
        )


def refuse_unknown_decoders(names: Iterable[str]) -> None:
    """Refuse names that are no video decoders of this FFmpeg.

    Raises:
        UserError: one is not; the message names it.
    """
    for name in names:
        if name not in ("default", "all") and not _is_video_decoder(name):
            raise UserError(
                f"--decoders: FFmpeg has no video decoder {name!r} here; names are those of 'ffmpeg -decoders', such "
                "as h264, hevc or libdav1d, and 'default' and 'all'"
            )


def _is_video_decoder(name: str) -> bool:
    try:
        return name in codecs_available and Codec(name, "r").type == "video"
    except ValueError:  # there is only an encoder of that name
        return False
