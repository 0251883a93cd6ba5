"""One pedestrian crop, drawn from who is seen, how, and in which spectrum.

`draw(identity, nuisance, spectrum)` is a pure function. The person (`people.py`) is drawn as a figure (`figure.py`) in
front of a backdrop (`scenery.py`), once as material and once as shading; here both become what a camera records.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFilter

from data_prep.render.figure import Figure, Point, draw_person
from data_prep.render.people import Identity, Part
from data_prep.render.scenery import (
    FIRST_SCENERY,
    FOCAL,
    KINDS,
    N_MATERIALS,
    PERSON_METRES,
    UNIT_SHADE,
    WIDTH,
    Scene,
    Scenery,
    build_scene,
    noise,
)

Spectrum = Literal["visible", "near_infrared", "thermal"]
SUPERSAMPLING = 3


@dataclass(frozen=True)
class Camera:
    """A fixed camera: where it stands and how it records."""

    kind: str
    place: int  # seed of the scene
    eye: float  # metres above the floor
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    gain: float = 1.0
    contrast: float = 1.0
    noise: float = 0.02
    blur: float = 0.3  # radius, pixels at a height of 128
    quality: int = 88  # of the JPEG file
    outdoor: bool = False


@dataclass(frozen=True)
class Nuisance:
    """Everything about one image that is not the person. Radians; yaw 0 faces the camera, pi/2 walks to the right."""

    camera: Camera
    height: int  # pixels
    width: int
    yaw: float
    phase: float  # of the gait
    distance: float  # 0 farthest, 1 nearest
    place_x: float  # 0..1 across the scene
    fill: float  # share of the crop that 1.7 m take
    shift_x: float  # of the person from the middle, share of the width
    shift_y: float  # of the feet from where they belong, share of the height
    light_x: float  # -1 from the left, 1 from the right
    relief: float  # strength of the shading
    gain: float
    gamma: float
    cast: float  # strength of the cast shadow
    dapple: float  # strength of shadows of leaves on everything
    noise: float  # factor
    blur: float  # factor
    motion: float  # horizontal blur, pixels at a height of 128
    occluder: str  # "none", "pole", "car", "plant", "rail", "wall"
    occluder_x: float
    grain: int  # seed of pixel noise


def sample_nuisance(
    rng: np.random.Generator, camera: Camera, height: int, width: int, yaw: float | None = None
) -> Nuisance:
    """Draw the circumstances of one image. `height`, `width` in pixels; `yaw` fixes the view if given."""
    yaw = float(rng.uniform(-math.pi, math.pi)) if yaw is None else float(yaw)
    kind = rng.random()
    occluder = (
        "none"
        if kind < 0.86
        else str(rng.choice(("pole", "car", "plant", "rail") if camera.outdoor else ("pole", "plant", "wall", "rail")))
    )
    return Nuisance(
        camera=camera,
        height=height,
        width=width,
        yaw=yaw,
        phase=float(rng.uniform(0, 2 * math.pi)),
        distance=float(rng.random()),
        place_x=float(rng.random()),
        fill=float(rng.uniform(0.77, 0.88)),
        shift_x=float(rng.normal(0, 0.03)),
        shift_y=float(rng.normal(0, 0.012)),
        light_x=float(rng.uniform(-1, 1)),
        relief=float(rng.uniform(0.3, 0.55)),
        gain=float(np.exp(rng.normal(0, 0.16))),
        gamma=float(np.exp(rng.normal(0, 0.1))),
        cast=float(rng.uniform(0.15, 0.5) if camera.outdoor else rng.uniform(0.05, 0.3)),
        dapple=float(rng.uniform(0.12, 0.28)) if camera.outdoor and rng.random() < 0.3 else 0.0,
        noise=float(np.exp(rng.normal(0, 0.3))),
        blur=float(np.exp(rng.normal(0, 0.35))),
        motion=float(rng.uniform(0.7, 1.7)) if rng.random() < 0.12 else 0.0,
        occluder=occluder,
        occluder_x=float(rng.uniform(-1, 1)),
        grain=int(rng.integers(2**32)),
    )


def draw(identity: Identity, nuisance: Nuisance, spectrum: Spectrum) -> UInt8[np.ndarray, "H W 3"]:
    """Draw one crop of `nuisance.height` x `nuisance.width` pixels.

    Near-infrared and thermal crops are grey (three equal channels), and depend on the identity's colours in no way.
    """
    if spectrum not in ("visible", "near_infrared", "thermal"):
        raise ValueError(f"spectrum is {spectrum!r}; expected visible, near_infrared or thermal")
    scene = build_scene(nuisance.camera.kind, nuisance.camera.place, nuisance.camera.eye)
    figure, depth_gain = _compose(identity, nuisance, scene)
    if spectrum == "visible":
        return _visible(identity, nuisance, scene, figure)
    if spectrum == "near_infrared":
        return _near_infrared(identity, nuisance, scene, figure, depth_gain)
    return _thermal(identity, nuisance, scene, figure)


# composition


def _compose(identity: Identity, n: Nuisance, scene: Scene) -> tuple[Figure, Float[np.ndarray, " H"]]:
    """Place the person before the scene. Also returns the near-infrared illumination of each canvas row's backdrop."""
    rows, columns = n.height * SUPERSAMPLING, n.width * SUPERSAMPLING
    tall = scene.farthest * (scene.nearest / scene.farthest) ** n.distance  # pixels of 1.7 m in the scene
    window = tall / n.fill
    foot_row = scene.horizon + tall * scene.eye / PERSON_METRES
    foot = (columns * (0.5 + n.shift_x), rows * (0.5 + n.fill / 2 + n.shift_y) - 0.01 * rows)
    zoom = rows / window
    top = foot_row - foot[1] / zoom
    wide = columns / zoom
    left = n.place_x * (WIDTH - wide)
    box = (left, top, left + wide, top + window)
    # the scene is cropped with nearest neighbours: materials have no averages
    transform = (zoom_inverse := 1 / zoom, 0, box[0], 0, zoom_inverse, box[1])
    material = scene.materials.transform(
        (columns, rows), Image.Transform.AFFINE, transform, Image.Resampling.NEAREST, fillcolor=int(Scenery.FLOOR)
    )
    shade = scene.shades.transform(
        (columns, rows), Image.Transform.AFFINE, transform, Image.Resampling.BILINEAR, fillcolor=UNIT_SHADE
    )
    distance = FOCAL * PERSON_METRES / tall
    tilt = math.sin(math.atan2(scene.eye - 0.9, distance))
    figure = Figure(
        material,
        shade,
        yaw=n.yaw,
        tilt=tilt,
        scale=rows * n.fill * identity.body.stature,
        foot=foot,
        relief=n.relief,
        light_x=n.light_x,
    )
    _cast_shadow(figure, n)
    draw_person(figure, identity, n.phase)
    _occlude(figure, n)
    seen = np.maximum(top + (np.arange(rows, dtype=np.float32)) / zoom, scene.base)
    depth_gain = np.clip(((seen - scene.horizon) / (foot_row - scene.horizon)) ** 1.3, 0.12, 2.2)
    return figure, depth_gain.astype(np.float32)


