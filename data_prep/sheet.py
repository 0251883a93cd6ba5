"""A sheet of sample images: one line per identity, its cameras as columns, visible ones left, infrared ones right."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from danet_core.files import StudyError, atomic_path
from data_prep.images import load_rgb

_FOLDERS = {  # the columns of each layout; a folder named twice goes on where its first column stopped
    "sysu": ("cam1", "cam2", "cam4", "cam5", "cam3", "cam6"),
    "regdb": ("Visible", "Visible", "Thermal", "Thermal"),
}
_DARK, _GAP = (24, 24, 24), 4


def contact_sheet(root: Path, layout: str, *, n_ids: int = 12, per_column: int = 2, height: int = 128) -> Image.Image:
    """A picture of `n_ids` identities of a raw tree, evenly spread over their numbers.

    layout: "sysu" or "regdb", rendered or original; per_column images in each column; every crop is scaled to `height`
    x `height` / 2 pixels, and a missing one stays dark. The same tree gives the same picture.
    Raises StudyError if the tree has no identities or an image cannot be decoded.
    """
    folders = _FOLDERS[layout]
    found = {path.name for folder in folders for path in (root / folder).glob("[0-9]*") if path.is_dir()}
    names = sorted(found, key=int)
    if not names:
        raise StudyError(f"{root} has no identities in the layout of {layout}; render or unpack the data set there")
    names = [names[i * len(names) // n_ids] for i in range(n_ids)] if len(names) > n_ids else names
    width = height // 2
    column = per_column * width + _GAP
    sheet = Image.new("RGB", (len(folders) * column - _GAP, len(names) * (height + _GAP)), _DARK)
    for line, name in enumerate(names):
        for block, folder in enumerate(folders):
            files = sorted(p for p in (root / folder / name).glob("*") if p.suffix.lower() in (".jpg", ".bmp"))
            start = folders[:block].count(folder) * per_column
            for k, path in enumerate(files[start : start + per_column]):
                crop = load_rgb(path).resize((width, height), Image.Resampling.BILINEAR)
                sheet.paste(crop, (block * column + k * width, line * (height + _GAP)))
    return sheet


def write_sheet(root: Path, layout: str, out: Path) -> None:
    """Write `contact_sheet` to `out`, whole or not at all. Raises StudyError when `out` is no picture's name."""
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise StudyError(
            f"{out}: expected a name ending in .png or .jpg, found {out.suffix or 'none'}; give another --out"
        )
    sheet = contact_sheet(root, layout)
    with atomic_path(out) as temporary:
        sheet.save(temporary)
