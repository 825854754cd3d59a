"""Values as text, each in one way everywhere: sizes, numbers, durations, times, names, errors."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from itertools import count as numbers_from

from alphasmith.objectives.errors import AlphasmithError, InputError

#: Characters that turn the direction of what follows: by them a name can look like another.
_TURNS = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
#: Fewest characters that names are told apart in: a few of their own and a number.
_NARROWEST = 8
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


def number(value: float | None, digits: int = 3) -> str:
    """A loss or ratio, e.g. ``3.31e-4`` or ``0.912``; ``n/a`` when there is none.

    Args:
        value: Any.
        digits: How many are significant, three or more.
    """
    if value is None or not math.isfinite(value):
        return "n/a"
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.{max(0, digits - 4)}f}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
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


def told_apart(names: Sequence[str], width: int) -> list[str]:
    """Names of at most ``width`` characters, different where the names are; those that fit stay as they are.

    The first of these ways that keeps all of them different is taken: without their beginning, which ends at a dot; with parts
    cut to their first letter, from the first part on; without their middle; numbered.

    Args:
        names: Any names; a name given twice is shortened alike.
        width: Most characters of one, 8 or more.

    Raises:
        InputError: ``width`` is below 8.
    """
    if width < _NARROWEST:
        raise InputError("width", f"is {width}", f"give {_NARROWEST} or more characters")
    known = list(dict.fromkeys(names))
    middles = (partial(_without_middle, head=head) for head in _heads(width))
    for cut in chain[Callable[[str, int], str]]((_without_beginning, _with_initials), middles):
        short = {name: name if len(name) <= width else cut(name, width) for name in known}
        if len(set(short.values())) == len(known):
            return [short[name] for name in names]
    taken = {name for name in known if len(name) <= width}
    numbers = numbers_from(1)
    for name in known:
        if len(name) > width:
            marks = (f"~{number}" for number in numbers)
            short[name] = next(t for mark in marks if (t := name[: width - len(mark)] + mark) not in taken)
            taken.add(short[name])
    return [short[name] for name in names]


def _without_beginning(name: str, width: int) -> str:
    """Its last parts behind ``...``, as many whole ones as there is room for."""
    end = name[len(name) - (width - 3) :]
    whole = end if name[len(name) - len(end) - 1] == "." else end.partition(".")[2]
    return f"...{whole or end}"


def _with_initials(name: str, width: int) -> str:
    """With as many of its first parts cut to their first letter as must be; numbers stay whole."""
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if len(".".join(parts)) <= width:
            break
        parts[place] = part if part.isdecimal() else part[:1]
    short = ".".join(parts)
    return short if len(short) <= width else _without_middle(short, width, width // 3)


def _without_middle(name: str, width: int, head: int) -> str:
    return f"{name[:head]}...{name[len(name) - (width - head - 3) :]}"


def _heads(width: int) -> list[int]:
    """How many characters stay before a cut: a third of the width, else any."""
    return [width // 3, *range(1, width - 3)]


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
