"""The config of this study."""

from typing import Annotated, Literal

import msgspec

from experiments.config import distinct

from .functions import FUNCTIONS
from .libraries import LIBRARIES, OURS
from .regimes import Several, Sizes


class Config(Sizes, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The functions and libraries to compare, the dtypes, and the sizes of the inputs."""

    dtypes: Annotated[list[Literal["float32", "bfloat16"]], Several]
    functions: Annotated[list[str], msgspec.Meta(min_length=1)]
    libraries: Annotated[list[str], msgspec.Meta(min_length=1)]

    def __post_init__(self):
        distinct(self, "dtypes", "functions", "libraries", "num_classes", "margins", "differences", "scales", "tails")
        if unknown := [name for name in self.functions if name not in FUNCTIONS]:
            raise ValueError(f"functions: expected any of {', '.join(FUNCTIONS)}, got {unknown[0]}")
        if OURS not in self.libraries or not {*self.libraries} <= {*LIBRARIES}:
            raise ValueError(f"libraries: expected {OURS} and any of {', '.join(LIBRARIES)}, got {self.libraries}")
