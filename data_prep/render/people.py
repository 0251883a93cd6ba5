"""Who is seen: the attributes of a person, and how one is drawn by lot.

What identifies a person is kept apart by what can carry it:

- shape (body, outfit, gait): seen in every spectrum;
- colours: in visible light only;
- reflectance: in near infrared only, fixed for the person; it follows the colours' brightness in part, never a hue;
- warmth: in thermal infrared only, mostly the insulation of each garment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np


class Part(IntEnum):
    """Materials of a pedestrian; the scenery's begin at `FIRST_SCENERY`."""

    SKIN = 1
    HAIR = 2
    TOP = 3
    SLEEVE = 4
    INNER = 5  # shirt under an open jacket or a vest
    BOTTOM = 6
    SHOES = 7
    SOLE = 8
    BAG = 9
    STRAP = 10
    GLASSES = 11
    SCARF = 12
    STRIPE = 13
    PRINT = 14
    REFLECTIVE = 15
    HEADWEAR = 16
    BELT = 17
    EYE = 18
    MOUTH = 19
    TIGHTS = 20
    SEAM = 21  # zips, buttons, pocket edges
    FLAP = 22  # pockets and flaps of a bag


TOPS = ("tshirt", "longsleeve", "jacket_closed", "jacket_open", "coat", "hoodie", "vest")
BOTTOMS = ("slim", "wide", "shorts", "skirt_short", "skirt_long", "dress")
SHOES = ("shoes", "sneakers", "boots")
HAIRS = ("bald", "short", "bun", "ponytail", "long", "cap", "hood", "bob")
BAGS = ("none", "backpack", "shoulder", "cross_body", "handbag", "briefcase", "suitcase")
TEXTURES = ("plain", "stripes_across", "stripes_down", "print", "reflective", "yoke", "band")


@dataclass(frozen=True)
class Body:
    """Proportions of a body, shares of its stature (half widths and half depths where a width is meant)."""

    male: bool
    stature: float  # relative to 1.7 m
    leg: float  # height of the hip joint
    shoulder: float
    hip: float
    waist: float
    chest: float  # half depth
    belly: float  # half depth
    head: float  # half height of the skull
    arm: float  # half width of the upper arm
    thigh: float  # half width of the thigh


@dataclass(frozen=True)
class Outfit:
    """What is worn and carried: cuts, not colours."""

    top: str
    bottom: str
    shoes: str
    hair: str
    bag: str
    texture: str
    side: int  # +1 or -1: where a bag hangs and hair is parted
    glasses: bool
    scarf: bool
    beard: bool
    belt: bool
    leg_stripe: bool
    tights: bool
    loose: float  # added to the half widths of the top
    hem: float  # lengthens the top
    skirt: float  # height of a skirt's hem
    flare: float
    bag_size: float
    pitch: float  # distance of stripes, height of a band
    stripes: int
    fringe: float  # where the hair line stands
    volume: float  # how far the hair stands off


@dataclass(frozen=True)
class Gait:
    """Habits of standing and walking; angles in radians."""

    stride: float
    swing: float
    spread: float  # arms away from the trunk
    elbow: float
    slouch: float
    toe_out: float
    stance: float  # distance of the feet from the midline, added to the hip's


@dataclass(frozen=True)
class Identity:
    """A person. `colours` are RGB in 0..1, `reflectance` and `warmth` 0..1, one entry per `Part` number (0 unused)."""

    body: Body
    outfit: Outfit
    gait: Gait
    colours: tuple[tuple[float, float, float], ...]
    reflectance: tuple[float, ...]
    warmth: tuple[float, ...]


