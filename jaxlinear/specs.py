"""``NAME:option=VALUE:option=VALUE``: how something and its options are written on a command line."""

from jaxlinear.errors import UserError


def split(spec: str, prefix: str = "") -> tuple[str, dict[str, str]]:
    """The name and the options, as text. The name comes after the prefix and a colon, or is empty if there is no more."""
    name, *parts = spec.strip().removeprefix(prefix).removeprefix(":").split(":")
    options = {}
    for part in parts:
        option, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"{spec!r}: {part!r} is not an option; write NAME:option=VALUE:option=VALUE")
        if option in options:
            raise UserError(f"{spec!r}: {option} is given twice; leave one out")
        options[option] = value
    return name, options
