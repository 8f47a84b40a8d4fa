"""Train the small network whose features compare 32×32 emoji (evaluations/emoji_features.md).

It learns to tell every glyph of a folder from all others, mirrored and moved by up to 3 pixels, and to tell how much
blur and how much noise was put on the picture: so its features know what is drawn and how well it is drawn. Then the
spread of each feature over pictures disturbed in many ways becomes its unit (evaluations/disturbances.py); with
--init FILE --steps 0 only this is done, for weights that are there.

  python scripts/make_emoji_data.py data/emoji_all
  python scripts/train_emoji_features.py data/emoji_all/train data/emoji_all/held_out
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from evaluations.disturbances import DISTURBANCES
from evaluations.emoji import WEIGHTS, WIDTHS, EmojiFeatures
from evaluations.networks import load_weights

from ..runs.ranks import command
from ..settings.options import MOST_AT_A_TIME, MOST_SEED, Parser, whole
from ..storage.files import write_atomically

GREY = 128
SHIFT = 3
MAX_BLUR = 2.0
MAX_NOISE = 64.0


class Trained(nn.Module):
    """The features with the heads that train them: which glyph, and how much blur and noise."""

    def __init__(self, glyphs: int):
        super().__init__()
        self.features = EmojiFeatures()
        self.glyph = nn.Linear(WIDTHS[-1], glyphs)
        self.damage = nn.Linear(WIDTHS[-1], 2)


def blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Each image [N, C, H, W] blurred by its own σ [N] in pixels."""
    n, channels, height, width = images.shape
    offsets = torch.arange(-4, 5)
    weights = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)
    weights = (weights / weights.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    rows = F.pad(images, (4, 4, 4, 4), mode="replicate").reshape(1, n * channels, height + 8, width + 8)
    across = F.conv2d(rows, weights[:, None, None, :], groups=n * channels)
    return F.conv2d(across, weights[:, None, :, None], groups=n * channels).reshape(images.shape)


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [N, C, H, W] mirrored or not, and shifted by up to SHIFT pixels over grey."""
    n, _, height, width = images.shape
    flip = torch.rand(n, generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (SHIFT,) * 4, value=GREY)
    top, left = torch.randint(0, 2 * SHIFT + 1, (2, n), generator=generator)
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(n)[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns]


def damaged(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half of the images untouched, half blurred and made noisy; and by how much, [N, 2] in 0 to 1."""
    amount = torch.rand((len(images), 2), generator=generator) * (
        torch.rand((len(images), 2), generator=generator) < 0.5
    )
    noise = torch.randn(images.shape, generator=generator) * (MAX_NOISE * amount[:, 1, None, None, None])
    return (blurred(images, MAX_BLUR * amount[:, 0]) + noise).clamp(0, 255), amount


@torch.inference_mode()
def spread(features: EmojiFeatures, pictures: NDArray[np.uint8], seed: int) -> Tensor:
    """The standard deviation of each feature over pictures [N, 32, 32, 3] disturbed by every disturbance and level."""
    features.eval()
    rng = np.random.default_rng(seed)
    found = []
    for disturbance in DISTURBANCES.values():
        for level in disturbance.levels:
            disturbed = disturbance.apply(pictures, level, rng)
            for batch in torch.from_numpy(disturbed).permute(0, 3, 1, 2).split(256):
                found.append(torch.cat(features.means(batch), dim=1))
    # A channel that no picture moves tells nothing; its unit must not be 0.
    return torch.cat(found).double().std(dim=0).clamp(min=1e-3).float()


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of 32×32 pictures, each picture a glyph")
    parser.add_argument("--init", type=Path, help="begin with the weights of this file")
    parser.add_argument(
        "--steps", type=whole(0), default=3000, help="training steps; 0: measure the spread alone (default %(default)s)"
    )
    parser.add_argument(
        "--batch_size", type=whole(1, MOST_AT_A_TIME), default=64, help="pictures a step (default %(default)s)"
    )
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate (default %(default)s)")
    parser.add_argument("--seed", type=whole(0, MOST_SEED), default=0, help="seed (default %(default)s)")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="file to write (default %(default)s)")
    args = parser.parse_args()
    if not 0 < args.lr < math.inf:
        parser.error(f"--lr: wanted more than 0, got {args.lr}")

    files = [file for folder in args.folders for file in sorted(folder.glob("*.png"))]
    if not files:
        parser.error(f"no PNG file in {', '.join(map(str, args.folders))}; scripts/make_emoji_data.py makes them")
    pictures = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).permute(0, 3, 1, 2).float()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    network = Trained(len(files))
    if args.init:
        try:
            load_weights(network.features, args.init, torch.device("cpu"))
        except ValueError as refusal:
            parser.error(f"--init: {refusal}")
        network.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=0.02)
    warmup = max(1, min(100, args.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / max(args.steps, 1))))
    )
    bar = tqdm(range(args.steps), disable=None, unit="step")
    seen = right = 0
    for step in bar:
        glyph = torch.randint(0, len(files), (args.batch_size,), generator=generator)
        images, amount = damaged(moved(pictures[glyph], generator), generator)
        pool = network.features.means(images)[-1]
        scores = network.glyph(pool)
        loss = F.cross_entropy(scores, glyph, label_smoothing=0.1) + F.mse_loss(network.damage(pool), amount) * 10
        if not loss.isfinite():
            raise FloatingPointError(f"step {step}: the loss is not finite; give a smaller --lr")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seen, right = seen + len(glyph), right + int((scores.argmax(dim=1) == glyph).sum())
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            tqdm.write(f"step {step + 1}: loss {loss.item():.3f}, glyphs right {right / seen:.1%} of the last {seen}")
            seen = right = 0
    network.features.spread = spread(network.features, pictures.permute(0, 2, 3, 1).byte().numpy(), args.seed)
    state = {name: tensor.half() if tensor.is_floating_point() and name != "spread" else tensor
             for name, tensor in network.features.state_dict().items()}  # fmt: skip
    write_atomically(args.out, lambda file: file.write(save(state)))
    print(f"{sum(p.numel() for p in network.features.parameters()):,} parameters, {len(files)} glyphs: {args.out}")