def sample_identity(rng: np.random.Generator, near_infrared_follows: float = 0.0) -> Identity:
    """Draw a person. Only the generator and the second argument decide; equal states give equal people.

    near_infrared_follows: share, 0 to 1, of each garment's near-infrared reflectance that follows its visible
    brightness; the rest is drawn. Nothing but `reflectance` depends on it.
    """

    def pick(names: Sequence[str], weights: Sequence[float]) -> str:
        return str(rng.choice(names, p=np.asarray(weights) / sum(weights)))

    def near(mean: float, deviation: float, low: float, high: float) -> float:
        return float(np.clip(rng.normal(mean, deviation), low, high))

    male = bool(rng.random() < 0.5)
    build = near(0, 1, -1.8, 2.2)  # slender to heavy
    body = Body(
        male=male,
        stature=near(1.03 if male else 0.96, 0.045, 0.86, 1.13),
        leg=near(0.485, 0.018, 0.44, 0.53),
        shoulder=near(0.130 if male else 0.116, 0.009, 0.098, 0.155) + 0.006 * build,
        hip=near(0.092 if male else 0.099, 0.006, 0.08, 0.115) + 0.009 * build,
        waist=near(0.084 if male else 0.074, 0.005, 0.062, 0.1) + 0.013 * build,
        chest=near(0.066, 0.005, 0.055, 0.08) + 0.008 * build,
        belly=near(0.06, 0.005, 0.05, 0.08) + 0.015 * build,
        head=near(0.068, 0.003, 0.062, 0.076),
        arm=near(0.027, 0.002, 0.022, 0.032) + 0.003 * build,
        thigh=near(0.046, 0.003, 0.04, 0.055) + 0.006 * build,
    )
    top = pick(TOPS, (3, 2.5, 2.2, 2.2, 1.6, 2, 1.2))
    bottom = pick(BOTTOMS, (4, 3, 2, 0, 0, 0) if male else (3.5, 1.5, 1, 1.5, 1.2, 1.8))
    if bottom == "dress" and top in ("coat", "hoodie", "vest"):
        top = "tshirt" if rng.random() < 0.6 else "jacket_open"
    hair = pick(HAIRS, (1.3, 5, 0.2, 0.5, 0.4, 1.6, 0.8, 0.3) if male else (0, 1.3, 1.6, 2.2, 3, 0.6, 0.6, 1.8))
    outfit = Outfit(
        top=top,
        bottom=bottom,
        shoes=pick(SHOES, (3, 3, 1) if male else (2.5, 2, 2.5)),
        hair=hair,
        bag=pick(BAGS, (4, 2.2, 1.5, 1.5, 1.3, 1, 0.8)),
        texture=pick(TEXTURES, (4, 1.5, 1, 1.6, 1.2, 1.3, 1.3)),
        side=1 if rng.random() < 0.5 else -1,
        glasses=bool(rng.random() < 0.25),
        scarf=bool(rng.random() < 0.14),
        beard=bool(male and rng.random() < 0.25),
        belt=bool(rng.random() < 0.3),
        leg_stripe=bool(rng.random() < 0.15),
        tights=bool(rng.random() < 0.45),
        loose=float(rng.uniform(0.0, 0.022)),
        hem=float(rng.uniform(-0.02, 0.04)),
        skirt=float(rng.uniform(0.3, 0.4) if bottom == "skirt_short" else rng.uniform(0.12, 0.26)),
        flare=float(rng.uniform(0.0, 0.07)),
        bag_size=float(rng.uniform(0.8, 1.25)),
        pitch=float(rng.uniform(0.035, 0.075)),
        stripes=int(rng.integers(1, 4)),
        fringe=float(rng.uniform(-0.2, 0.35)),
        volume=float(rng.uniform(0.0, 1.0)),
    )
    gait = Gait(
        stride=float(rng.uniform(0.26, 0.5)),
        swing=float(rng.uniform(0.15, 0.6)),
        spread=float(rng.uniform(0.05, 0.2)),
        elbow=float(rng.uniform(0.1, 0.7)),
        slouch=float(rng.uniform(-0.01, 0.045)),
        toe_out=float(rng.uniform(-0.1, 0.5)),
        stance=float(rng.uniform(-0.018, 0.016)),
    )
    colours = _colours(rng, outfit)
    return Identity(
        body, outfit, gait, colours, _reflectance(rng, colours, near_infrared_follows), _warmth(rng, outfit)
    )


