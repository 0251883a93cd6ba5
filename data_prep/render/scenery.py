"""Backdrops of the rendered data sets: what each fixed camera looks at, without people.

A scene is drawn once per camera as two wide grey pictures: which material each point is made of, and how strongly it is
lit. Crops are windows of it, so that images of one camera share their backdrop, as those of a surveillance camera do.
The floor is in true perspective: a camera `eye` metres above it sees a person of 1.7 m whose feet stand `drop` pixels
below the horizon as `drop * 1.7 / eye` pixels tall.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

PERSON_METRES = 1.7  # stature that heights in pixels refer to
FOCAL = 600.0  # pixels; fixes how fast people shrink with distance
UNIT_SHADE = 128  # the grey level of a shade picture that means "lit normally"
FIRST_SCENERY = 32  # materials below belong to the pedestrian
N_MATERIALS = 64
WIDTH, HEIGHT = 1100, 520  # pixels of a scene


class Scenery(IntEnum):
    """Materials of a backdrop; the pedestrian's own are below `FIRST_SCENERY`."""

    FLOOR = FIRST_SCENERY
    JOINT = 33  # lines between tiles or slabs, road markings' dark counterpart
    WALL = 34
    DADO = 35  # lower part of a two-tone wall
    TRIM = 36  # skirting boards, frames, kerbs
    DOOR = 37
    GLASS = 38
    BOARD = 39  # notice boards, posters, signs
    BRICK = 40
    MORTAR = 41
    PILLAR = 42
    WOOD = 43
    METAL = 44
    TRUNK = 45
    FOLIAGE = 46
    GRASS = 47
    SKY = 48
    CAR = 49
    TYRE = 50
    LAMP = 51
    CARPET = 52  # a second floor: mats, paths, zebra stripes
    DARK = 53  # openings, gaps, night
    CLOTH = 54  # curtains, seats


# fmt: off
# grain: share by which fine noise, blotch: share by which coarse noise modulates a material
_GRAIN = {
    Scenery.FLOOR: 0.05, Scenery.BRICK: 0.14, Scenery.FOLIAGE: 0.45, Scenery.GRASS: 0.28, Scenery.TRUNK: 0.2,
    Scenery.WOOD: 0.1, Scenery.CARPET: 0.1, Scenery.MORTAR: 0.1, Scenery.CLOTH: 0.08,
}
_BLOTCH = {
    Scenery.FLOOR: 0.06, Scenery.WALL: 0.05, Scenery.DADO: 0.05, Scenery.BRICK: 0.1, Scenery.FOLIAGE: 0.5,
    Scenery.GRASS: 0.3, Scenery.GLASS: 0.25, Scenery.SKY: 0.08, Scenery.CAR: 0.12, Scenery.PILLAR: 0.1,
    Scenery.CARPET: 0.08, Scenery.WOOD: 0.12, Scenery.METAL: 0.15, Scenery.DARK: 0.2,
}
# fmt: on


@dataclass(frozen=True)
class Scene:
    """A drawn backdrop.

    materials, shades: "L" pictures of WIDTH x HEIGHT pixels. horizon, base: rows of the horizon and of the foot of the
    back wall. eye: height of the camera, metres. nearest, farthest: pixel heights of people who stand in it.
    colours, reflectance, warmth: the appearance of every material in visible light (RGB), near infrared and thermal.
    """

    materials: Image.Image
    shades: Image.Image
    horizon: float
    base: float
    eye: float
    nearest: float
    farthest: float
    colours: Float[np.ndarray, "N 3"]
    reflectance: Float[np.ndarray, " N"]
    warmth: Float[np.ndarray, " N"]


