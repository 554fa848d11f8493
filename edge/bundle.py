"""CONTRACT 1: the bundle, a folder with a manifest that export writes and the box reads. (In the making.)"""

from __future__ import annotations

from typing import Literal

Precision = Literal["fp32", "fp16"]
