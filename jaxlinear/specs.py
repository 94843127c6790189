"""``NAME:option=VALUE:option=VALUE``: how something and its options are written on a command line."""

from jaxlinear.errors import UserError


def split(spec: str, prefix: str = "") -> tuple[str, dict[str, str]]:
    """The name and the options, as text. With a prefix, such as ``harness:``, the name comes after it."""
    name, *parts = spec.strip().removeprefix(prefix).split(":")
    options = {}
    for part in parts:
        option, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"{spec!r}: {part!r} is not an option; write NAME:option=VALUE:option=VALUE")
        if option in options:
            raise UserError(f"{spec!r}: {option} is given twice; leave one out")
        options[option] = value
    return name, options
