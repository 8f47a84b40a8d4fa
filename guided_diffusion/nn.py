"""guided-diffusion's name for `networks.layers`: the same module, so that what is patched here acts there."""

import sys

from ._patchable import Patchable
from .networks import layers

layers.__class__ = Patchable
sys.modules[__name__] = layers
