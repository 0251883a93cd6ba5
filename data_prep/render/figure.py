"""The figure: a small articulated skeleton in three dimensions, turned by the yaw of the view, projected and dressed.

Limbs are tubes and the trunk is a stack of elliptical rings, so that anything placed on them (a print, a strap, an open
jacket) turns with the body. Everything is drawn twice, as material and as shading; `pedestrian.py` then gives both the
look of a spectrum. Lengths are shares of the stature unless said otherwise; x is the person's left, y up, z ahead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from data_prep.render.people import Body, Gait, Identity, Outfit, Part
from data_prep.render.scenery import UNIT_SHADE

Point = tuple[float, float]
Joint = tuple[float, float, float]


class Figure:
    """The canvas: a material and a shade picture, and the projection of one person into them."""

    def __init__(
        self,
        material: Image.Image,
        shade: Image.Image,
        *,
        yaw: float,
        tilt: float,
        scale: float,
        foot: Point,
        relief: float,
        light_x: float,
    ) -> None:
        """yaw: radians; tilt: sine of the camera's downward angle; scale: pixels of the stature; foot: pixels;
        relief: strength of the shading; light_x: -1 lit from the left, 1 from the right."""
        self.material, self.shade = material, shade
        self.paint, self.light = ImageDraw.Draw(material), ImageDraw.Draw(shade)
        self.sin, self.cos = math.sin(yaw), math.cos(yaw)
        self.scale, self.foot, self.sin_tilt, self.cos_tilt = scale, foot, tilt, math.sqrt(1 - tilt**2)
        # nested strips of a lit cylinder: (half width, centre, grey level)
        self.strips = [
            (w, light_x * (1 - w) * 0.75, round(UNIT_SHADE * (1 - relief + 1.25 * relief * (1 - w * w) ** 0.5)))
            for w in (1.0, 0.88, 0.7, 0.48, 0.24)
        ]

    def at(self, joint: Joint) -> Point:
        """Project a joint to canvas pixels."""
        x, y, z = joint
        right, near = x * self.cos + z * self.sin, z * self.cos - x * self.sin
        return (
            self.foot[0] + self.scale * right,
            self.foot[1] - self.scale * (y * self.cos_tilt - near * self.sin_tilt),
        )

    def nearness(self, joint: Joint) -> float:
        return joint[2] * self.cos - joint[0] * self.sin

    def tube(
        self, joints: Sequence[Joint], radii: Sequence[float], what: int, dim: float = 1.0, cut: bool = False
    ) -> None:
        """A limb along `joints` with half widths `radii`, lit as a cylinder; round ends, the last one may be `cut`."""
        points, radii = [self.at(j) for j in joints], [r * self.scale for r in radii]
        normals: list[Point] = []
        last = len(points) - 1
        for k in range(last + 1):
            (x0, y0), (x1, y1) = points[max(0, k - 1)], points[min(last, k + 1)]
            length = math.hypot(x1 - x0, y1 - y0) or 1.0
            normals.append(((y0 - y1) / length, (x1 - x0) / length))
        for k, (w, centre, level) in enumerate(self.strips):
            flip = 1.0
            left, right = [], []
            for (x, y), (nx, ny), r in zip(points, normals, radii, strict=True):
                flip = 1.0 if nx >= 0 else -1.0  # the light does not turn with the limb
                a, b = (flip * centre - w) * r, (flip * centre + w) * r
                left.append((x + nx * a, y + ny * a))
                right.append((x + nx * b, y + ny * b))
            outline = left + right[::-1]
            self.light.polygon(outline, fill=round(level * dim))
            if k == 0:
                self.paint.polygon(outline, fill=int(what))
            for (x, y), r in ((points[0], radii[0]), (points[-1], radii[-1]))[: 1 if cut else 2]:
                x += centre * r
                box = (x - w * r, y - w * r, x + w * r, y + w * r)
                self.light.ellipse(box, fill=round(level * dim))
                if k == 0:
                    self.paint.ellipse(box, fill=int(what))

    def blob(self, centre: Joint, rx: float, ry: float, what: int, dim: float = 1.0) -> None:
        """An upright ellipse facing the camera, lit as a ball."""
        x, y = self.at(centre)
        rx, ry = rx * self.scale, ry * self.scale
        for k, (w, shift, level) in enumerate(self.strips):
            cx, cy = x + shift * rx, y - 0.35 * (1 - w) * ry
            box = (cx - w * rx, cy - w * ry, cx + w * rx, cy + w * ry)
            self.light.ellipse(box, fill=round(level * dim))
            if k == 0:
                self.paint.ellipse(box, fill=int(what))

    def flat(self, points: Sequence[Point], what: int, level: float | None = None) -> None:
        """A polygon in canvas pixels that keeps the shading under it, or replaces it with `level`."""
        self.paint.polygon(list(points), fill=int(what))
        if level is not None:
            self.light.polygon(list(points), fill=round(UNIT_SHADE * level))


@dataclass(frozen=True)
class Ring:
    """A horizontal ellipse of the trunk: height, half width, half depth, how far ahead and to the left it stands."""

    y: float
    a: float
    b: float
    z: float = 0.0
    x: float = 0.0


class Trunk:
    """A stack of rings, from the top down, that can be filled and have things drawn on its surface."""

    def __init__(self, figure: Figure, rings: Sequence[Ring]) -> None:
        self.figure, self.rings = figure, list(rings)

    def ring(self, y: float) -> Ring:
        rings = self.rings
        if y >= rings[0].y:
            return rings[0]
        for upper, lower in zip(rings, rings[1:], strict=False):
            if y >= lower.y:
                t = (upper.y - y) / (upper.y - lower.y)
                return Ring(
                    y,
                    *(
                        u + t * (v - u)
                        for u, v in ((upper.a, lower.a), (upper.b, lower.b), (upper.z, lower.z), (upper.x, lower.x))
                    ),
                )
        return rings[-1]

    def _across(self, ring: Ring) -> tuple[Point, float, float]:
        """Centre (pixels), half width (pixels) and the angle by which the surface is turned in view."""
        f = self.figure
        right, ahead = ring.a * f.cos, ring.b * f.sin
        return f.at((ring.x, ring.y, ring.z)), math.hypot(right, ahead) * f.scale, math.atan2(ahead, right)

    def fill(self, what: int, dim: float = 1.0) -> None:
        f = self.figure
        spans = [self._across(r)[:2] for r in self.rings]
        for k, (w, centre, level) in enumerate(f.strips):
            left = [(x + (centre - w) * half, y) for (x, y), half in spans]
            right = [(x + (centre + w) * half, y) for (x, y), half in spans]
            outline = left + right[::-1]
            f.light.polygon(outline, fill=round(level * dim))
            if k == 0:
                f.paint.polygon(outline, fill=int(what))

    def patch(
        self,
        upper: float,
        lower: float,
        centre: float,
        half: float,
        what: int,
        dim: float | None = None,
        steps: int = 3,
    ) -> None:
        """Paint the surface between two heights, `half` radians to both sides of azimuth `centre` (0 front, + left)."""
        f = self.figure
        heights = [upper + (lower - upper) * k / steps for k in range(steps + 1)]
        heights = sorted({*heights, *(r.y for r in self.rings if lower < r.y < upper)}, reverse=True)
        for turn in (-2 * math.pi, 0.0, 2 * math.pi):
            left, right = [], []
            for y in heights:
                (x, v), wide, turned = self._across(self.ring(y))
                start, stop = centre - half + turned + turn, centre + half + turned + turn
                start, stop = max(start, -math.pi / 2), min(stop, math.pi / 2)
                if stop <= start:
                    continue
                left.append((x + wide * math.sin(start), v))
                right.append((x + wide * math.sin(stop), v))
            if len(left) >= 2:
                f.flat(left + right[::-1], what, dim)

    def thread(self, path: Sequence[tuple[float, float]], width: float, what: int, dim: float | None = None) -> None:
        """A band along (height, azimuth) points of the surface, `width` thick; hidden points are left out."""
        f, visible = self.figure, []
        for y, azimuth in path:
            (x, v), wide, turned = self._across(self.ring(y))
            angle = azimuth + turned
            if math.cos(angle) > -0.05:
                visible.append((x + wide * math.sin(angle), v))
            elif len(visible) > 1:
                break
            else:
                visible = []
        if len(visible) > 1:
            thick = max(1, round(width * f.scale))
            f.paint.line(visible, fill=int(what), width=thick, joint="curve")
            if dim is not None:
                f.light.line(visible, fill=round(UNIT_SHADE * dim), width=thick, joint="curve")


def draw_person(f: Figure, who: Identity, phase: float) -> None:
    """Draw a whole person, far parts first. phase: of the gait, radians."""
    body, o, gait = who.body, who.outfit, who.gait
    legs = [_leg(body, gait, side, phase) for side in (1, -1)]
    lift = 0.045 - min(leg[2][1] for leg in legs)  # the lower ankle stands on the floor
    legs = [[(x, y + lift, z) for x, y, z in leg] for leg in legs]
    hip = body.leg + lift
    arms = [_arm(body, o, gait, side, phase, lift) for side in (1, -1)]
    sway = 0.006 * math.sin(2 * phase)

    def ring(y: float, a: float, b: float, z: float = 0.0) -> Ring:
        return Ring(y + lift + sway * 0.3, a, b, z)

    lean = gait.slouch
    loose = o.loose + {"coat": 0.012, "hoodie": 0.012, "jacket_closed": 0.008, "jacket_open": 0.01}.get(o.top, 0.0)
    torso = [
        ring(0.85, 0.036, 0.036, lean + 0.004),
        ring(0.835, 0.055, 0.042, lean),
        ring(0.822, body.shoulder * 0.72, 0.05, lean),
        ring(0.80, body.shoulder * 0.97, 0.058, lean * 0.9),
        ring(0.775, body.shoulder, body.chest, lean * 0.8),
        ring(0.70, body.shoulder * 0.9, body.chest + 0.004, lean * 0.5),
        ring(0.615, body.waist, body.belly, 0.006),
        ring(0.53, body.hip, body.belly * 0.5 + 0.038, 0.0),
        ring(body.leg - 0.02, body.hip * 0.97, 0.062, 0.0),
    ]
    far_first = sorted(range(2), key=lambda k: f.nearness(legs[k][1]))
    arm_far = sorted(range(2), key=lambda k: f.nearness(arms[k][1]))
    behind = [k for k in arm_far if f.nearness(arms[k][2]) < -0.035]
    before = [k for k in arm_far if k not in behind]
    bag_hand = 0 if o.side > 0 else 1

    if o.bag == "suitcase":
        _suitcase(f, o, arms[bag_hand], near=False)
    if o.bag == "backpack" and f.cos > 0.15:
        _backpack(f, o, torso, lift)
    _side_bag(f, o, body, lift, near=False)
    if o.hair in ("long", "ponytail") and f.cos > 0:
        _back_hair(f, body, o, lift, lean)
    for k in behind:
        _draw_arm(f, who, arms[k])
        _carried(f, o, arms[k], k == bag_hand)

    # the lower body
    skirted = o.bottom in ("skirt_short", "skirt_long", "dress")
    pelvis = Trunk(
        f,
        [
            ring(0.60, body.waist * 1.0, body.belly * 0.95),
            ring(0.53, body.hip * 0.98, body.belly * 0.5 + 0.036),
            ring(body.leg - 0.015, body.hip * 0.96, 0.062),
            ring(body.leg - 0.06, body.hip * 0.8, 0.05),
        ],
    )
    for k in far_first[:1]:
        _draw_leg(f, who, legs[k], far=True)
    pelvis.fill(Part.BOTTOM)
    for k in far_first[1:]:
        _draw_leg(f, who, legs[k], far=False)
    if skirted:
        stretch = max(abs(leg[1][2]) for leg in legs)
        hem = o.skirt + lift
        deep = max(0.07, stretch * 0.8 + 0.045)
        flare = o.flare
        skirt = Trunk(
            f,
            [
                Ring(0.605 + lift, body.waist * 1.03, body.belly),
                Ring(0.53 + lift, body.hip * 1.06, 0.078),
                Ring(hip - 0.05, body.hip * 1.1 + flare * 0.4, 0.08 + flare * 0.3),
                Ring(hem, body.hip * 1.1 + flare, max(deep, 0.08 + flare * 0.8)),
            ],
        )
        skirt.fill(Part.BOTTOM)
        for k in range(6):
            skirt.thread([(0.52 + lift, k * 1.05 + 0.3), (hem, k * 1.05 + 0.36)], 0.006, Part.BOTTOM, 0.62)
        (x, y), half, _ = skirt._across(skirt.rings[-1])
        f.flat(
            [
                (x - half, y),
                (x + half, y),
                (x + half * 0.8, y + 0.012 * f.scale),
                (x - half * 0.8, y + 0.012 * f.scale),
            ],
            Part.BOTTOM,
            0.6,
        )

    # the upper body
    hem = (
        {
            "tshirt": 0.50,
            "longsleeve": 0.50,
            "jacket_closed": 0.47,
            "jacket_open": 0.46,
            "coat": 0.31,
            "hoodie": 0.47,
            "vest": 0.49,
        }[o.top]
        - o.hem
        + lift
    )
    if skirted and o.top in ("tshirt", "longsleeve"):
        hem = 0.565 + lift
    rings = [
        Ring(r.y, r.a + (loose if i > 1 else 0.004), r.b + loose * 0.8, r.z) for i, r in enumerate(torso) if r.y > hem
    ]
    last = torso[-1]
    opening = 0.0 if hem > last.y else (last.y - hem) * 0.12
    rings.append(
        Ring(hem, max(rings[-1].a, last.a + loose) + opening, max(rings[-1].b, last.b + loose * 0.5) + opening)
    )
    if o.top in ("jacket_closed", "hoodie"):  # an elastic hem gathers the cloth
        rings[-1] = replace(rings[-1], a=rings[-1].a * 0.93, b=rings[-1].b * 0.93)
    trunk = Trunk(f, rings)
    trunk.fill(Part.TOP)
    _dress_trunk(f, trunk, o, hem, lift)

    if o.bag == "backpack" and abs(f.cos) <= 0.15:
        _backpack(f, o, torso, lift)
    _head(f, who, lift, lean)
    if o.scarf:
        _scarf(f, trunk, o, lift)
    _straps(f, trunk, o, lift)
    if o.bag == "backpack" and f.cos < -0.15:
        _backpack(f, o, torso, lift)
    if o.hair in ("long", "ponytail") and f.cos <= 0:
        _back_hair(f, body, o, lift, lean)
    for k in before:
        _draw_arm(f, who, arms[k])
        _carried(f, o, arms[k], k == bag_hand)
    _side_bag(f, o, body, lift, near=True)
    if o.bag == "suitcase":
        _suitcase(f, o, arms[bag_hand], near=True)


def _leg(body: Body, gait: Gait, side: int, phase: float) -> list[Joint]:
    """Hip, knee, ankle and toe of one leg in the middle of a stride."""
    swing = phase if side > 0 else phase + math.pi
    angle = gait.stride * math.sin(swing)
    bend = 0.08 + 1.5 * gait.stride * max(0.0, math.cos(swing)) ** 2
    thigh, shin = (body.leg - 0.045) * 0.5, (body.leg - 0.045) * 0.5
    x = side * (body.hip * 0.52)
    foot_x = x + side * gait.stance
    knee = ((x + foot_x) / 2, body.leg - thigh * math.cos(angle), thigh * math.sin(angle))
    ankle = (foot_x, knee[1] - shin * math.cos(angle - bend), knee[2] + shin * math.sin(angle - bend))
    out = side * gait.toe_out
    pitch = (angle - bend) * 0.7
    toe = (foot_x + 0.095 * math.sin(out), ankle[1] - 0.028 + 0.095 * math.sin(pitch), ankle[2] + 0.095 * math.cos(out))
    return [(x, body.leg, 0.0), knee, ankle, toe]


def _arm(body: Body, o: Outfit, gait: Gait, side: int, phase: float, lift: float) -> list[Joint]:
    """Shoulder, elbow, wrist and finger tips of one arm, swinging against the leg of its side."""
    loaded = o.bag in ("handbag", "briefcase", "suitcase") and side == o.side
    angle = -gait.swing * (0.3 if loaded else 1.0) * math.sin(phase if side > 0 else phase + math.pi)
    if o.bag == "suitcase" and loaded:
        angle = -0.35
    bend = 0.05 if loaded else gait.elbow * (0.6 + 0.4 * math.sin(phase if side < 0 else phase + math.pi))
    shoulder = (side * (body.shoulder - body.arm * 0.95 + 0.5 * o.loose), 0.785 + lift, gait.slouch * 0.8)
    upper, fore = 0.162, 0.143
    out = gait.spread + 0.4 * max(0.0, body.waist - 0.09)
    elbow = (
        shoulder[0] + side * upper * math.sin(out),
        shoulder[1] - upper * math.cos(out) * math.cos(angle),
        shoulder[2] + upper * math.sin(angle),
    )
    inward = out * 0.3
    wrist = (
        elbow[0] + side * fore * math.sin(inward),
        elbow[1] - fore * math.cos(angle + bend),
        elbow[2] + fore * math.sin(angle + bend),
    )
    tip = (wrist[0], wrist[1] - 0.055 * math.cos(angle + bend), wrist[2] + 0.055 * math.sin(angle + bend))
    return [shoulder, elbow, wrist, tip]


def _between(a: Joint, b: Joint, t: float) -> Joint:
    return (a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]), a[2] + t * (b[2] - a[2]))


def _draw_leg(f: Figure, who: Identity, leg: list[Joint], far: bool) -> None:
    body, o = who.body, who.outfit
    hip, knee, ankle, toe = leg
    dim = 0.82 if far else 1.0
    thigh, calf = body.thigh, body.thigh * 0.74
    skin = Part.TIGHTS if o.tights and o.bottom in ("skirt_short", "skirt_long", "dress") else Part.SKIN
    cloth = o.bottom in ("slim", "wide")
    heel = (ankle[0] - 0.25 * (toe[0] - ankle[0]), ankle[1] - 0.024, ankle[2] - 0.25 * (toe[2] - ankle[2]))
    if o.shoes == "sneakers":
        f.tube([(heel[0], heel[1] - 0.012, heel[2]), (toe[0], toe[1] - 0.012, toe[2])], (0.02, 0.018), Part.SOLE, dim)
    f.tube([heel, _between(heel, toe, 0.55), toe], (0.022, 0.022, 0.016), Part.SHOES, dim)
    f.tube([ankle, heel], (0.021, 0.02), Part.SHOES, dim)
    if cloth:
        wide = o.bottom == "wide"
        hem = 0.032 + 0.012 * o.loose / 0.022 + (0.014 if wide else -0.006)
        ease = 0.008 if wide else 0.0
        if o.shoes == "boots" and not wide:
            f.tube([_between(knee, ankle, 0.45), ankle], (calf * 1.05, 0.028), Part.SHOES, dim)
            f.tube([hip, knee, _between(knee, ankle, 0.45)], (thigh * 1.08, calf * 1.14, calf * 1.0), Part.BOTTOM, dim)
        else:
            f.tube(
                [hip, knee, _between(knee, ankle, 1.08 if wide else 1.02)],
                (thigh * 1.08 + ease, calf * 1.14 + ease, hem),
                Part.BOTTOM,
                dim,
                cut=True,
            )
        for t in (0.03, 0.9):  # folds at the knee and above the hem
            a = f.at(_between(knee, ankle, t))
            r = f.scale * calf
            f.light.line(
                (a[0] - 0.8 * r, a[1] - 0.25 * r, a[0] + 0.7 * r, a[1] + 0.2 * r), fill=round(78 * dim), width=2
            )
        if o.leg_stripe:
            side = 1 if hip[0] > 0 else -1
            for p, q, r0, r1 in ((hip, knee, thigh, calf), (knee, ankle, calf, hem)):
                outer = [(p[0] + side * r0 * 0.95, p[1], p[2]), (q[0] + side * r1 * 0.95, q[1], q[2])]
                if f.nearness((side * 1.0, 0, 0)) > -0.35:
                    f.paint.line([f.at(v) for v in outer], fill=int(Part.STRIPE), width=max(2, round(0.016 * f.scale)))
    else:
        f.tube([hip, knee, ankle], (thigh, calf * 0.98, 0.024), skin, dim)
        f.tube([_between(knee, ankle, 0.1), _between(knee, ankle, 0.45), ankle], (calf * 0.92, calf, 0.024), skin, dim)
        if o.shoes == "boots":
            f.tube([_between(knee, ankle, 0.35), ankle], (calf * 1.12, 0.03), Part.SHOES, dim)
        else:
            f.tube([_between(knee, ankle, 0.93), heel], (0.024, 0.022), Part.SHOES, dim)
        if o.bottom == "shorts":
            end = _between(hip, knee, 0.72 + 0.4 * (o.loose / 0.022 - 0.5))
            f.tube([hip, end], (thigh * 1.1, thigh * 1.12 + 0.006), Part.BOTTOM, dim, cut=True)


def _draw_arm(f: Figure, who: Identity, arm: list[Joint]) -> None:
    body, o = who.body, who.outfit
    shoulder, elbow, wrist, tip = arm
    r = body.arm
    dim = 0.8 if f.nearness(shoulder) < -0.04 else 0.97
    long = o.top != "tshirt" and not (o.top == "vest" and o.stripes == 1)
    f.tube([elbow, wrist], (r * 0.82, r * 0.62), Part.SKIN, dim)
    f.tube([wrist, _between(wrist, tip, 0.7)], (0.017, 0.019), Part.SKIN, dim)
    ease = 0.35 * o.loose + {"coat": 0.006, "jacket_closed": 0.005, "jacket_open": 0.005, "hoodie": 0.006}.get(
        o.top, 0.0
    )
    if long:
        f.tube(
            [shoulder, elbow, _between(elbow, wrist, 0.94)],
            (r * 1.08 + 0.7 * ease, r + ease, r * 0.82 + ease),
            Part.SLEEVE,
            dim,
            cut=True,
        )
        x, y = f.at(elbow)
        s = (r + ease) * f.scale
        f.light.line((x - 0.8 * s, y + 0.2 * s, x + 0.8 * s, y - 0.3 * s), fill=round(80 * dim), width=2)
        if o.texture == "band":
            f.tube(
                [_between(shoulder, elbow, 0.55), _between(shoulder, elbow, 0.8)],
                (r * 1.08 + ease, r * 1.05 + ease),
                Part.STRIPE,
                dim,
                cut=True,
            )
    else:
        f.tube([shoulder, elbow], (r * 1.1, r * 0.85), Part.SKIN, dim)
        end = _between(shoulder, elbow, 0.7)
        f.tube([shoulder, end], (r * 1.1 + 0.7 * ease, r * 1.18 + ease), Part.SLEEVE, dim, cut=True)
    if o.texture == "stripes_across" and o.top != "vest":
        reach = 0.9 if long else 0.6
        for t in np.arange(0.15, reach * 2 if long else reach, o.pitch * 4.5):
            a, b, u = (shoulder, elbow, float(t)) if t < 1 else (elbow, wrist, float(t) - 1)
            if u > 0.85:
                continue
            p, q = f.at(_between(a, b, u)), f.at(_between(a, b, u + 0.01))
            length = math.hypot(q[0] - p[0], q[1] - p[1]) or 1.0
            nx, ny = (p[1] - q[1]) / length, (q[0] - p[0]) / length
            s = (r * 1.05 + ease) * f.scale
            f.paint.line(
                (p[0] - nx * s, p[1] - ny * s, p[0] + nx * s, p[1] + ny * s),
                fill=int(Part.STRIPE),
                width=max(2, round(o.pitch * 0.4 * f.scale)),
            )
    if o.texture == "reflective":
        x, y = f.at(_between(elbow, wrist, 0.3) if long else _between(shoulder, elbow, 0.75))
        s = (r + ease) * f.scale * 0.95
        f.flat(
            [
                (x - s, y - 0.008 * f.scale),
                (x + s, y - 0.008 * f.scale),
                (x + s, y + 0.008 * f.scale),
                (x - s, y + 0.008 * f.scale),
            ],
            Part.REFLECTIVE,
            1.1,
        )


def _dress_trunk(f: Figure, trunk: Trunk, o: Outfit, hem: float, lift: float) -> None:
    """Collar, opening, pattern, belt and pockets of the upper garment."""
    neck = trunk.rings[0].y
    all_round = math.pi
    low = hem + 0.004
    if o.texture == "stripes_across":
        y = 0.79 + lift
        while y > low + o.pitch * 0.5:
            trunk.patch(y, y - o.pitch * 0.45, 0, all_round, Part.STRIPE, steps=1)
            y -= o.pitch
    elif o.texture == "stripes_down":
        count = 8 + 2 * o.stripes
        for k in range(count):
            trunk.patch(0.815 + lift, low, 2 * math.pi * k / count, 0.75 * math.pi / count, Part.STRIPE)
    elif o.texture == "yoke":
        trunk.patch(neck, 0.755 + lift - o.pitch, 0, all_round, Part.STRIPE, steps=4)
    elif o.texture == "band":
        middle = 0.70 + lift - o.pitch
        trunk.patch(middle, middle - 0.035 - o.pitch * 0.5, 0, all_round, Part.STRIPE, steps=1)
    elif o.texture == "print":
        size = 0.5 + 3 * o.pitch
        centre = 0.0 if o.stripes != 3 else math.pi  # on the chest, or on the back
        trunk.patch(0.765 + lift, 0.765 + lift - 0.10 - o.pitch, centre, size, Part.PRINT)
        trunk.patch(0.74 + lift, 0.72 + lift - o.pitch, centre, size * 0.5, Part.TOP, steps=1)
    elif o.texture == "reflective":
        for k in range(o.stripes):
            y = 0.68 + lift - 0.065 * k
            if y - 0.02 > low:
                trunk.patch(y, y - 0.017, 0, all_round, Part.REFLECTIVE, 1.1, steps=1)
    if o.top == "jacket_open" or o.top == "vest":
        half = 0.34 if o.top == "jacket_open" else 0.24
        trunk.patch(0.835 + lift, low - 0.002, 0, half, Part.INNER, steps=4)
        for edge in (-half, half):
            trunk.thread([(0.835 + lift, edge * 0.7), (0.70 + lift, edge), (low, edge)], 0.009, Part.TOP, 0.55)
        trunk.patch(0.842 + lift, 0.80 + lift, 0, 0.4, Part.SKIN)
    elif o.top in ("jacket_closed", "coat", "hoodie"):
        trunk.thread([(0.83 + lift, 0.0), (0.70 + lift, 0.0), (low, 0.0)], 0.008, Part.SEAM, 0.7)
        if o.top == "coat":
            for y in (0.74, 0.68, 0.62, 0.56):
                trunk.patch(y + lift, y + lift - 0.014, 0.16, 0.06, Part.SEAM, 0.7, steps=1)
            for side in (-1, 1):  # lapels
                trunk.patch(0.82 + lift, 0.73 + lift, side * 0.3, 0.17, Part.TOP, 1.2)
        if o.top == "hoodie":
            trunk.patch(0.58 + lift, 0.515 + lift, 0, 0.75, Part.TOP, 0.82)
        else:
            for side in (-1, 1):
                trunk.thread([(0.56 + lift, side * 0.95), (0.52 + lift, side * 0.75)], 0.01, Part.SEAM, 0.65)
    else:
        trunk.patch(0.85 + lift, 0.822 + lift, 0, 0.6, Part.SKIN)  # neck line
        trunk.patch(0.822 + lift, 0.808 + lift, 0, 0.3, Part.SKIN)
    if o.belt and o.top in ("coat",):
        trunk.patch(0.615 + lift, 0.585 + lift, 0, all_round, Part.BELT, steps=1)
    (x, y), half, _ = trunk._across(trunk.rings[-1])  # the hem throws a thin shadow
    if o.bottom != "dress":
        f.light.line((x - half * 0.98, y, x + half * 0.98, y), fill=62, width=3)
    for side in (-1, 1):  # folds from the arm pits to the waist
        trunk.thread([(0.74 + lift, side * 1.0), (0.66 + lift, side * 0.55)], 0.008, Part.TOP, 0.74)
        trunk.thread([(0.60 + lift, side * 1.2), (0.57 + lift, side * 0.4)], 0.008, Part.TOP, 0.76)


def _head(f: Figure, who: Identity, lift: float, lean: float) -> None:
    body, o = who.body, who.outfit
    top = 1.0 - 0.012 + lift
    high = body.head
    wide, deep = high * 0.74, high * 0.86
    centre: Joint = (0.0, top - high, lean + 0.012)
    neck = [(0.0, centre[1] - high * 0.6, lean + 0.006), (0.0, (0.822 if f.cos > 0 else 0.842) + lift, lean)]
    f.tube(neck, (wide * 0.62, wide * 0.7), Part.SKIN, 0.85, cut=True)
    across = math.hypot(wide * f.cos, deep * f.sin)
    facing, side = f.cos, f.sin  # 1 towards the camera; 1 to the right
    f.blob(centre, across, high, Part.SKIN)
    (x, y), s = f.at(centre), f.scale
    w, h = across * s, high * s

    def spot(px: float, py: float, rx: float, ry: float, what: int, level: float | None = None) -> None:
        box = (x + px * w - rx * w, y + py * h - ry * h, x + px * w + rx * w, y + py * h + ry * h)
        f.paint.ellipse(box, fill=int(what))
        if level is not None:
            f.light.ellipse(box, fill=round(UNIT_SHADE * level))

    def face(angle: float) -> float | None:
        """Position across the head of something `angle` to the left of the nose, None where it is hidden."""
        turned = angle + math.atan2(deep * side, wide * facing)
        return math.sin(turned) if math.cos(turned) > 0.1 else None

    if (nose := face(0.0)) is not None and abs(side) > 0.35:
        spot(nose * 1.04, 0.12, 0.13, 0.1, Part.SKIN, 1.0)
    for ear in (-1, 1):
        if (px := face(ear * 1.5)) is not None and o.hair not in ("long", "hood", "bob"):
            spot(px * 0.97, 0.05, 0.12, 0.16, Part.SKIN, 0.8)
    for eye in (-0.42, 0.42):
        if (px := face(eye)) is not None:
            spot(px, -0.08, 0.09, 0.05, Part.EYE, 0.9)
            f.light.line((x + (px - 0.15) * w, y - 0.19 * h, x + (px + 0.15) * w, y - 0.19 * h), fill=60, width=2)
    if (px := face(0.0)) is not None:
        if o.beard:
            spot(px * 0.85, 0.62, 0.55, 0.36, Part.HAIR, 0.9)
        spot(px, 0.5, 0.2, 0.05, Part.MOUTH, 0.75)
        f.light.line((x + px * w, y - 0.02 * h, x + px * w, y + 0.24 * h), fill=150, width=2)
    if o.glasses:
        for eye in (-0.45, 0.45):
            if (px := face(eye)) is not None:
                spot(px, -0.07, 0.24, 0.13, Part.GLASSES, 0.7)
        if (px := face(0.0)) is not None:
            f.paint.line(
                (x + (px - 0.35) * w, y - 0.1 * h, x + (px + 0.35) * w, y - 0.1 * h), fill=int(Part.GLASSES), width=2
            )
    _hair(f, o, (x, y), w, h, math.atan2(deep * side, wide * facing))


def _hair(f: Figure, o: Outfit, at: Point, w: float, h: float, turned: float) -> None:
    """Hair or headwear: a shell around the skull that leaves the face open."""
    if o.hair == "bald":
        return
    x, y = at
    if o.hair == "cap":
        _hair(f, replace(o, hair="short", volume=0.0), at, w, h, turned)
    thick = {"short": 1.05, "bob": 1.16, "long": 1.14, "hood": 1.3, "cap": 1.1}.get(o.hair, 1.07) + 0.07 * o.volume
    what = Part.HEADWEAR if o.hair in ("cap", "hood") else Part.HAIR
    line = {"short": -0.38, "cap": -0.3, "hood": -0.62}.get(
        o.hair, -0.42
    ) - 0.25 * o.fringe  # of the front, in half heads
    sides = {"short": 0.15, "cap": -0.15, "bun": 0.1, "ponytail": 0.1, "bob": 0.85, "long": 1.3, "hood": 1.15}[o.hair]
    nape = {"short": 0.72, "cap": 0.0, "bun": 0.75, "ponytail": 0.75, "bob": 0.95, "long": 1.5, "hood": 1.25}[o.hair]
    gape = {"hood": 0.75, "long": 0.95, "bob": 0.95}.get(o.hair, 1.25)  # half angle of the open face
    shell: list[Point] = []
    lower: list[Point] = []
    for k in range(25):
        t = -1 + k / 12
        angle = math.asin(max(-1.0, min(1.0, t)))
        azimuth = math.remainder(angle - turned, 2 * math.pi)
        upper = -thick * math.sqrt(max(0.0, 1 - (t * 0.98) ** 2))
        a = abs(azimuth)
        if a < gape - 0.2:
            bottom = line - 0.1 * math.cos(azimuth * 1.5)
        elif a < gape:
            bottom = line + (sides - line) * (a - gape + 0.2) / 0.2
        elif a < 2.0:
            bottom = sides
        else:
            bottom = sides + (nape - sides) * min(1.0, (a - 2.0) / 0.5)
        bulge = thick if bottom < 0.9 else thick * 1.04
        edge = math.sqrt(max(0.0, 1 - t * t))
        if bottom > 0 and o.hair not in ("long", "hood", "bob"):
            bottom = min(bottom, edge * 1.0 + 0.02)  # short hair follows the skull
        shell.append((x + t * bulge * w, y + upper * h))
        lower.append((x + t * bulge * w, y + max(upper, bottom) * h))
    f.flat(shell + lower[::-1], what)
    for k, (width, shift, level) in enumerate(f.strips):
        if k == 0:
            f.light.polygon(shell + lower[::-1], fill=round(level * 0.95))
            continue
        over = [(x + (px - x) * width + shift * w, y + (py - y) * (0.55 + 0.45 * width)) for px, py in shell]
        under = [(x + (px - x) * width + shift * w, max(py, y - 0.98 * h)) for px, py in lower]
        f.light.polygon(
            over + [(px, min(py, q[1])) for (px, py), q in zip(under[::-1], lower[::-1], strict=True)],
            fill=round(level * 0.97),
        )
    if o.hair == "cap":
        front = math.sin(turned) if math.cos(turned) > -0.2 else None
        if front is not None:
            half = 0.75 * abs(math.cos(turned)) + 0.4
            cx = x + front * w * 0.9
            f.flat(
                [
                    (cx - half * w, y - 0.3 * h),
                    (cx + half * w, y - 0.3 * h),
                    (cx + half * w * 0.9, y - 0.12 * h),
                    (cx - half * w * 0.9, y - 0.12 * h),
                ],
                Part.HEADWEAR,
                0.75,
            )
    if o.hair == "bun":
        cx, cy = x - math.sin(turned) * w * 0.85, y - 0.75 * h - 0.3 * h * max(0.0, math.cos(turned))
        r = (0.4 + 0.15 * o.volume) * h
        box = (cx - r, cy - r, cx + r, cy + r)
        f.paint.ellipse(box, fill=int(Part.HAIR))
        f.light.ellipse(box, fill=88)
        f.light.ellipse((cx - 0.7 * r, cy - 0.8 * r, cx + 0.6 * r, cy + 0.4 * r), fill=125)


def _back_hair(f: Figure, body: Body, o: Outfit, lift: float, lean: float) -> None:
    """Hair that falls over the back."""
    high = body.head
    y = 1.0 - high + lift
    length = 0.12 + 0.12 * o.volume
    if o.hair == "ponytail":
        f.tube(
            [
                (0, y + 0.02, lean - high * 0.75),
                (0, y - 0.03, lean - high * 1.25),
                (0.006 * o.side, y - length - 0.02, lean - high * 0.95),
            ],
            (0.016, 0.024, 0.012),
            Part.HAIR,
        )
    else:
        hair = Trunk(
            f,
            [
                Ring(y, high * 0.8, high * 0.6, lean - 0.02),
                Ring(y - high, high * 0.92, high * 0.6, lean - 0.03),
                Ring(y - high - length * 0.6, high * 0.95, high * 0.42, lean - 0.045),
                Ring(y - high - length, high * 0.7, high * 0.3, lean - 0.045),
            ],
        )
        hair.fill(Part.HAIR, 0.95)


def _scarf(f: Figure, trunk: Trunk, o: Outfit, lift: float) -> None:
    y = 0.845 + lift
    collar = Trunk(
        f, [Ring(y + 0.022, 0.052, 0.052, 0.01), Ring(y, 0.068, 0.064, 0.01), Ring(y - 0.03, 0.06, 0.06, 0.01)]
    )
    collar.fill(Part.SCARF)
    trunk.patch(y - 0.02, y - 0.17 - o.hem, o.side * 0.35, 0.22, Part.SCARF, 0.95)


def _straps(f: Figure, trunk: Trunk, o: Outfit, lift: float) -> None:
    if o.bag == "backpack":
        for side in (-1, 1):
            trunk.thread(
                [
                    (0.825 + lift, side * 0.6),
                    (0.78 + lift, side * 0.62),
                    (0.70 + lift, side * 0.8),
                    (0.65 + lift, side * 1.2),
                ],
                0.022,
                Part.STRAP,
                0.85,
            )
    elif o.bag == "cross_body":
        s = o.side
        for path in (
            [(0.82, -0.7), (0.77, -0.5), (0.70, 0.05), (0.62, 0.65), (0.52, 1.25)],
            [
                (0.82, math.pi + 0.7),
                (0.77, math.pi + 0.5),
                (0.70, math.pi - 0.05),
                (0.62, math.pi - 0.65),
                (0.52, math.pi - 1.25),
            ],
        ):
            trunk.thread([(y + lift, s * a) for y, a in path], 0.018, Part.STRAP, 0.9)
    elif o.bag == "shoulder":
        for a in (0.5, math.pi - 0.5):
            trunk.thread(
                [
                    (0.825 + lift, o.side * (1.0 if a < 1 else 2.1)),
                    (0.75 + lift, o.side * (0.95 if a < 1 else 2.2)),
                    (0.60 + lift, o.side * 1.4),
                ],
                0.015,
                Part.STRAP,
                0.9,
            )


def _box(f: Figure, centre: Joint, a: float, half: float, b: float, what: int = Part.BAG) -> Trunk:
    """A bag: half width across the body, half height, half depth."""
    x, y, z = centre
    trunk = Trunk(
        f,
        [
            Ring(y + half, a * 0.7, b * 0.8, z, x),
            Ring(y + half * 0.8, a * 0.97, b, z, x),
            Ring(y, a, b, z, x),
            Ring(y - half * 0.85, a, b, z, x),
            Ring(y - half, a * 0.9, b * 0.9, z, x),
        ],
    )
    trunk.fill(what)
    return trunk


def _backpack(f: Figure, o: Outfit, torso: Sequence[Ring], lift: float) -> None:
    size = o.bag_size
    depth = 0.05 * size
    pack = _box(f, (0.0, 0.70 + lift, torso[4].z - torso[4].b - depth * 0.75), 0.092 * size, 0.11 * size, depth)
    pack.patch(0.685 + lift, 0.62 + lift, math.pi, 0.8, Part.FLAP, steps=1)
    pack.thread(
        [(0.775 + lift, math.pi - 1.1), (0.785 + lift, math.pi), (0.775 + lift, math.pi + 1.1)], 0.008, Part.FLAP, 0.7
    )


def _side_bag(f: Figure, o: Outfit, body: Body, lift: float, near: bool) -> None:
    if o.bag not in ("shoulder", "cross_body"):
        return
    size = o.bag_size
    wide = body.hip + o.loose + 0.03
    centre: Joint = (
        o.side * wide,
        (0.56 if o.bag == "shoulder" else 0.49) + lift,
        0.0 if o.bag == "shoulder" else -0.01,
    )
    if (f.nearness(centre) > -0.03) != near:
        return
    bag = _box(f, centre, 0.026 * size, (0.065 if o.bag == "shoulder" else 0.05) * size, 0.075 * size)
    bag.patch(centre[1] + 0.04 * size, centre[1], o.side * math.pi / 2, 1.2, Part.FLAP, steps=1)


def _carried(f: Figure, o: Outfit, arm: list[Joint], holding: bool) -> None:
    """A bag that hangs from this hand."""
    if not holding or o.bag not in ("handbag", "briefcase"):
        return
    x, y, z = arm[3]
    size = o.bag_size
    half = (0.05 if o.bag == "handbag" else 0.06) * size
    hand = f.at((x, y, z))
    centre: Joint = (x, y - half - 0.03, z)
    box = _box(f, centre, 0.028 if o.bag == "handbag" else 0.02, half, (0.06 if o.bag == "handbag" else 0.1) * size)
    if o.bag == "handbag":
        box.patch(centre[1] + half * 0.7, centre[1] + half * 0.1, 0, math.pi, Part.FLAP, steps=1)
    (bx, by), wide, _ = box._across(box.rings[0])
    for end in (-0.6, 0.6):
        f.paint.line(
            (hand[0], hand[1] - 0.01 * f.scale, bx + end * wide, by + 1),
            fill=int(Part.STRAP),
            width=max(2, round(0.008 * f.scale)),
        )


def _suitcase(f: Figure, o: Outfit, arm: list[Joint], near: bool) -> None:
    x, y, z = arm[3]
    centre: Joint = (x + o.side * 0.01, 0.17 * o.bag_size + 0.02, z - 0.16)
    if (f.nearness(centre) > 0) != near:
        return
    half = 0.15 * o.bag_size
    handle = [f.at((x, y, z)), f.at((centre[0], centre[1] + half, centre[2]))]
    f.paint.line(handle, fill=int(Part.STRAP), width=max(2, round(0.012 * f.scale)))
    f.light.line(handle, fill=110, width=max(2, round(0.012 * f.scale)))
    case = _box(f, centre, 0.1 * o.bag_size, half, 0.06 * o.bag_size)
    for k in (-0.4, 0.0, 0.4):
        case.patch(
            centre[1] + half * 0.8, centre[1] - half * 0.8, k + (0 if f.cos > 0 else math.pi), 0.1, Part.FLAP, steps=1
        )
    for side in (-0.7, 0.7):
        case_x, case_y = f.at((centre[0] + side * 0.1 * o.bag_size, 0.012, centre[2]))
        r = 0.016 * f.scale
        f.flat(
            [(case_x - r, case_y - r), (case_x + r, case_y - r), (case_x + r, case_y + r), (case_x - r, case_y + r)],
            Part.SOLE,
            0.3,
        )
