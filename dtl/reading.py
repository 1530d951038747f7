"""How the values that an image file stores become pixels: what a run decides once, for all of its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BACKGROUND = 255
"""Of transparent images, in each channel: white, as on a page."""
MAX_CHANNELS = 64


@dataclass(frozen=True)
class Reading:
    """The defaults are those of sets and models of before dtl knew any of this."""

    range: tuple[float, float] | None = None
    """Values of more than 8 bits: which become 0 and 255. None: there is none among the training images."""
    exif: bool = False
    """Images are turned as their EXIF orientation says."""
    alpha: bool = False
    """Transparent images are composed on white; else transparency is dropped."""
    channels: int = 3
    """Of the pixels: 3 are red, green and blue, 1 is gray, others are what the files hold."""

    @classmethod
    def from_values(cls, values: Any) -> Reading:
        """What `to_json` gave; None of an older dtl. ValueError, KeyError or TypeError where it is something else."""
        if values is None:
            return cls()
        if not isinstance(values, Mapping):
            raise TypeError("pixels must be an object")
        given = values["range"]
        if given is not None:
            low, high = (float(value) for value in given)
            if not -1e38 < low <= high < 1e38:
                raise ValueError(f"the range of pixels {low:g} to {high:g} is none")
            given = low, high
        channels = int(values.get("channels", 3))
        if not 1 <= channels <= MAX_CHANNELS:
            raise ValueError(f"{channels} channels are not from 1 to {MAX_CHANNELS}")
        return cls(given, bool(values["exif"]), bool(values["alpha"]), channels)

    def to_json(self) -> dict[str, Any]:
        given = None if self.range is None else list(self.range)
        return {"range": given, "exif": self.exif, "alpha": self.alpha, **({} if self.channels == 3 else {"channels": self.channels})}


AS_BEFORE = Reading()
