"""The memory that blocks of kernels with chunks of time take."""

VMEM_BYTES = 64 * 2**20  # that a kernel with chunks may use


def array_bytes(
    heads: int, time: int, keys: int, values: int, size: int, by_channel: bool, is_gradient: bool = True
) -> int:
    """What the arrays of a kernel take in VMEM, in two blocks each: those of q, k, v, o, decays and, in the gradient, their
    gradients; and three arrays of states."""
    of_keys, of_values = (-(-heads * width // 128) * 128 for width in (keys, values))
    both = 2 if is_gradient else 1
    tokens = time * (both * (2 * size + 4 * by_channel) * of_keys + (1 + both) * size * of_values)
    return 2 * (tokens + heads * values * -(-keys // 128) * 128 * (size + 8))


def even_groups(heads: int, most: int) -> int:
    """Heads of a group, but for the last, if each may have ``most``."""
    return -(-heads // -(-heads // most))


def gradients_by_channel(keys: int) -> int:
    return 64 if keys >= 64 else 16  # 32 spills, for whatever reason
