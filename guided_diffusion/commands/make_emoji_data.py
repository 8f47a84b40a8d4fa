"""Make the emoji data set: small pictures of a colour emoji font on plain grey, as a folder of PNG files.

Needs the Noto Color Emoji font (SIL Open Font License) and Unicode's emoji-test.txt; on Debian and Ubuntu:
`apt install fonts-noto-color-emoji unicode-data`. Writes OUT/train, OUT/held_out (a fixed 15 % of the glyphs) and
OUT/alpha (each glyph's opacity: its object mask). Files are named label_name.png, the label being the Unicode group.
"""

import argparse
import os
import re
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ..runs.ranks import command
from ..settings.options import MOST_SIDE, Parser, exit_on_bad_input, whole
from ..storage.pictures import save_png

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
EMOJI_TEST = "/usr/share/unicode/emoji/emoji-test.txt"
NATIVE_SIZE = 109  # the one size at which this bitmap font can be drawn
GREY = 128
HELD_OUT_PERCENT = 15


def base_emoji(emoji_test: str) -> list[tuple[str, int, str]]:
    """(group, code point, name) of every fully qualified emoji of one code point (with or without VS16)."""
    group, found = "", []
    for line in Path(emoji_test).read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = re.sub("[^a-z]+", "-", line.removeprefix("# group: ").lower())
        elif match := re.match(r"([0-9A-F]+)(?: FE0F)? +; fully-qualified +# \S+ E[\d.]+ (.+)", line):
            found.append((group, int(match[1], 16), re.sub("[^a-z0-9]+", "-", match[2].lower()).strip("-")))
    return found


def draw_glyph(font: ImageFont.FreeTypeFont, code_point: int, size: int, margin: int) -> Image.Image:
    """The glyph as RGBA of size × size, centred, its longer side size − 2·margin pixels."""
    left, top, right, bottom = font.getbbox(chr(code_point))
    side = max(right - left, bottom - top)
    canvas = Image.new("RGBA", (side, side))
    origin = ((side - right + left) // 2 - left, (side - bottom + top) // 2 - top)
    ImageDraw.Draw(canvas).text(origin, chr(code_point), font=font, embedded_color=True)
    inner = size - 2 * margin
    framed = Image.new("RGBA", (size, size))
    framed.paste(canvas.resize((inner, inner), Image.Resampling.BOX), (margin, margin))
    return framed


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write, for example data/emoji32")
    parser.add_argument(
        "--size", type=whole(1, MOST_SIDE), default=32, help="side of the pictures in pixels (default 32)"
    )
    parser.add_argument(
        "--margin", type=whole(0, MOST_SIDE), default=2, help="empty pixels around the glyph (default 2)"
    )
    parser.add_argument(
        "--groups",
        default="",
        help="comma-separated beginnings of Unicode groups to keep, for "
        "example smileys,animals,food (default: all but symbols and flags)",
    )
    parser.add_argument("--font", default=FONT, help="the Noto Color Emoji font file (default %(default)s)")
    parser.add_argument("--emoji_test", default=EMOJI_TEST, help="Unicode's list of emoji (default %(default)s)")
    args = parser.parse_args()
    if 2 * args.margin >= args.size:
        parser.error(f"--margin: {args.margin} to each side leave nothing of --size {args.size}")
    for needed in (args.font, args.emoji_test):
        if not os.path.isfile(needed):
            parser.error(f"{needed} is not there; on Debian: apt install fonts-noto-color-emoji unicode-data")

    glyphs = [
        glyph
        for glyph in base_emoji(args.emoji_test)
        if (glyph[0].startswith(tuple(args.groups.split(","))) if args.groups else glyph[0] not in ("symbols", "flags"))
    ]
    if not glyphs:
        parser.error(f"--groups {args.groups}: no emoji group begins so")
    font = ImageFont.truetype(args.font, NATIVE_SIZE)
    with exit_on_bad_input("out"):
        for part in ("train", "held_out", "alpha"):
            (args.out / part).mkdir(parents=True, exist_ok=True)
    for group, code_point, name in tqdm(glyphs, desc="emoji", unit="glyph"):
        glyph = draw_glyph(font, code_point, args.size, args.margin)
        background = Image.new("RGBA", glyph.size, (GREY, GREY, GREY, 255))
        held_out = zlib.crc32(b"%d" % code_point) % 100 < HELD_OUT_PERCENT
        file = f"{group}_{name}.png"
        picture = Image.alpha_composite(background, glyph).convert("RGB")
        save_png(np.asarray(picture), args.out / ("held_out" if held_out else "train") / file)
        save_png(np.asarray(glyph.getchannel("A")), args.out / "alpha" / file)