class _Painter:
    """Draws on the material and the shade picture together."""

    def __init__(self, horizon: float, eye: float, wall_height: float, rng: np.random.Generator) -> None:
        self.rng, self.horizon, self.eye = rng, horizon, eye
        self.material = Image.new("L", (WIDTH, HEIGHT), int(Scenery.FLOOR))
        self.shade = Image.new("L", (WIDTH, HEIGHT), UNIT_SHADE)
        self._on = ImageDraw.Draw(self.material), ImageDraw.Draw(self.shade)
        self.base = self.row(wall_height)
        self.metre = wall_height / PERSON_METRES  # pixels per metre at the back wall

    def row(self, person: float) -> float:
        """Row of the feet of somebody `person` pixels tall."""
        return self.horizon + person * self.eye / PERSON_METRES

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def rect(self, x0: float, y0: float, x1: float, y1: float, what: int, shade: float = 1.0) -> None:
        self._on[0].rectangle((x0, y0, max(x0, x1), max(y0, y1)), fill=int(what))
        self._on[1].rectangle((x0, y0, max(x0, x1), max(y0, y1)), fill=round(UNIT_SHADE * shade))

    def poly(self, points: list[tuple[float, float]], what: int, shade: float = 1.0) -> None:
        self._on[0].polygon(points, fill=int(what))
        self._on[1].polygon(points, fill=round(UNIT_SHADE * shade))

    def oval(self, x: float, y: float, rx: float, ry: float, what: int, shade: float = 1.0) -> None:
        self._on[0].ellipse((x - rx, y - ry, x + rx, y + ry), fill=int(what))
        self._on[1].ellipse((x - rx, y - ry, x + rx, y + ry), fill=round(UNIT_SHADE * shade))

    def line(self, x0: float, y0: float, x1: float, y1: float, width: float, what: int, shade: float = 1.0) -> None:
        self._on[0].line((x0, y0, x1, y1), fill=int(what), width=max(1, round(width)))
        self._on[1].line((x0, y0, x1, y1), fill=round(UNIT_SHADE * shade), width=max(1, round(width)))

    # floors

    def slabs(self, tile: float, what: int = Scenery.JOINT, chequer: bool = False) -> None:
        """Perspective lines of square slabs, `tile` metres wide."""
        middle, far = WIDTH / 2, FOCAL * self.eye / (self.base - self.horizon)
        rows = [self.base]
        distance = far
        while distance > 1.6:
            distance -= tile
            rows.append(self.horizon + FOCAL * self.eye / max(distance, 1.2))
        slope = tile / self.eye
        if chequer:
            for k, (top, bottom) in enumerate(zip(rows, rows[1:], strict=False)):
                for column in range(-60, 60):
                    if (column + k) % 2:
                        edges = [
                            (middle + slope * c * (r - self.horizon), r)
                            for c, r in ((column, top), (column + 1, top), (column + 1, bottom), (column, bottom))
                        ]
                        self.poly(edges, Scenery.CARPET)
            return
        for row in rows:
            self.line(0, row, WIDTH, row, 1 + (row - self.base) / 160, what)
        for column in range(-60, 61):
            x0, x1 = (middle + slope * column * (r - self.horizon) for r in (self.base, HEIGHT))
            self.line(x0, self.base, x1, HEIGHT, 2, what)

    def strip(self, left: float, right: float, what: int, shade: float = 1.0) -> None:
        """A path running away from the camera, between two offsets from the axis in metres."""
        rows = (self.base, HEIGHT)
        edges = [
            (WIDTH / 2 + side / self.eye * (row - self.horizon), row)
            for side, row in ((left, rows[0]), (right, rows[0]), (right, rows[1]), (left, rows[1]))
        ]
        self.poly(edges, what, shade)

    # things at the back wall; x in pixels

    def door(self, x: float, leaves: int = 1) -> None:
        m, wide = self.metre, self.metre * 0.9 * leaves
        top = self.base - 2.1 * m
        self.rect(x - 0.1 * m, top - 0.1 * m, x + wide + 0.1 * m, self.base, Scenery.TRIM, 0.9)
        self.rect(x, top, x + wide, self.base, Scenery.DOOR)
        for leaf in range(leaves):
            x0 = x + leaf * 0.9 * m
            self.rect(x0, top, x0 + 1, self.base, Scenery.DOOR, 0.55)
            if self.uniform(0, 1) < 0.5:
                self.rect(x0 + 0.25 * m, top + 0.25 * m, x0 + 0.65 * m, top + 1.0 * m, Scenery.GLASS, 0.8)
            else:
                self.rect(x0 + 0.15 * m, top + 0.2 * m, x0 + 0.75 * m, top + 0.95 * m, Scenery.DOOR, 0.86)
                self.rect(x0 + 0.15 * m, top + 1.15 * m, x0 + 0.75 * m, top + 1.9 * m, Scenery.DOOR, 0.86)
            self.rect(x0 + 0.76 * m, top + 1.0 * m, x0 + 0.84 * m, top + 1.15 * m, Scenery.METAL, 1.4)

    def window(self, x: float, wide: float, sill: float, high: float, what: int = Scenery.GLASS) -> None:
        m, y1 = self.metre, self.base - sill * self.metre
        y0, x1 = y1 - high * m, x + wide * m
        self.rect(x - 3, y0 - 3, x1 + 3, y1 + 4, Scenery.TRIM)
        self.rect(x, y0, x1, y1, what, self.uniform(0.7, 1.3))
        self.poly(
            [(x + 0.1 * wide * m, y1), (x + 0.45 * wide * m, y1), (x + 0.8 * wide * m, y0), (x + 0.5 * wide * m, y0)],
            what,
            1.5,
        )
        self.rect((x + x1) / 2 - 1, y0, (x + x1) / 2 + 1, y1, Scenery.TRIM, 0.9)

    def board(self, x: float) -> None:
        m, wide, low = self.metre, self.metre * self.uniform(0.6, 1.8), self.base - self.metre * self.uniform(0.9, 1.2)
        top = low - m * self.uniform(0.5, 0.9)
        self.rect(x - 2, top - 2, x + wide + 2, low + 2, Scenery.TRIM, 0.8)
        self.rect(x, top, x + wide, low, Scenery.BOARD)
        for _ in range(int(self.uniform(2, 7))):
            px, py = self.uniform(x + 2, x + wide * 0.8), self.uniform(top + 2, low - 0.25 * m)
            self.rect(px, py, px + m * 0.16, py + m * 0.2, Scenery.WALL, self.uniform(0.8, 1.5))

    def bricks(self, top: float) -> None:
        self.rect(0, top, WIDTH, self.base, Scenery.MORTAR)
        course, long = max(4, round(self.metre * 0.12)), max(9, round(self.metre * 0.36))
        for k, y in enumerate(range(int(top), int(self.base), course)):
            for x in range(-(k % 2) * (long // 2), WIDTH, long):
                self.rect(x, y, x + long - 2, y + course - 2, Scenery.BRICK, self.uniform(0.78, 1.18))

    # things on the floor; `person` is the pixel height of somebody standing beside them

    def pillar(self, x: float, person: float, wide: float = 0.5) -> None:
        m, y = person / PERSON_METRES, self.row(person)
        for k, shade in enumerate((0.62, 0.85, 1.05, 1.15)):
            inset = k * wide * m * 0.11
            self.rect(x - wide * m / 2 + inset, 0, x + wide * m / 2 - 2 * inset, y, Scenery.PILLAR, shade)
        self.rect(x - wide * m * 0.58, y - 0.12 * m, x + wide * m * 0.58, y, Scenery.TRIM, 0.8)

    def pot(self, x: float, person: float) -> None:
        m, y = person / PERSON_METRES, self.row(person)
        self.oval(x, y, 0.3 * m, 0.06 * m, Scenery.DARK, 0.7)
        self.poly(
            [(x - 0.2 * m, y), (x + 0.2 * m, y), (x + 0.26 * m, y - 0.4 * m), (x - 0.26 * m, y - 0.4 * m)],
            Scenery.WOOD,
            0.8,
        )
        for _ in range(26):
            a, r = self.uniform(-1.2, 1.2), self.uniform(0.3, 1.0)
            lx, ly = x + m * r * 0.6 * np.sin(a), y - 0.4 * m - m * r * 0.9 * np.cos(a)
            self.line(x, y - 0.4 * m, lx, ly, max(1, 0.04 * m), Scenery.FOLIAGE, self.uniform(0.5, 1.2))
            self.oval(lx, ly, 0.1 * m, 0.08 * m, Scenery.FOLIAGE, self.uniform(0.6, 1.3))

    def bench(self, x: float, person: float) -> None:
        m, y = person / PERSON_METRES, self.row(person)
        for leg in (0.1, 1.3):
            self.rect(x + leg * m, y - 0.45 * m, x + (leg + 0.07) * m, y, Scenery.METAL, 0.7)
        self.rect(x, y - 0.5 * m, x + 1.5 * m, y - 0.42 * m, Scenery.WOOD)
        for rail in (0.6, 0.72, 0.84):
            self.rect(x, y - rail * m, x + 1.5 * m, y - (rail - 0.08) * m, Scenery.WOOD, 0.85)

    def cabinet(self, x: float, person: float) -> None:
        m, y = person / PERSON_METRES, self.row(person)
        wide, high = self.uniform(0.5, 1.4), self.uniform(0.8, 1.8)
        self.rect(x, y - high * m, x + wide * m, y, Scenery.METAL)
        self.poly(
            [
                (x, y - high * m),
                (x + wide * m, y - high * m),
                (x + (wide + 0.08) * m, y - (high + 0.12) * m),
                (x + 0.08 * m, y - (high + 0.12) * m),
            ],
            Scenery.METAL,
            1.2,
        )
        rows = int(self.uniform(1, 5))
        for k in range(rows):
            y0 = y - high * m * (k + 1) / rows
            self.rect(x + 2, y0 + 2, x + wide * m - 2, y0 + high * m / rows - 2, Scenery.METAL, 0.88)
            self.rect(
                x + wide * m * 0.4,
                y0 + high * m / rows * 0.3,
                x + wide * m * 0.6,
                y0 + high * m / rows * 0.3 + 2,
                Scenery.DARK,
            )

    def chairs(self, x: float, person: float, count: int) -> None:
        m, y = person / PERSON_METRES, self.row(person)
        for k in range(count):
            x0 = x + 0.6 * m * k
            for leg in (0.03, 0.42):
                self.rect(x0 + leg * m, y - 0.45 * m, x0 + (leg + 0.05) * m, y, Scenery.METAL, 0.6)
            self.rect(x0, y - 0.95 * m, x0 + 0.5 * m, y - 0.5 * m, Scenery.CLOTH, 0.9)
            self.poly(
                [
                    (x0, y - 0.5 * m),
                    (x0 + 0.5 * m, y - 0.5 * m),
                    (x0 + 0.54 * m, y - 0.4 * m),
                    (x0 - 0.04 * m, y - 0.4 * m),
                ],
                Scenery.CLOTH,
                1.15,
            )

    def tree(self, x: float, person: float) -> None:
        m, y, girth = person / PERSON_METRES, self.row(person), self.uniform(0.12, 0.3)
        crown = y - m * self.uniform(2.2, 3.4)
        self.oval(x, y, 3 * girth * m, 0.1 * m, Scenery.GRASS, 0.6)
        self.poly(
            [(x - girth * m, y), (x + girth * m, y), (x + 0.6 * girth * m, crown), (x - 0.6 * girth * m, crown)],
            Scenery.TRUNK,
            0.8,
        )
        self.rect(x - 0.3 * girth * m, crown, x + 0.2 * girth * m, y, Scenery.TRUNK, 1.1)
        for _ in range(45):
            cx, cy = x + m * self.rng.normal(0, 0.9), crown - m * self.uniform(-0.4, 2.4)
            size = m * self.uniform(0.2, 0.5)
            self.oval(cx, cy, size, size * 0.75, Scenery.FOLIAGE, self.uniform(0.5, 1.25))

    def hedge(self, top: float, bottom: float, x0: float = 0, x1: float = WIDTH) -> None:
        self.rect(x0, top, x1, bottom, Scenery.FOLIAGE, 0.55)
        for _ in range(int((x1 - x0) * (bottom - top) / 90)):
            y = self.uniform(top - 3, bottom)
            light = 0.55 + 0.7 * (bottom - y) / max(1.0, bottom - top)
            self.oval(
                self.uniform(x0, x1),
                y,
                self.uniform(3, 8),
                self.uniform(2, 6),
                Scenery.FOLIAGE,
                light * self.uniform(0.7, 1.2),
            )

    def fence(self, person: float, high: float, gap: float, x0: float = 0, x1: float = WIDTH) -> None:
        m, y = person / PERSON_METRES, self.row(person)
        for rail in (0.15, 0.92):
            self.rect(x0, y - rail * high * m, x1, y - rail * high * m + 0.05 * m, Scenery.METAL, 0.9)
        x = x0
        while x < x1:
            self.rect(x, y - high * m, x + max(1.5, 0.035 * m), y, Scenery.METAL)
            x += gap * m

    def car(self, x: float, person: float) -> None:
        m, y = person / PERSON_METRES, self.row(person)
        face = 1 if self.uniform(0, 1) < 0.5 else -1

        def at(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
            return [(x + face * px * m, y - py * m) for px, py in points]

        paint = self.uniform(0.5, 1.5)
        self.oval(x, y, 2.2 * m, 0.14 * m, Scenery.DARK, 0.5)
        self.poly(
            at(
                [
                    (-2.1, 0.25),
                    (-2.1, 0.8),
                    (-1.5, 0.92),
                    (-1.0, 1.42),
                    (0.6, 1.45),
                    (1.3, 0.95),
                    (2.0, 0.8),
                    (2.15, 0.5),
                    (2.1, 0.25),
                ]
            ),
            Scenery.CAR,
            paint,
        )
        self.poly(at([(-2.1, 0.25), (-2.1, 0.55), (2.12, 0.5), (2.1, 0.25)]), Scenery.CAR, paint * 0.7)
        self.poly(at([(-1.35, 0.92), (-0.93, 1.36), (-0.2, 1.37), (-0.2, 0.93)]), Scenery.GLASS, 0.7)
        self.poly(at([(-0.1, 0.93), (-0.1, 1.37), (0.55, 1.37), (1.15, 0.95)]), Scenery.GLASS, 0.8)
        for wheel in (-1.3, 1.3):
            self.oval(x + face * wheel * m, y - 0.3 * m, 0.33 * m, 0.33 * m, Scenery.TYRE)
            self.oval(x + face * wheel * m, y - 0.3 * m, 0.18 * m, 0.18 * m, Scenery.METAL)
        self.rect(
            *(min(x + face * 1.95 * m, x + face * 2.12 * m), y - 0.75 * m),
            *(max(x + face * 1.95 * m, x + face * 2.12 * m), y - 0.62 * m),
            Scenery.LAMP,
        )

    def lamp_post(self, x: float, person: float) -> None:
        m, y = person / PERSON_METRES, self.row(person)
        self.rect(x - 0.05 * m, 0, x + 0.05 * m, y, Scenery.METAL, 0.8)
        self.rect(x - 0.02 * m, 0, x + 0.01 * m, y, Scenery.METAL, 1.3)
        self.rect(x - 0.12 * m, y - 0.25 * m, x + 0.12 * m, y, Scenery.METAL, 0.7)


def _spread(p: _Painter, low: float, high: float) -> list[float]:
    """x positions across the scene, `low` to `high` pixels apart."""
    x, places = p.uniform(0, high), []
    while x < WIDTH:
        places.append(x)
        x += p.uniform(low, high)
    return places


def _room(p: _Painter) -> None:
    """A lobby: two-tone wall, doors, notice boards, tiles."""
    p.rect(0, 0, WIDTH, p.base, Scenery.WALL)
    p.rect(0, p.base - 1.05 * p.metre, WIDTH, p.base, Scenery.DADO)
    p.rect(0, p.base - 1.1 * p.metre, WIDTH, p.base - 1.05 * p.metre, Scenery.TRIM, 0.9)
    p.slabs(p.uniform(0.5, 0.8))
    for x in _spread(p, 2.2 * p.metre, 4.0 * p.metre):
        choice = p.uniform(0, 1)
        if choice < 0.4:
            p.door(x, 1 + (p.uniform(0, 1) < 0.4))
        elif choice < 0.75:
            p.board(x)
        else:
            p.window(x, p.uniform(0.9, 1.6), 0.95, 1.1)
    p.rect(0, p.base - 0.12 * p.metre, WIDTH, p.base, Scenery.TRIM, 0.7)
    for x in _spread(p, 260, 420):
        p.pillar(x, p.uniform(100, 140)) if p.uniform(0, 1) < 0.5 else p.pot(x, p.uniform(100, 170))


def _office(p: _Painter) -> None:
    """A second room: windows with curtains, cabinets, chairs, chequered floor."""
    p.rect(0, 0, WIDTH, p.base, Scenery.WALL)
    p.slabs(p.uniform(0.7, 1.0), chequer=True)
    for x in _spread(p, 2.6 * p.metre, 4.2 * p.metre):
        if p.uniform(0, 1) < 0.65:
            wide = p.uniform(1.0, 1.7)
            p.window(x, wide, 0.85, 1.3)
            for side in (x - 0.3 * p.metre, x + (wide - 0.05) * p.metre):
                for fold in range(5):
                    p.rect(
                        side + fold * 0.07 * p.metre,
                        p.base - 2.4 * p.metre,
                        side + (fold + 1) * 0.07 * p.metre,
                        p.base - 0.4 * p.metre,
                        Scenery.CLOTH,
                        0.8 + 0.3 * (fold % 2),
                    )
        else:
            p.door(x)
    p.rect(0, p.base - 0.1 * p.metre, WIDTH, p.base, Scenery.TRIM, 0.8)
    for x in _spread(p, 150, 300):
        kind = p.uniform(0, 1)
        if kind < 0.45:
            p.cabinet(x, p.uniform(92, 120))
        elif kind < 0.8:
            p.chairs(x, p.uniform(95, 150), int(p.uniform(1, 4)))
        else:
            p.pot(x, p.uniform(95, 130))


def _corridor(p: _Painter) -> None:
    """A long corridor: rows of doors, ceiling lamps mirrored in a polished floor, lockers."""
    p.rect(0, 0, WIDTH, p.base, Scenery.WALL)
    for x in _spread(p, 90, 200):
        p.rect(x, 0, x + 3, p.base, Scenery.WALL, 0.8)
    p.slabs(1.2)
    for x in _spread(p, 100, 240):
        for k in range(6):
            width = (1 - k / 6) * 34
            p.poly(
                [(x - width * 0.4, p.base), (x + width * 0.4, p.base), (x + width, HEIGHT), (x - width, HEIGHT)],
                Scenery.FLOOR,
                1.0 + 0.07 * k,
            )
    for x in _spread(p, 1.7 * p.metre, 2.8 * p.metre):
        p.door(x) if p.uniform(0, 1) < 0.6 else p.cabinet(x, p.metre * PERSON_METRES + 3)
    p.rect(0, p.base - 0.1 * p.metre, WIDTH, p.base, Scenery.TRIM, 0.6)


def _gate(p: _Painter) -> None:
    """An outdoor gate: brick wall, bars, parked cars, paving."""
    p.rect(0, 0, WIDTH, p.base, Scenery.SKY)
    for x in _spread(p, 120, 220):
        p.hedge(p.base - 3.2 * p.metre, p.base - 1.6 * p.metre, x, x + p.uniform(60, 180))
    p.bricks(p.base - p.uniform(1.7, 2.3) * p.metre)
    p.rect(0, p.base - 2.35 * p.metre, WIDTH, p.base - 2.25 * p.metre, Scenery.TRIM)
    p.slabs(p.uniform(0.8, 1.2))
    opening = p.uniform(0.25, 0.5) * WIDTH
    p.rect(opening, p.base - 2.6 * p.metre, opening + 4 * p.metre, p.base, Scenery.SKY, 0.9)
    p.hedge(p.base - 1.0 * p.metre, p.base - 0.3 * p.metre, opening, opening + 4 * p.metre)
    p.fence(p.metre * PERSON_METRES, 2.3, 0.17, opening, opening + 4 * p.metre)
    for side in (opening, opening + 4 * p.metre):
        p.pillar(side, p.metre * PERSON_METRES + 4, 0.7)
    p.rect(0, p.base, WIDTH, p.base + 5, Scenery.TRIM, 0.8)
    for x in _spread(p, 220, 380):
        p.car(x, p.uniform(92, 118)) if p.uniform(0, 1) < 0.6 else p.tree(x, p.uniform(95, 125))
    p.lamp_post(p.uniform(0.1, 0.9) * WIDTH, 130)


def _garden(p: _Painter) -> None:
    """A garden path: trees, hedge, fence, lawn, bench."""
    p.rect(0, 0, WIDTH, p.base, Scenery.SKY)
    p.hedge(p.base - 3.4 * p.metre, p.base - 0.8 * p.metre)
    p.hedge(p.base - 1.2 * p.metre, p.base)
    p.rect(0, p.base, WIDTH, HEIGHT, Scenery.GRASS)
    p.strip(-2.2, 2.6, Scenery.TRIM, 0.9)
    p.strip(-2.1, 2.5, Scenery.FLOOR)
    p.strip(5.0, 8.0, Scenery.CARPET)
    p.strip(-8.5, -5.0, Scenery.CARPET)
    p.fence(p.metre * PERSON_METRES + 3, 1.0, 0.3)
    for x in _spread(p, 120, 240):
        p.tree(x, p.uniform(88, 150)) if p.uniform(0, 1) < 0.7 else p.bench(x, p.uniform(95, 130))


def _passage(p: _Painter) -> None:
    """A covered outdoor passage: columns, panels, railing."""
    p.rect(0, 0, WIDTH, p.base, Scenery.DARK)
    p.rect(0, p.base - 3.0 * p.metre, WIDTH, p.base, Scenery.WALL, 0.9)
    for x in _spread(p, 1.2 * p.metre, 1.3 * p.metre):
        p.rect(x, p.base - 2.9 * p.metre, x + 2, p.base, Scenery.JOINT)
    for level in (1.0, 2.0):
        p.rect(0, p.base - level * p.metre, WIDTH, p.base - level * p.metre + 2, Scenery.JOINT)
    for x in _spread(p, 3.5 * p.metre, 6 * p.metre):
        p.window(x, 1.4, 0.9, 1.2, Scenery.DARK) if p.uniform(0, 1) < 0.5 else p.door(x, 2)
    p.slabs(p.uniform(1.0, 1.5))
    p.strip(-7, -5.2, Scenery.CARPET)
    p.hedge(p.base - 0.5 * p.metre, p.base + 4, p.uniform(0, 300), p.uniform(400, 700))
    p.fence(100, 1.05, 0.14, p.uniform(500, 700), WIDTH)
    for x in _spread(p, 170, 260):
        p.pillar(x, p.uniform(110, 125), 0.55)


def _street(p: _Painter) -> None:
    """A street: facades with windows, kerb, zebra, cars, trees."""
    p.rect(0, 0, WIDTH, p.base, Scenery.SKY)
    x = -p.uniform(0, 100)
    while x < WIDTH:
        wide, tall = p.uniform(3, 7) * p.metre, p.uniform(2.6, 7.0) * p.metre
        face = int(p.rng.choice([Scenery.WALL, Scenery.DADO, Scenery.PILLAR, Scenery.BRICK]))
        p.rect(x, p.base - tall, x + wide, p.base, face, p.uniform(0.75, 1.15))
        for wx in np.arange(x + 0.4 * p.metre, x + wide - p.metre, 1.5 * p.metre):
            p.window(float(wx), 0.9, 0.9, 1.2) if p.uniform(0, 1) < 0.7 else p.door(float(wx))
            p.window(float(wx), 0.9, 3.3, 1.2)
        x += wide + p.uniform(0, 1.0) * p.metre
    p.rect(0, p.base, WIDTH, p.row(105), Scenery.CARPET)
    p.rect(0, p.row(105), WIDTH, p.row(105) + 4, Scenery.TRIM)
    for k in range(-12, 12):
        p.strip(0.9 * k, 0.9 * k + 0.4, Scenery.LAMP, 0.55) if -3 < k < 4 else None
    for x in _spread(p, 160, 320):
        p.car(x, p.uniform(100, 130)) if p.uniform(0, 1) < 0.55 else p.tree(x, p.uniform(92, 104))
    for x in _spread(p, 300, 500):
        p.lamp_post(x, 103)


_KINDS = {
    "room": _room,
    "office": _office,
    "corridor": _corridor,
    "gate": _gate,
    "garden": _garden,
    "passage": _passage,
    "street": _street,
}
KINDS = tuple(_KINDS)


@functools.cache
def noise(kind: str) -> Float[np.ndarray, "512 512"]:
    """A fixed field of zero mean and unit deviation: "grain" (fine), "blotch" (coarse), "fold" (streaks of
    cloth), "shade" (shadows of leaves)."""
    rng = np.random.default_rng([20210501, ("grain", "blotch", "fold", "shade").index(kind)])
    shapes = {
        "grain": [(512, 512), (256, 256)],
        "blotch": [(12, 12), (32, 32), (80, 80)],
        "fold": [(48, 96), (24, 72), (90, 60)],
        "shade": [(8, 12), (18, 24)],
    }[kind]
    field = np.zeros((512, 512), np.float32)
    for rows, columns in shapes:
        coarse = Image.fromarray(rng.standard_normal((rows, columns)).astype(np.float32))
        field += np.asarray(coarse.resize((512, 512), Image.Resampling.BICUBIC))
    return (field - field.mean()) / field.std()


@functools.lru_cache(maxsize=48)
def build_scene(kind: str, place: int, eye: float) -> Scene:
    """Draw the backdrop of one place. Equal arguments give equal scenes.

    kind: one of `KINDS`. place: seed of the layout and of its colours. eye: height of the camera, metres.
    """
    rng = np.random.default_rng([place, KINDS.index(kind)])
    wall = float(rng.uniform(84, 98))
    painter = _Painter(horizon=float(rng.uniform(55, 75)), eye=eye, wall_height=wall, rng=rng)
    _KINDS[kind](painter)
    materials = np.asarray(painter.material)
    shades = np.asarray(painter.shade, np.float32)
    grain, blotch = np.zeros(N_MATERIALS, np.float32), np.zeros(N_MATERIALS, np.float32)
    for table, values in ((grain, _GRAIN), (blotch, _BLOTCH)):
        table[FIRST_SCENERY:] = 0.03
        for material, value in values.items():
            table[material] = value
    tiles = [np.tile(noise(name), (2, 3))[:HEIGHT, :WIDTH] for name in ("grain", "blotch")]
    shades *= np.clip(1 + grain[materials] * tiles[0] + blotch[materials] * tiles[1] * 0.7, 0.25, 1.9)
    rows = np.arange(HEIGHT, dtype=np.float32)
    fall = np.where(rows < painter.base, 0.86 + 0.14 * rows / painter.base, 0.8 + 0.3 * (rows - painter.base) / HEIGHT)
    shades *= fall[:, None]  # walls darken upwards, floors brighten towards the camera
    return Scene(
        materials=painter.material,
        shades=Image.fromarray(np.clip(shades, 4, 255).astype(np.uint8)),
        horizon=painter.horizon,
        base=painter.base,
        eye=eye,
        nearest=230.0,
        farthest=wall * 1.18,
        **_appearance(rng),
    )


def _appearance(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Colours, near-infrared reflectances and temperatures of the materials of one place."""
    colours = np.full((N_MATERIALS, 3), 0.5, np.float32)
    # fmt: off
    base = {
        Scenery.FLOOR: (0.55, 0.53, 0.5), Scenery.JOINT: (0.36, 0.35, 0.34), Scenery.WALL: (0.78, 0.76, 0.7),
        Scenery.DADO: (0.5, 0.56, 0.55), Scenery.TRIM: (0.62, 0.6, 0.57), Scenery.DOOR: (0.5, 0.36, 0.25),
        Scenery.GLASS: (0.5, 0.58, 0.65), Scenery.BOARD: (0.45, 0.5, 0.4), Scenery.BRICK: (0.56, 0.32, 0.25),
        Scenery.MORTAR: (0.6, 0.56, 0.52), Scenery.PILLAR: (0.68, 0.66, 0.62), Scenery.WOOD: (0.5, 0.37, 0.24),
        Scenery.METAL: (0.48, 0.5, 0.52), Scenery.TRUNK: (0.36, 0.29, 0.22), Scenery.FOLIAGE: (0.24, 0.38, 0.17),
        Scenery.GRASS: (0.33, 0.45, 0.2), Scenery.SKY: (0.75, 0.82, 0.9), Scenery.CAR: (0.5, 0.5, 0.55),
        Scenery.TYRE: (0.1, 0.1, 0.1), Scenery.LAMP: (0.95, 0.95, 0.9), Scenery.CARPET: (0.42, 0.4, 0.4),
        Scenery.DARK: (0.12, 0.12, 0.13), Scenery.CLOTH: (0.45, 0.35, 0.35),
    }
    # fmt: on
    for material, colour in base.items():
        vivid = 0.12 if material in (Scenery.DOOR, Scenery.CAR, Scenery.BOARD, Scenery.CLOTH, Scenery.DADO) else 0.02
        colours[material] = np.clip(np.asarray(colour) * rng.uniform(0.75, 1.2) + rng.normal(0, vivid, 3), 0.04, 1)
    reflectance = np.zeros(N_MATERIALS, np.float32)
    reflectance[FIRST_SCENERY:] = rng.uniform(0.25, 0.75, N_MATERIALS - FIRST_SCENERY)
    for material, value in {
        Scenery.FOLIAGE: 0.75,
        Scenery.GRASS: 0.7,
        Scenery.SKY: 0.03,
        Scenery.DARK: 0.04,
        Scenery.TYRE: 0.1,
        Scenery.GLASS: 0.12,
        Scenery.LAMP: 1.0,
    }.items():
        reflectance[material] = value
    warmth = np.zeros(N_MATERIALS, np.float32)
    warmth[FIRST_SCENERY:] = rng.uniform(0.2, 0.4, N_MATERIALS - FIRST_SCENERY)
    for material, value in {
        Scenery.SKY: 0.03,
        Scenery.FOLIAGE: 0.18,
        Scenery.GRASS: 0.22,
        Scenery.GLASS: 0.14,
        Scenery.TYRE: 0.42,
        Scenery.LAMP: 0.36,
        Scenery.METAL: 0.2,
    }.items():
        warmth[material] = value + float(rng.uniform(-0.02, 0.02))
    warmth[Scenery.FLOOR] = float(rng.uniform(0.24, 0.4))
    return {"colours": colours, "reflectance": reflectance, "warmth": warmth}
