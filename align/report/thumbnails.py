"""Image references in, small data URIs out; what cannot be opened is counted, never an error."""

from __future__ import annotations

import base64
import io
from collections import Counter
from pathlib import Path

from PIL import Image

from align.errors import UserError
from align.media.images import ImageStore

MAX_SIDE_PX = 448
JPEG_QUALITY = 82


class Pictures:
    """Opens the images of one root for the report, each once; `missing` counts what could not be opened."""

    def __init__(self, root: Path | None) -> None:
        self.root = root
        self._store = ImageStore(root) if root is not None and root.is_dir() else None
        self._uris: dict[str, str | None] = {}
        self.missing: Counter[str] = Counter()

    def uri(self, reference: str) -> str | None:
        """The image as a data URI, scaled down to 448 px; None where it cannot be opened."""
        if reference not in self._uris:
            self._uris[reference] = self._embed(reference)
        return self._uris[reference]

    def _embed(self, reference: str) -> str | None:
        if self._store is None:
            self.missing["the image folder is not there"] += 1
            return None
        try:
            return encode(self._store.open(reference))
        except UserError as error:
            self.missing[str(error)] += 1
            return None


def encode(image: Image.Image) -> str:
    """PNG or JPEG, whichever is smaller: PNG for drawings and screenshots, JPEG for photographs."""
    image = image.convert("RGB")
    image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.LANCZOS)
    files = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": JPEG_QUALITY, "optimize": True})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files[kind] = buffer.getvalue()
    kind = min(files, key=lambda key: len(files[key]))
    return f"data:image/{kind};base64,{base64.b64encode(files[kind]).decode('ascii')}"