def _cast_shadow(f: Figure, n: Nuisance) -> None:
    x, y = f.foot
    mask = Image.new("L", f.shade.size, 0)
    pen, s = ImageDraw.Draw(mask), f.scale
    pen.ellipse((x - 0.17 * s, y - 0.035 * s, x + 0.17 * s, y + 0.045 * s), fill=round(255 * min(0.75, 0.3 + n.cast)))
    if n.camera.outdoor:
        side = -1 if n.light_x > 0 else 1
        pen.polygon(
            [
                (x - 0.07 * s, y),
                (x + 0.07 * s, y),
                (x + side * 0.55 * s + 0.1 * s, y - 0.16 * s),
                (x + side * 0.55 * s - 0.12 * s, y - 0.16 * s),
            ],
            fill=round(255 * n.cast),
        )
    mask = mask.reduce(4).resize(mask.size, Image.Resampling.BILINEAR)
    f.shade.paste(f.shade.point(_DARKER), mask=mask)


_DARKER = [round(v * 0.35) for v in range(256)]


def _occlude(f: Figure, n: Nuisance) -> None:
    if n.occluder == "none":
        return
    width, height = f.shade.size
    x = width * (0.5 + 0.42 * n.occluder_x)
    rng = np.random.default_rng(n.grain)
    if n.occluder == "pole":
        half = width * 0.055
        for k, level in enumerate((0.5, 0.8, 1.05)):
            inset = half * 0.3 * k
            f.flat(
                [
                    (x - half + inset, 0),
                    (x + half - 2 * inset, 0),
                    (x + half - 2 * inset, height),
                    (x - half + inset, height),
                ],
                Scenery.METAL,
                level,
            )
    elif n.occluder == "wall":
        edge = 0.16 * width
        points = [(0, 0), (edge, 0), (edge, height), (0, height)]
        if n.occluder_x > 0:
            points = [(width - px, py) for px, py in points]
        f.flat(points, Scenery.PILLAR, 0.8)
        inner = [(px * 0.85 if n.occluder_x <= 0 else width - (width - px) * 0.85, py) for px, py in points]
        f.flat(inner, Scenery.PILLAR, 0.95)
    elif n.occluder == "rail":
        top = height * 0.72
        for rail in (0.0, 0.17):
            f.flat(
                [
                    (0, top + rail * height),
                    (width, top + rail * height),
                    (width, top + rail * height + height * 0.018),
                    (0, top + rail * height + height * 0.018),
                ],
                Scenery.METAL,
                1.0,
            )
        for k in range(-1, 9):
            px = k * width / 7 + (n.occluder_x * width / 7)
            f.flat(
                [(px, top), (px + width * 0.022, top), (px + width * 0.022, height), (px, height)], Scenery.METAL, 0.8
            )
    elif n.occluder == "car":
        top, side = height * 0.72, 1 if n.occluder_x > 0 else -1

        def mirror(points: list[Point]) -> list[Point]:
            return points if side < 0 else [(width - px, py) for px, py in points]

        f.flat(
            mirror(
                [
                    (0, top),
                    (width * 0.35, top + 0.015 * height),
                    (width * 0.52, top + 0.1 * height),
                    (width * 0.56, height),
                    (0, height),
                ]
            ),
            Scenery.CAR,
            1.0,
        )
        f.flat(
            mirror(
                [(0, top + 0.15 * height), (width * 0.54, top + 0.16 * height), (width * 0.56, height), (0, height)]
            ),
            Scenery.CAR,
            0.65,
        )
        f.flat(
            mirror(
                [
                    (width * 0.46, top + 0.1 * height),
                    (width * 0.53, top + 0.1 * height),
                    (width * 0.54, top + 0.14 * height),
                    (width * 0.45, top + 0.13 * height),
                ]
            ),
            Scenery.LAMP,
            1.0,
        )
    else:
        for _ in range(60):
            px, py = x + rng.normal(0, 0.14) * width, height * (1 - abs(rng.normal(0, 0.14)))
            size, level = width * rng.uniform(0.02, 0.06), rng.uniform(0.4, 1.2)
            f.flat(
                [(px - size, py), (px, py - 1.6 * size), (px + size, py), (px, py + 0.8 * size)], Scenery.FOLIAGE, level
            )