# fmt: off
# dyed cloth as people wear it: (red, green, blue), weight
_CLOTH = (
    ((0.07, 0.07, 0.08), 3.0), ((0.22, 0.22, 0.24), 2.0), ((0.5, 0.5, 0.51), 1.6), ((0.88, 0.87, 0.85), 2.0),
    ((0.11, 0.15, 0.3), 2.2), ((0.16, 0.3, 0.62), 1.8), ((0.35, 0.5, 0.7), 1.4), ((0.7, 0.12, 0.13), 1.5),
    ((0.4, 0.1, 0.16), 1.0), ((0.13, 0.38, 0.22), 1.1), ((0.36, 0.38, 0.2), 1.0), ((0.6, 0.5, 0.35), 1.2),
    ((0.78, 0.71, 0.57), 1.0), ((0.38, 0.25, 0.16), 1.0), ((0.86, 0.72, 0.2), 0.8), ((0.86, 0.42, 0.12), 0.8),
    ((0.85, 0.5, 0.6), 0.9), ((0.45, 0.25, 0.55), 0.8), ((0.1, 0.5, 0.52), 0.8), ((0.6, 0.8, 0.85), 0.7),
)
_SKIN = ((0.9, 0.74, 0.64), (0.84, 0.65, 0.52), (0.72, 0.53, 0.4), (0.52, 0.36, 0.26), (0.34, 0.23, 0.17))
_HAIR = ((0.07, 0.06, 0.06), (0.17, 0.12, 0.09), (0.3, 0.2, 0.13), (0.45, 0.32, 0.18), (0.68, 0.54, 0.33),
         (0.5, 0.5, 0.5), (0.45, 0.22, 0.12))
# fmt: on


def _colours(rng: np.random.Generator, outfit: Outfit) -> tuple[tuple[float, float, float], ...]:
    def dye() -> np.ndarray:
        weights = np.asarray([w for _, w in _CLOTH])
        colour = np.asarray(_CLOTH[int(rng.choice(len(_CLOTH), p=weights / weights.sum()))][0])
        return np.clip(colour * rng.uniform(0.85, 1.2) + rng.normal(0, 0.025, 3), 0.03, 0.97)

    table = np.full((max(Part) + 1, 3), 0.5)
    skin = np.asarray(_SKIN[int(rng.choice(5, p=(0.25, 0.3, 0.2, 0.15, 0.1)))]) * rng.uniform(0.93, 1.07)
    hair = np.asarray(_HAIR[int(rng.choice(7, p=(0.3, 0.25, 0.17, 0.1, 0.08, 0.06, 0.04)))]) * rng.uniform(0.9, 1.15)
    top, bottom = dye(), dye()
    for part, colour in {
        Part.SKIN: skin,
        Part.HAIR: hair,
        Part.TOP: top,
        Part.SLEEVE: top,
        Part.INNER: dye(),
        Part.BOTTOM: bottom,
        Part.SHOES: _leather(rng),
        Part.SOLE: np.asarray([0.8, 0.8, 0.78]) * rng.uniform(0.3, 1.1),
        Part.BAG: dye(),
        Part.STRAP: dye() * 0.8,
        Part.GLASSES: np.asarray([0.08, 0.08, 0.09]),
        Part.SCARF: dye(),
        Part.STRIPE: dye(),
        Part.PRINT: dye(),
        Part.REFLECTIVE: np.asarray([0.78, 0.8, 0.78]),
        Part.HEADWEAR: dye(),
        Part.BELT: dye() * 0.6,
        Part.EYE: np.asarray([0.12, 0.1, 0.1]),
        Part.MOUTH: skin * np.asarray([0.85, 0.6, 0.58]),
        Part.TIGHTS: (skin * 0.4 + 0.05) if rng.random() < 0.7 else dye(),
    }.items():
        table[part] = colour
    if outfit.top == "vest":
        table[Part.SLEEVE] = table[Part.INNER]
    if outfit.bottom == "dress" and outfit.top != "jacket_open":
        table[Part.BOTTOM] = table[Part.TOP]
    if outfit.hair == "hood":
        table[Part.HEADWEAR] = table[Part.TOP]
    for part in (Part.STRIPE, Part.PRINT):  # a pattern nobody can see is none
        if np.abs(table[part] - table[Part.TOP]).max() < 0.2:
            table[part] = np.clip(table[Part.TOP] + (0.35 if table[Part.TOP].mean() < 0.5 else -0.35), 0.03, 0.97)
    table[Part.SEAM], table[Part.FLAP] = table[Part.TOP] * 0.55, table[Part.BAG] * 0.75 + 0.03
    return tuple((float(r), float(g), float(b)) for r, g, b in np.clip(table, 0, 1))


