"""guided-diffusion's name for `diffusion.losses`: the same module, so that what is patched here acts there."""

import sys

from ._patchable import Patchable
from .diffusion import losses

losses.__class__ = Patchable
sys.modules[__name__] = losses
