"""Documents of a Hugging Face dataset, by name."""

from collections.abc import Callable, Iterator
from typing import Any

from jaxlinear.data.sources import Record, Source
from jaxlinear.errors import UserError


def open_dataset(name: str, record: Callable[[str, Any], Record]) -> Source:
    """``name`` is hf:NAME or hf:NAME:CONFIG. Gives ``record(origin, fields)`` for each row of the training split."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{name} needs the datasets package: pip install jaxlinear[hf]") from error
    path, _, config = name.removeprefix("hf:").partition(":")
    if not path.strip("/ "):
        raise UserError(f"{name!r} does not name a dataset; write hf:NAME or hf:NAME:CONFIG")
    try:
        dataset = datasets.load_dataset(path, config or None, split="train")
    except (OSError, ValueError, RuntimeError) as error:  # not found, no connection, no such configuration, a script
        raise UserError(f"{name} cannot be loaded: {error}") from error

    def records() -> Iterator[Record]:
        for row, fields in enumerate(dataset, start=1):
            yield record(f"{name}:{row}", fields)

    return Source(name, None, records)
