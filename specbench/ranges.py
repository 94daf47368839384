"""Types and ranges of settings: names for annotations of constructors and of the command line's schema.

A range is declared at the parameter of a setting: `lr: LearningRate` decides what the command line accepts, what
`--help` prints and what an error names. The annotation itself checks nothing; a constructor that is called from a
program checks the values that would cause errors later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


@dataclass(frozen=True)
class Among:
    """One of some names: `Annotated[str, Among(("vanilla", "gated"))]`."""

    names: tuple[str, ...]

    @property
    def text(self) -> str:
        """The same in words."""
        return f"one of {', '.join(self.names)}"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.literal_schema(list(self.names))


# No meaningful count is larger, and machine integers end not far above.
MANY = 10**9
# More than the longest context of any known target: 16 million tokens.
TOKENS = 1 << 24
# The largest id that any vocabulary holds.
LARGEST_TOKEN = 2**31 - 1
# Published drafts propose up to 15 tokens. The training view holds every slot of every anchor at once.
MOST_SLOTS = 512
# Deeper than any known target.
MOST_LAYERS = 256

Number = float | int

Count = Annotated[int, Field(ge=1, le=MANY)]
Natural = Annotated[int, Field(ge=0, le=MANY)]
Bytes = Annotated[int, Field(ge=1, le=1 << 50)]
Tokens = Annotated[int, Field(ge=1, le=TOKENS)]
TokenId = Annotated[int, Field(ge=0, le=TOKENS)]
LayerId = Annotated[int, Field(ge=0, le=4096)]
Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
Slots = Annotated[int, Field(ge=1, le=MOST_SLOTS)]
Rank = Annotated[int, Field(ge=0, le=1 << 16)]
Threads = Annotated[int, Field(ge=1, le=4096)]
# Seeds that both numpy and torch accept.
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]

AboveZero = Annotated[Number, Field(gt=0, le=1e12)]
AtLeastZero = Annotated[Number, Field(ge=0, le=1e12)]
# Of operations of a training.
Amount = Annotated[Number, Field(gt=0, le=1e30)]
Seconds = Annotated[Number, Field(gt=0, le=1e9)]
LearningRate = Annotated[Number, Field(gt=0, le=100)]
Share = Annotated[Number, Field(ge=0, le=1)]
ShareBelowOne = Annotated[Number, Field(ge=0, lt=1)]
ShareAboveZero = Annotated[Number, Field(gt=0, le=1)]
ShareWithin = Annotated[Number, Field(gt=0, lt=1)]
Temperature = Annotated[Number, Field(ge=0, le=1000)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
# Decays of AdamW's two moments.
Betas = Annotated[Sequence[ShareBelowOne], Field(min_length=2, max_length=2)]
