"""Values as text, each in one way everywhere: sizes, numbers, durations, times, names, errors."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from alphasmith.objectives.errors import AlphasmithError

#: Characters that turn the direction of what follows: by them a name can look like another.
_TURNS = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_MOMENT = re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(?:\.\d+)?(?:Z|\+00:00)")


def size_text(count: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1, e.g. ``1.5 GiB``; ``n/a`` when there is none."""
    if not math.isfinite(count):
        return "n/a"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def number(value: float | None) -> str:
    """A loss or ratio with three significant digits, e.g. ``3.31e-4`` or ``0.912``; ``n/a`` when there is none."""
    if value is None or not math.isfinite(value):
        return "n/a"
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def counted(count: int, noun: str) -> str:
    """A number of things, e.g. ``1 site``, ``3 sites`` or ``2 batches``."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}{'es' if noun.endswith(('ch', 's', 'x')) else 's'}"


def duration(seconds: float) -> str:
    """A length of time in its two largest units, e.g. ``0.25 s``, ``14 min`` or ``3 h 12 min``; ``n/a`` when there is none."""
    if not math.isfinite(seconds):
        return "n/a"
    seconds = max(0.0, seconds)
    if round(seconds, 1) < 10:
        return f"{seconds:.2g} s"
    if round(seconds) < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def with_times(text: str) -> str:
    """A text with its ISO times as a reader expects them, e.g. ``2026-03-01 14:05:00 UTC``."""
    return _MOMENT.sub(r"\1 \2 UTC", text)


def shortened(name: str, width: int = 34) -> str:
    """A name of at most ``width`` characters, cut in the middle: begin and end tell sites apart."""
    if len(name) <= width:
        return name
    head = width // 3
    return f"{name[:head]}...{name[len(name) - (width - head - 3) :]}"


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few of many names, e.g. ``a, b and 3 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is one that ``fnmatch`` patterns mean, upper and lower case told apart."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def visible(text: str) -> str:
    """A text as a terminal may have it: control characters, turned writing and half surrogate pairs are written out.

    Line breaks and tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in "\n\t" or not is_control(c) else c.encode("unicode_escape").decode() for c in text)


def is_control(character: str) -> bool:
    """Whether a character steers a terminal or the order of writing, separates lines or paragraphs, or has no UTF-8 form."""
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        return True
    return character in _TURNS


def one_line(value: object, most: int | None = None) -> str:
    """A text without line breaks and control characters, of at most ``most`` characters."""
    line = visible(" ".join(filter(None, (part.strip() for part in str(value).splitlines()))))
    return line if most is None or len(line) <= most else f"{line[: most - 3]}..."


def error_line(error: BaseException, most: int | None = None) -> str:
    """An error in one line of at most ``most`` characters; errors that are not ours begin with their type."""
    told, kind = one_line(error), type(error).__name__
    if not isinstance(error, AlphasmithError) or not told:
        told = f"{kind}: {told}" if told else kind
    return one_line(told, most)
