"""What every plan of a kernel with chunks of time has."""

from typing import ClassVar


class Named:
    """``kind``: "forward", "summary", "gradient" or "state_gradient"; ``decay``: "none" or which; ``packed``: whether
    documents begin within rows."""

    OPERATION: ClassVar[str]

    kind: str
    decay: str
    packed: bool

    @property
    def reverse(self) -> bool:
        """Whether time is gone through from its end."""
        return self.kind in ("gradient", "state_gradient")

    @property
    def name(self) -> str:
        """What the compiled program, its profile and its schedule call the kernel."""
        marks = [self.decay] if self.decay != "none" else []
        return "_".join([self.OPERATION, self.kind, *marks, *(["packed"] if self.packed else [])])
