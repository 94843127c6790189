"""The flags of a program in ``launch/``: the text of ``--help``, and one-line messages for flags that are wrong."""

import difflib
import glob
import os
import re
import traceback

from absl import app, flags

from jaxlinear.errors import UserError

_HELP, _HELP_OF_ALL = {"--help", "-help", "-h"}, {"--helpfull", "-helpfull"}
_NOT_THERE = FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError  # a restart would fail again
_REQUIRED = r"Flag --(\w+) must have a value other than None"  # absl's words


def help_wanted(argv: list[str]) -> bool:
    return not (_HELP | _HELP_OF_ALL).isdisjoint(_own(argv))


def print_help(argv: list[str]) -> None:
    """Prints the program's docstring and flags; with ``--helpfull`` the keys of its config as well."""
    notes = []
    if required := [name for name in flags.FLAGS if _is_required(flags.FLAGS[name])]:
        notes.append("required: " + " ".join(f"--{name}" for name in required))
    if "config" in flags.FLAGS:
        full = not _HELP_OF_ALL.isdisjoint(_own(argv))
        notes.append(_keys() if full else "keys of the config: --helpfull, and docs/configuration.md")
    app.usage(shorthelp=True, writeto_stdout=True, detailed_error="\n".join(notes) or None)


def _own(argv: list[str]) -> list[str]:
    """The arguments before a ``--``."""
    return argv[1 : argv.index("--")] if "--" in argv else argv[1:]


def _is_required(flag: flags.Flag) -> bool:
    return any(re.search(_REQUIRED, validator.message) for validator in flag.validators)


def _keys() -> str:
    from jaxlinear import config as configs

    lines = ["keys of the config:"]
    for key, (_, meaning) in configs.KEYS.items():
        kind, default = configs.kind(key).__name__, configs.default_text(key)
        shown = f"{kind}, by default {default}" if default else kind
        lines.append(f"  --config.{key}: {shown}\n" + flags.text_wrap(meaning, indent="    "))
    return "\n".join(lines)


def parse(argv: list[str]) -> list[str]:
    """Parses the flags and returns the other arguments. An unknown config key or file gives ``UserError``, not a traceback
    of ml_collections."""
    if "config" not in flags.FLAGS:
        return _parsed(argv)
    from jaxlinear import config as configs

    file, changed = check_config_options(argv)
    try:
        rest = _parsed(_with_tuples(argv))
        config = flags.FLAGS["config"].value
        if config is not None:  # launch/sweep.py need not have one
            configs.check_whole(config)
    except UserError:
        raise
    except Exception as error:
        if file is None or (refusal := _config_file_error(error, file)) is None:
            raise
        raise refusal from error
    if changed:
        configs.forget_unread(config, changed)
    return rest


def _parsed(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)[1:]
    except flags.IllegalFlagValueError as error:
        if not (missing := re.findall(_REQUIRED, str(error))):
            raise
        names, verb = " and ".join(f"--{name}" for name in missing), "are" if len(missing) > 1 else "is"
        raise UserError(f"{names} {verb} missing; --help lists the options") from None


def _with_tuples(argv: list[str]) -> list[str]:
    """The arguments, with names given for tuple keys written as tuples. ml_collections evaluates such values as Python,
    where ``a,b`` is valid and ``a,b:length=64`` is not."""
    from jaxlinear import config as configs

    found, is_value = [], False  # whether the argument is the value of such a key, given after a space
    for argument in argv:
        name, equals, value = ("", "", argument) if is_value else argument.partition("=")
        key = re.fullmatch(r"--?config\.([\w.]+)", name)
        of_tuple = is_value or (key is not None and key[1] in configs.KEYS and configs.kind(key[1]) is tuple)
        if of_tuple and value and value[0] not in "([\"'":
            value = repr((value,))  # ``configs.resolve`` splits it at the commas
        is_value = of_tuple and not is_value and not equals
        found.append(f"{name}{equals}{value}")
    return found


