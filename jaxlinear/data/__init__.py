"""Text to tokens to training batches, addressed by index."""

from jaxlinear.data.loader import TrainBatches, check_same_tokenizer, heldout_batches, warn_of_splits
from jaxlinear.data.manifest import Manifest, read_manifest
from jaxlinear.data.preparation import prepare
from jaxlinear.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Manifest",
    "Tokenizer",
    "TrainBatches",
    "check_same_tokenizer",
    "heldout_batches",
    "load_tokenizer",
    "prepare",
    "read_manifest",
    "warn_of_splits",
]
