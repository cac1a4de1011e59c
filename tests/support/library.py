"""Which element types the installed torch has and the installed safetensors library saves and loads."""

from __future__ import annotations

import torch
from safetensors.torch import _SIZE, _TYPES

from nbmerge.dtypes import BY_NAME

SAVED = [name for name in BY_NAME if getattr(torch, name, None) in _SIZE]
SAVED_AND_LOADED = [name for name in SAVED if BY_NAME[name].code in _TYPES]