# spectra


@functools.cache
def _fold_strength() -> Float[np.ndarray, " N"]:
    strength = np.zeros(N_MATERIALS, np.float32)
    for part in (Part.TOP, Part.SLEEVE, Part.INNER, Part.BOTTOM, Part.SCARF, Part.STRIPE, Part.PRINT):
        strength[part] = 0.055
    strength[Part.HAIR] = strength[Part.BAG] = strength[Part.FLAP] = 0.04
    return strength


def _tile(kind: str, rng: np.random.Generator, rows: int, columns: int) -> Float[np.ndarray, "H W"]:
    field = noise(kind)
    y, x = int(rng.integers(0, 512)), int(rng.integers(0, 512))
    return np.take(np.take(field, range(y, y + rows), 0, mode="wrap"), range(x, x + columns), 1, mode="wrap")


def _relief(figure: Figure, rng: np.random.Generator) -> tuple[np.ndarray, Float[np.ndarray, "H W"]]:
    """Material numbers, and shading with the folds of cloth."""
    material = np.asarray(figure.material)
    shade = np.asarray(figure.shade).astype(np.float32) * (1 / UNIT_SHADE)
    shade *= 1 + _fold_strength()[material] * _tile("fold", rng, *material.shape)
    return material, shade


def _shrink(values: Float[np.ndarray, "H W *C"]) -> Float[np.ndarray, "h w *C"]:
    """Average SUPERSAMPLING x SUPERSAMPLING blocks; values are in 0..2 and keep eight bits."""
    eight = Image.fromarray(np.clip(values * 127.5, 0, 255).astype(np.uint8))
    return np.asarray(eight.reduce(SUPERSAMPLING)).astype(np.float32) * (1 / 127.5)


def _table(person: Sequence[object], scenery: np.ndarray) -> np.ndarray:
    table = scenery.astype(np.float32).copy()
    table[: len(person)] = np.asarray(person, np.float32)
    return table


def _finish(values: np.ndarray, n: Nuisance, blur: float, noise_level: float, rng: np.random.Generator) -> np.ndarray:
    """Blur, pixel noise, eight bits."""
    image = Image.fromarray(np.clip(values * 255, 0, 255).astype(np.uint8))
    scale = n.height / 128
    if blur > 0.15:
        image = image.filter(ImageFilter.GaussianBlur(blur * scale))
    if n.motion:
        image = image.filter(ImageFilter.BoxBlur((n.motion * scale, 0)))
    out = np.asarray(image).astype(np.float32)
    out += rng.standard_normal(out.shape, np.float32) * (255 * noise_level)
    return np.clip(out, 0, 255).astype(np.uint8)