def _leather(rng: np.random.Generator) -> np.ndarray:
    tones = (
        (0.08, 0.08, 0.08),
        (0.27, 0.17, 0.1),
        (0.85, 0.84, 0.82),
        (0.4, 0.4, 0.42),
        (0.15, 0.18, 0.32),
        (0.62, 0.2, 0.18),
    )
    tone = np.asarray(tones[int(rng.choice(6, p=(0.35, 0.2, 0.2, 0.1, 0.08, 0.07)))])
    return np.clip(tone * rng.uniform(0.8, 1.15) + rng.normal(0, 0.02, 3), 0.03, 0.95)


_OWN_WAY = (Part.SKIN, Part.HAIR, Part.EYE, Part.REFLECTIVE)


def _reflectance(
    rng: np.random.Generator, colours: Sequence[tuple[float, float, float]], follows: float
) -> tuple[float, ...]:
    """Near-infrared reflectances. Many dyes are transparent there: cloth may be bright whatever its colour."""
    table = rng.uniform(0.14, 0.92, max(Part) + 1)
    table[Part.SKIN], table[Part.HAIR] = rng.uniform(0.58, 0.7), rng.uniform(0.15, 0.5)
    table[Part.SLEEVE] = table[Part.TOP]
    table[Part.GLASSES], table[Part.EYE], table[Part.MOUTH] = 0.08, 0.95, table[Part.SKIN] * 0.85
    table[Part.REFLECTIVE], table[Part.SHOES] = 1.6, rng.uniform(0.1, 0.7)
    for part, other in ((Part.STRIPE, Part.TOP), (Part.PRINT, Part.TOP), (Part.FLAP, Part.BAG)):
        shift = rng.uniform(0.22, 0.45) * (1 if table[other] < 0.53 else -1)
        table[part] = np.clip(table[other] + shift, 0.05, 1)
    table[Part.SEAM] = table[Part.TOP] * 0.6
    brightness = np.asarray(colours) @ (0.299, 0.587, 0.114)  # (parts,), ITU-R BT.601
    mixed = np.clip((1 - follows) * table + follows * (0.1 + 0.85 * brightness), 0.05, 1)
    mixed[list(_OWN_WAY)] = table[list(_OWN_WAY)]
    return tuple(float(v) for v in mixed)


_INSULATION = {
    "tshirt": 0.72,
    "longsleeve": 0.66,
    "jacket_closed": 0.53,
    "jacket_open": 0.52,
    "coat": 0.46,
    "hoodie": 0.58,
    "vest": 0.5,
}


def _warmth(rng: np.random.Generator, outfit: Outfit) -> tuple[float, ...]:
    """Apparent temperatures, 0 the coldest sky and 1 bare skin in summer."""
    table = np.full(max(Part) + 1, 0.5)
    top = _INSULATION[outfit.top]
    for part, value in {
        Part.SKIN: 0.93,
        Part.HAIR: 0.66,
        Part.TOP: top,
        Part.SLEEVE: top - 0.03,
        Part.INNER: 0.7,
        Part.BOTTOM: {"slim": 0.66, "wide": 0.57, "shorts": 0.6}.get(outfit.bottom, 0.52),
        Part.SHOES: 0.43,
        Part.SOLE: 0.38,
        Part.BAG: 0.32,
        Part.STRAP: 0.42,
        Part.GLASSES: 0.4,
        Part.SCARF: 0.52,
        Part.STRIPE: top - 0.04,
        Part.PRINT: top - 0.08,
        Part.REFLECTIVE: top - 0.16,
        Part.HEADWEAR: 0.55,
        Part.BELT: 0.48,
        Part.EYE: 0.95,
        Part.MOUTH: 0.93,
        Part.TIGHTS: 0.76,
        Part.SEAM: top - 0.05,
        Part.FLAP: 0.36,
    }.items():
        table[part] = value + (rng.uniform(-0.06, 0.06) if part not in (Part.SKIN, Part.EYE, Part.MOUTH) else 0.0)
    if outfit.top == "vest":
        table[Part.SLEEVE] = table[Part.INNER]
    if outfit.bottom == "dress" and outfit.top != "jacket_open":
        table[Part.BOTTOM] = table[Part.TOP]
    return tuple(float(v) for v in table)
