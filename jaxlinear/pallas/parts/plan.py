"""What the plans of all kernels with chunks of time have in common."""

from typing import ClassVar


class Named:
    """``kind``: "forward", "summary", "gradient" or "state_gradient"; ``decay``: "none" or its kind; ``packed``: whether
    documents begin within rows."""

    OPERATION: ClassVar[str]

    kind: str
    decay: str
    packed: bool

    @property
    def reverse(self) -> bool:
        """Whether time is traversed from its end."""
        return self.kind in ("gradient", "state_gradient")

    @property
    def name(self) -> str:
        """The kernel's name in the compiled program, its profile and its schedule."""
        marks = [self.decay] if self.decay != "none" else []
        return "_".join([self.OPERATION, self.kind, *marks, *(["packed"] if self.packed else [])])