def _visible(who: Identity, n: Nuisance, scene: Scene, figure: Figure) -> np.ndarray:
    rng = np.random.default_rng([n.grain, 1])
    material, shade = _relief(figure, rng)
    if n.dapple:
        shade *= np.clip(1 + n.dapple * _tile("shade", rng, *shade.shape), 0.4, 1.5)
    light = _shrink(_table(who.colours, scene.colours)[material] * shade[..., None])
    camera = n.camera
    tint = np.asarray(camera.tint, np.float32) * np.exp(rng.normal(0, 0.025, 3)).astype(np.float32)
    light *= tint * (camera.gain * n.gain)
    ramp = 1 + 0.12 * n.light_x * np.linspace(-1, 1, n.width, dtype=np.float32)
    light *= ramp[None, :, None]
    light = np.maximum(light, 1e-4) ** (n.gamma * 0.9)
    light = (light - 0.45) * camera.contrast + 0.45
    light = np.where(light > 0.8, 0.8 + 0.2 * np.tanh((light - 0.8) * 4), light)  # the sensor saturates softly
    return _finish(light, n, camera.blur * n.blur, camera.noise * n.noise, rng)


def _grey(values: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    return np.repeat(values[..., None], 3, axis=2)


def _near_infrared(who: Identity, n: Nuisance, scene: Scene, figure: Figure, depth_gain: np.ndarray) -> np.ndarray:
    """Active illumination from beside the camera: flat shading, falling off with distance and towards the corners."""
    rng = np.random.default_rng([n.grain, 2])
    material, shade = _relief(figure, rng)
    shade = 0.35 + 0.65 * shade
    value = _table(who.reflectance, scene.reflectance)[material] * shade
    value *= np.where(material < FIRST_SCENERY, 1.0, depth_gain[:, None])
    light = _shrink(np.minimum(value, 2.0))
    rows, columns = light.shape
    y = np.linspace(-1, 1, rows, dtype=np.float32)[:, None] - float(rng.uniform(-0.5, 0.3))
    x = np.linspace(-1, 1, columns, dtype=np.float32)[None, :] - float(rng.uniform(-0.4, 0.4))
    light *= 1.18 - float(rng.uniform(0.2, 0.42)) * (0.6 * y * y + 0.4 * x * x)
    light *= 1.1 * n.camera.gain * n.gain**0.6  # such cameras control their exposure by the lamp
    light = np.maximum(light, 1e-4) ** n.gamma
    light = (light - 0.4) * n.camera.contrast + 0.4
    light = np.where(light > 0.75, 0.75 + 0.25 * np.tanh((light - 0.75) * 3), light)
    return _grey(_finish(light, n, (n.camera.blur + 0.25) * n.blur, n.camera.noise * n.noise, rng))


def _thermal(who: Identity, n: Nuisance, scene: Scene, figure: Figure) -> np.ndarray:
    """Emitted heat: temperature alone, blurred, with the column pattern of the sensor; nothing here is lit."""
    rng = np.random.default_rng([n.grain, 3])
    material = np.asarray(figure.material)
    shade = np.asarray(figure.shade).astype(np.float32) * (1 / UNIT_SHADE)
    person = material < FIRST_SCENERY
    # cloth that touches the body is warm, loose folds are cool; the backdrop keeps a trace of its structure
    heat = _table(who.warmth, scene.warmth)[material]
    heat += np.where(person, 0.10 * (np.minimum(shade, 1.3) - 1), 0.05 * (shade - 1))
    heat += np.where(person, 0.025, 0.02) * _tile("blotch", rng, *material.shape)
    value = _shrink(np.maximum(heat, 0))
    value = (value - 0.45) * (1.1 * n.camera.contrast * n.gamma) + 0.45 + 0.35 * math.log(n.gain)
    columns = np.random.default_rng(n.camera.place).standard_normal(n.width).astype(np.float32)
    value += 0.008 * columns[None, :] + 0.012 * _tile("blotch", rng, n.height, n.width)
    return _grey(_finish(value, n, 0.95 + 0.4 * n.blur, 0.012 * n.noise, rng))


def sample_camera(rng: np.random.Generator) -> Camera:
    """Draw a camera for pretraining crops: any scene, light and height."""
    kind = str(rng.choice(KINDS))
    warm = rng.normal(0, 0.07)
    return Camera(
        kind=kind,
        place=int(rng.integers(2**31)),
        eye=float(rng.uniform(1.5, 3.2)),
        tint=(float(1 + warm), 1.0, float(1 - warm)),
        gain=float(rng.uniform(0.75, 1.25)),
        contrast=float(rng.uniform(0.8, 1.2)),
        noise=float(rng.uniform(0.006, 0.03)),
        blur=float(rng.uniform(0.2, 0.7)),
        quality=int(rng.integers(75, 95)),
        outdoor=kind in ("gate", "garden", "street", "passage"),
    )
