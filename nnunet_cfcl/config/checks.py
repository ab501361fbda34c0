"""Declaration of a setting, and the check of its value against type and range."""

from __future__ import annotations

import types
from dataclasses import field, fields
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from nnunet_cfcl.errors import UserError, shown


class SettingsError(UserError):
    """Unknown key, wrong type or value out of range; the message names the key."""


#: Parts of a run that read settings which other runs ignore: pretraining objectives, their labels, the generator, the
#: acquisition effects.
Reader: TypeAlias = Literal[
    "dual_view", "multi_view", "image_contrast", "pixpro", "masked_autoencoder", "labels", "generator", "acquisition"]


def setting(
    default: Any, meaning: str, low: float | None = None, high: float | None = None, *,
    read_by: tuple[Reader, ...] = (), identity: bool = True,
) -> Any:
    """Declare a setting as a dataclass field.

    Args:
        default: default value.
        meaning: description for the documentation.
        low, high: inclusive range; for a pair, of both members.
        read_by: the parts of a run that read the setting; empty: every run.
        identity: whether a run's result depends on it, see `identity_settings`; False for speed, memory, pictures and
            later phases.
    """
    metadata = {"meaning": meaning, "low": low, "high": high, "read_by": read_by, "identity": identity}
    return field(default=default, metadata=metadata)


def section(kind: type, *, read_by: tuple[Reader, ...] = (), identity: bool = True) -> Any:
    """Declare a section of settings as a dataclass field; ``read_by`` and ``identity`` hold for all its settings."""
    return field(default_factory=kind, metadata={"read_by": read_by, "identity": identity})


def checked_value(section: Any, name: str, value: Any, what: str) -> Any:
    """Convert a JSON value to the annotated type of a setting.

    Args:
        section: dataclass with the setting.
        name: name of the setting.
        value: JSON value.
        what: start of every message.

    Raises:
        SettingsError: a wrong type, or a value out of range.
    """
    hint = get_type_hints(type(section))[name]
    converted = _converted(value, hint, what)
    metadata = next(f.metadata for f in fields(section) if f.name == name)
    members = converted if isinstance(converted, tuple) else (converted,)
    for member in members:
        if isinstance(member, (int, float)) and not isinstance(member, bool):
            _check_range(member, metadata["low"], metadata["high"], what)
    if get_origin(hint) is tuple and Ellipsis not in get_args(hint) and converted[0] > converted[1]:
        raise SettingsError(f"{what} must be [low, high] with low <= high, found {list(converted)}")
    return converted


def _check_range(value: float, low: float | None, high: float | None, what: str) -> None:
    # negated comparisons reject NaN too
    if (low is not None and not value >= low) or (high is not None and not value <= high) or value != value:
        bounds = " and ".join(f"{sign} {bound:g}" for sign, bound in ((">=", low), ("<=", high)) if bound is not None)
        raise SettingsError(f"{what} must be {bounds}, found {value}")


def _converted(value: Any, hint: Any, what: str) -> Any:
    """Convert ``value`` to the annotated type; JSON lists become tuples, integers are accepted as floats."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        # bool | str: JSON distinguishes them
        hint = bool if bool in inner and isinstance(value, bool) else inner[-1]
        return None if value is None else _converted(value, hint, what)
    if origin is Literal:
        if value not in arguments:
            raise SettingsError(f"{what} must be one of {', '.join(map(repr, arguments))}, found {shown(value)}")
        return value
    if origin is tuple:
        return _converted_tuple(value, arguments, what)
    accepted = (int, float) if hint is float else (hint,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise SettingsError(f"{what} must be {_name_of(hint)}, found {shown(value)}")
    try:
        return hint(value)
    except OverflowError as error:
        raise SettingsError(f"{what} must fit into a number of double precision, found {shown(value)}") from error


def _converted_tuple(value: Any, arguments: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    length = None if Ellipsis in arguments else len(arguments)
    if not isinstance(value, (list, tuple)) or (length is not None and len(value) != length):
        raise SettingsError(f"{what} must be a list{f' of {length} numbers' if length else ''}, found {shown(value)}")
    return tuple(_converted(member, arguments[0], what) for member in value)


def _name_of(hint: type) -> str:
    return {int: "an integer", float: "a number", bool: "true or false", str: "a text"}.get(hint, hint.__name__)
