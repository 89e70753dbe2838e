"""The Stable Diffusion base model: a diffusers folder, checked before anything is built from it.

model       `BaseModel`: the parts of a folder, each loaded when it is asked for
folder      finding a folder or a hub id, its weight files, and its JSON files
tensors     weights of one safetensors file or of shards, compared with what a network needs
configs     bounds of the values in the configuration files
schedulers  the diffusers schedulers that the noise schedule serves, each step count tried first
identity    one hash of the weights and values that shape a picture
"""

from __future__ import annotations

from dualdiff_engine.base_model.folder import BUNDLE, blamed_on, first_line, read_json
from dualdiff_engine.base_model.model import BaseModel
from dualdiff_engine.base_model.tensors import TensorFile

__all__ = ["BUNDLE", "BaseModel", "TensorFile", "blamed_on", "first_line", "read_json"]
