"""What is in a page: its text, its images, its addresses; and whether its tags close each other."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

VOID = {"meta", "link", "img", "source", "br", "hr"}


class Page(HTMLParser):
    def __init__(self, document: str) -> None:
        super().__init__()
        self.images: list[dict[str, str]] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(document)
        self.close()
        assert self._open == [], f"never closed: {self._open}"
        self.text = " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        if tag == "img":
            self.images.append(values)
        self.addresses += [values[name] for name in ("src", "srcset", "href", "data", "action") if name in values]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1:] == [tag], f"</{tag}> closes {self._open[-3:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    def check_self_contained(self) -> None:
        """Nothing is loaded from anywhere, every image decodes and has words for those who do not see it."""
        assert not {"script", "iframe", "object", "embed"} & set(self.tags)
        for address in self.addresses:
            assert address.startswith("data:"), address[:80]
        for image in self.images:
            assert image["alt"].strip()
            kind, _, data = image["src"].partition(";base64,")
            assert kind in ("data:image/png", "data:image/jpeg")
            with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as decoded:
                decoded.load()
                assert int(image["width"]) * decoded.height == int(image["height"]) * decoded.width
