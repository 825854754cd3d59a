"""What every configuration is made of: sections that validate themselves, and the types of their fields."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.reading import is_text, path_problem
from alphasmith.objectives.text import is_control

#: Numbers of things: more would not fit into what holds them (columns of databases, indices of tensors).
MANY = 10**7


def one_or_more(value: object) -> object:
    """A single choice -> a tuple of one; lists pass through to pydantic."""
    return (value,) if isinstance(value, str) else value


def distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    """At least one choice, none of them twice; a ``ValueError`` otherwise."""
    if not values or len(set(values)) != len(values):
        raise ValueError(f"{list(values)} is empty or names a choice twice")
    return values


def _label(value: str) -> str:
    if any(is_control(character) for character in value):
        raise ValueError("it holds control characters")
    return value


def _user_path(value: Path) -> Path:
    problem = path_problem(value)
    if problem:
        raise ValueError(f"it {problem}")
    return value.expanduser()


def _given_path(value: object) -> object:
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and not is_text(value):
        raise ValueError("it is not UTF-8")  # pydantic itself fails on it
    return value


#: Text that people and terminals see.
Label = Annotated[str, AfterValidator(_label)]
#: ``module:function``.
CodeName = Annotated[Label, Field(max_length=512)]
#: A path as it was given; whether anything is there is for whoever uses it.
UserPath = Annotated[Path, BeforeValidator(_given_path), AfterValidator(_user_path)]


class Section(BaseModel):
    """Fields that belong together: frozen, nothing unknown, nothing non-finite; what is wrong is one ``InputError``."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def __init__(self, /, **values: Any) -> None:
        """Validate; sections may be given as mappings.

        Raises:
            InputError: Names the dotted field, what is wrong and what to write instead.
        """
        sections = {name: _named(value) for name, value in values.items() if isinstance(value, Mapping)}
        try:
            super().__init__(**{**values, **sections})
        except ValidationError as error:
            raise _as_input_error(type(self), error) from error


class Configuration(Section):
    """All sections that one call takes."""

    @classmethod
    def build(cls, values: Mapping[str, Any] | Self) -> Self:
        """Validate nested plain values; a configuration is returned as it is.

        Args:
            values: One, or its fields.

        Raises:
            InputError: Names the dotted field, what is wrong and what to write instead.
        """
        if isinstance(values, cls):
            return values
        if not isinstance(values, Mapping):
            remedy = f"give a {cls.__name__} or a mapping of its fields"
            raise InputError("config", f"is a {type(values).__name__}", remedy)
        return cls(**_named(values))


def _named(values: Mapping[Any, Any]) -> dict[str, Any]:
    """As keyword arguments."""
    return {str(name): value for name, value in values.items()}


def _as_input_error(model: type[BaseModel], error: ValidationError) -> InputError:
    first = error.errors(include_url=False)[0]
    # Where a field takes values of several types, the location ends with the type that was tried.
    field = ".".join(p for p in map(str, first["loc"]) if re.fullmatch(r"\w+", p)) or "config"
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):  # of a section, which does not know its own name, or with the whole name
        whole = not first["loc"] or cause.field == field
        return cause if whole else InputError(f"{field}.{cause.field}", cause.problem, cause.remedy)
    if first["type"] == "extra_forbidden":
        known = sorted(model.model_fields)
        near = difflib.get_close_matches(field, known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known fields here are {', '.join(known)}"
        return InputError(field, "unknown field", remedy)
    message = first["msg"].removeprefix("Value error, ")
    given = textwrap.shorten(_shown(first.get("input")), 100, placeholder=" ...")
    return InputError(field, f"{message[0].lower()}{message[1:]}, not {given}", "correct the value")


def _shown(value: object) -> str:
    try:
        return repr(value)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        # Of an integer of thousands of digits there is none, and a script's object may do anything.
        return f"a {type(value).__name__}"
