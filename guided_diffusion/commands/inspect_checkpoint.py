"""Tell what a checkpoint is: kind, parameters, the flags that fit it, and its attention blocks.

  python scripts/inspect_checkpoint.py 256x256_diffusion_uncond.pt

The names of the attention blocks are what --sag_block takes.
"""

import argparse

from ..networks.inspection import NOT_IN_SHAPES, channels_said, inspect
from ..runs.ranks import command
from ..settings.model import MOST_WIDTH, check_heads
from ..settings.options import MOST_SIDE, Parser, exit_on_bad_input, whole
from ..storage.checkpoints import load_state_dict


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help=".pt or .safetensors, local or an address")
    parser.add_argument(
        "--image_size", type=whole(1, MOST_SIDE), help="side of the images; default: guessed from the widths"
    )
    parser.add_argument("--num_heads", type=whole(1, MOST_WIDTH), default=4, help="of the network's flags (default 4)")
    parser.add_argument(
        "--num_head_channels",
        type=whole(-1, MOST_WIDTH),
        default=-1,
        help="of the network's flags (default -1: num_heads)",
    )
    args = parser.parse_args()
    with exit_on_bad_input():
        check_heads("num_head_channels", args.num_head_channels)
        state = load_state_dict(args.file)
        try:
            checkpoint = inspect({name: tensor.shape for name, tensor in state.items()}, args.image_size)
        except ValueError as error:
            raise ValueError(f"{args.file}: {error}") from None
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}))
    print(f"{checkpoint.kind}, {checkpoint.parameters:,} parameters in {len(state)} tensors of {dtypes}")
    if said := channels_said(checkpoint):
        print(f"{said}; from Python, UNetModel(in_channels=…, out_channels=…) is of any")
    if checkpoint.image_size is None:
        factors = sorted({block.downsampling for block in checkpoint.attention})
        print(f"its attention is on maps of image_size / {', / '.join(map(str, factors))}; --image_size N says more")
    size = checkpoint.image_size
    flags = " ".join(f"--{flag} {value}" for flag, value in checkpoint.flags.items() if flag != "image_size")
    print(f"flags that its shapes tell: {f'--image_size {size} ' if size else ''}{flags}")
    is_transformer = checkpoint.kind == "transformer"
    if size and not args.image_size and not is_transformer:
        print(f"  image_size {size} is a guess from the widths; --image_size N if it is another")
    labels = checkpoint.flags.get("num_classes", 0)
    if checkpoint.kind not in ("classifier", "transformer") and labels > 1:
        print(f"  or --num_classes {labels - 1} --null_label True, if its last label stands for no class")
    if is_transformer:
        unknown = "?" in checkpoint.flags["network"]
        print("  the number of heads cannot be told from shapes" + (" (the ? of --network)" if unknown else ""))
        print("attention blocks (map sizes for that image):")
    else:
        print(f"  {NOT_IN_SHAPES}")
        print("attention blocks (map sizes for that image; heads for the given --num_heads, --num_head_channels):")
    for block in checkpoint.attention:
        side = f"{size // block.downsampling}²" if size else f"image / {block.downsampling}"
        heads = args.num_heads if args.num_head_channels == -1 else block.channels // args.num_head_channels
        of_heads = "" if is_transformer else f"  {heads:>3} heads"
        print(f"  {block.name:<20} {side:>6}  {block.channels:>5} channels{of_heads}")