def _config_file_error(error: Exception, file: str) -> UserError | None:
    """What is wrong in a config file, and where. None for a defect in code that the file calls, and for a malformed
    flag."""
    if isinstance(error, SyntaxError) and error.filename == file:
        advice = (
            ""
            if file.endswith(".py")
            else " (it is not a Python file; a config file must be one, such as configs/quickstart.py)"
        )
        return UserError(f"{file}, line {error.lineno}: {error.msg}{advice}")
    cause, lines = _raised_in(error, file)
    if isinstance(cause, OSError):  # from a file that the config reads; raised when the config is first accessed
        if not isinstance(cause, _NOT_THERE):
            return None
        return UserError(f"{file}, line {lines[-1]}: {type(cause).__name__}: {cause}")
    if cause is None:
        if called := re.search(r"TypeError: (get_config\(\) (?:takes|missing) .*)", str(error)):
            return UserError(f"{file}: {called[1]}; its argument is what follows the colon in --config=FILE:ARGUMENT")
        if not isinstance(error, AttributeError | KeyError):
            return None
        return UserError(f"{file}: get_config() must return jaxlinear.config.default() with keys changed: {error}")
    innermost = traceback.extract_tb(cause.__traceback__)[-1].filename
    if isinstance(cause, TypeError | ValueError) and "ml_collections" in innermost:
        return UserError(f"{file}, line {lines[-1]}: {_as_tuple(str(cause)) or cause}")
    bare = r"|\W*$" if isinstance(cause, AttributeError) else ""
    key = re.match(rf"""\W*(?:Key ")?(\w+)(.*the config is locked|.*Did you mean{bare})""", str(cause), re.DOTALL)
    if key is None:
        if innermost != file:
            return None
        return UserError(f"{file}, line {lines[-1]}: {type(cause).__name__}: {cause}")
    near = re.search(r'Did you mean ("\w+")', str(cause))
    advice = f"; did you mean {near[1]}?" if near else ""
    return UserError(f'{file}, line {lines[-1]}: there is no config key "{key[1]}"{advice}')


def _as_tuple(refusal: str) -> str | None:
    """The message for a string set where a tuple of names belongs; None for other errors of ml_collections."""
    found = re.match(
        r"Could not override field '(\w+)'.*?\. (.*) is of original type <class 'str'> .*'tuple'>", refusal
    )
    if found is None:
        return None
    names = tuple(name.strip() for name in found[2].split(","))
    return f"{found[1]} is the string {found[2]!r}; it must be a tuple: {names!r}"


def _raised_in(error: BaseException | None, file: str) -> tuple[BaseException | None, list[int | None]]:
    """The exception that was raised through a file, and the line numbers there. ml_collections and absl re-raise type and
    value errors with the traceback as text."""
    while error is not None:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        if lines:
            return error, lines
        error = error.__cause__ or error.__context__
    return None, []


def check_config_options(argv: list[str]) -> tuple[str | None, list[str]]:
    """The file that ``--config`` names, if any, and the keys that are changed. Raises ``UserError`` for a missing file or
    an unknown key."""
    from jaxlinear import config as configs

    changed = [match[1] for match in (re.match(r"--?(?:no)?config\.([^=]*)", argument) for argument in argv) if match]
    configs.check_known(changed)
    return _config_file(argv), changed


def config_file(name: str) -> str:
    """The file in a ``--config=FILE.py:ARGUMENT``."""
    return name.split(":")[0]


def _config_file(argv: list[str]) -> str | None:
    """The file that ``--config`` names. It must exist."""
    file = None
    for name in re.findall(r"^--?config(?:=|\n)(.*)", "\n".join(argv), re.MULTILINE):
        file = config_file(name)
        if not os.path.isfile(file):
            folder, name = os.path.split(file)
            near = difflib.get_close_matches(name, glob.glob("*.py", root_dir=folder or None), n=1, cutoff=0.0)
            advice = f"; did you mean {os.path.join(folder, near[0])!r}?" if near else ""
            raise UserError(f"there is no config file {file!r}{advice}")
    return file
