"""guided-diffusion's name for `diffusion.losses`: the same module, so that what is patched here acts there."""

import sys

from .diffusion import losses

sys.modules[__name__] = losses
