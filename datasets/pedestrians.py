"""Procedural pedestrians: images of an identity in visible or infrared light, for `stand_in.py`.

Longer than other modules: one drawing program, whose functions mean nothing apart.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.random import Generator, default_rng
from PIL import Image, ImageDraw, ImageFilter

from datasets.sysu_mm01 import INFRARED_CAMERAS

TONE_CORRELATION = 0.5  # of the infrared tone of cloth with its visible brightness
SUPERSAMPLE = 2  # drawn this much larger, then averaged down
LLCM_INFRARED = 10  # added to the number of an LLCM camera for what it sees at night

# fmt: off
BODY = {  # ranges, in body heights unless said otherwise; `female` and `male` widths are scaled
    "stature": (0.84, 1.0),  # share of the tallest
    "head": (0.118, 0.15), "face": (0.36, 0.46),  # height; half width, in heads
    "shoulder": (0.098, 0.138), "waist": (0.7, 1.1), "hip": (0.85, 1.1),  # halves; in shoulders
    "leg": (0.42, 0.52), "thigh": (0.042, 0.066), "ankle": (0.02, 0.032),
    "arm": (0.024, 0.04), "reach": (0.37, 0.44), "sleeve": (0.1, 0.2),
    "hem": (-0.04, 0.03), "fit": (1.0, 1.2), "flare": (0.02, 0.11),
    "trouser": (1.05, 1.7), "shorts": (0.3, 0.46), "bag": (0.7, 1.35),  # factor; in legs; factor
}
STYLE = {  # the words may repeat: that is how often they are drawn
    "hat": "none none none cap beanie brim helmet",
    "coat": "short hip hip thigh knee",
    "sleeves": "none short short long long long",
    "sleeve": "upper first second other",
    "open": "no no yes",
    "belt": "no no yes",
    "scarf": "no no no yes",
    "shoes": "low ankle tall",
    "bag": "none none backpack backpack satchel handbag case box umbrella",
    "side": "left right",
    "view": "front front back back back",  # RegDB sees each person from one side
}
GENDER_STYLE = {
    "female": {"hair": "long bob tail bun afro short big",
               "legs": "trousers skirt midi maxi shorts dress"},
    "male": {"hair": "short short bald crest afro bob tail",
             "legs": "trousers trousers shorts shorts kilt"},
}
PATTERNS = ("plain bands bands columns checks split half dots panel chest diagonal argyle "
            "gradient frame")
# fmt: on
COAT_HEM = {"short": -0.05, "hip": 0.02, "thigh": 0.14, "knee": 0.26}  # below the crotch
SKIRT_LENGTH = {"skirt": 0.4, "kilt": 0.45, "dress": 0.45, "midi": 0.65, "maxi": 0.9}  # in legs
HATS = {  # ellipses: x (in half heads, ahead), y (in heads), radii (in half heads; in heads), cut
    "cap": ((0, 0.36, 1.16, 0.44, 0.45), (0.77, 0.36, 1.0, 0.07, 1.0)),
    "beanie": ((0, 0.36, 1.16, 0.44, 0.45), (0, -0.08, 0.35, 0.1, 1.0)),
    "brim": ((0, 0.36, 1.16, 0.44, 0.45), (0, 0.33, 2.0, 0.09, 1.0)),
    "helmet": ((0, 0.3, 1.35, 0.42, 0.6),),
}
SHOE_HEIGHT = {"low": 0.03, "ankle": 0.08, "tall": 0.17}

Point = tuple[float, float]  # in body heights: x from the body's axis, y from the crown down


class Material(NamedTuple):
    """What reflects: an RGB colour and an infrared tone, all in 0..1."""

    visible: tuple[float, ...]
    infrared: float


class Fabric(NamedTuple):
    """Two materials in a pattern that is fixed relative to the body part wearing it."""

    first: Material
    second: Material
    pattern: str = "plain"
    scale: float = 4.0
    phase: float = 0.0


class Person(NamedTuple):
    """An identity: measures (BODY), choices (STYLE), and what each part is made of."""

    body: dict[str, float]
    style: dict[str, str]
    fabrics: dict[str, Fabric]


def _colour(rng: Generator, brightness: float, saturation: float) -> tuple[float, ...]:
    """Returns a random hue of the given luma."""
    wheel = 0.5 + 0.5 * np.cos(rng.uniform(0, 2 * math.pi) + np.array([0.0, -2.1, 2.1]))
    colour = 1 - saturation + saturation * wheel
    return tuple(np.clip(colour * brightness / (colour @ (0.299, 0.587, 0.114)), 0.02, 1).tolist())


def _cloth(rng: Generator, patterns: str) -> Fabric:
    """Returns a fabric whose materials contrast in both modalities, maybe with opposite signs.

    A material's visible brightness and infrared tone are uniform on 0..1, tied by a copula.
    """
    tones = np.zeros((2, 2))  # (material, modality)
    while np.abs(tones[0] - tones[1]).min() < 0.4:
        seen, warm = rng.standard_normal((2, 2)).T
        warm = TONE_CORRELATION * seen + math.sqrt(1 - TONE_CORRELATION**2) * warm
        tones = 0.5 + 0.5 * np.vectorize(math.erf)(np.stack([seen, warm], axis=1) / math.sqrt(2))
    materials = [
        Material(_colour(rng, 0.08 + 0.8 * seen, rng.uniform(0, 0.8)), 0.1 + 0.85 * warm)
        for seen, warm in tones.tolist()
    ]
    pattern = str(rng.choice(patterns.split()))
    return Fabric(*materials, pattern, rng.uniform(2.5, 6.5), rng.uniform(0, 1))


def make_person(seed: int, pid: int) -> Person:
    """Returns the identity `pid` of the world `seed`."""
    rng = default_rng((seed, pid, 0))  # an image has its camera (>= 1) in this place

    def pick(words: str) -> str:
        return str(rng.choice(words.split()))

    gender = pick("female male")
    body = {name: rng.uniform(*limits) for name, limits in BODY.items()}
    body["shoulder"] *= 0.92 if gender == "female" else 1.06
    body["hip"] *= body["shoulder"] * (1.08 if gender == "female" else 0.95)
    body["waist"] *= body["shoulder"]
    words = STYLE | GENDER_STYLE[gender]
    style = {"gender": gender} | {name: pick(options) for name, options in words.items()}
    if style["legs"] in SKIRT_LENGTH:  # a long coat would hide it
        style["coat"] = pick("short hip")

    red, dark = rng.uniform(0.3, 0.9), rng.uniform(0.05, 0.75)
    skin = Material((red, 0.78 * red, 0.62 * red), rng.uniform(0.75, 0.92))
    fade = rng.uniform(0.5, 0.85)
    hair = Material((dark, fade * dark, fade**2 * dark), rng.uniform(0.1, 0.6))
    parts = dict.fromkeys(("inner", "other", "shoes", "hat", "strap", "belt", "scarf"), "plain")
    parts |= {"upper": PATTERNS, "lower": PATTERNS, "bag": "plain split panel bands frame"}
    fabrics = {part: _cloth(rng, words) for part, words in parts.items()}
    upper, eye = fabrics["upper"], Material((0.1, 0.1, 0.1), 0.2)
    fabrics |= {"skin": Fabric(skin, skin), "hair": Fabric(hair, hair), "eye": Fabric(eye, eye)}
    fabrics["first"] = upper._replace(pattern="plain")
    fabrics["second"] = fabrics["first"]._replace(first=upper.second)
    fabrics["sleeve"] = fabrics[style["sleeve"]]
    if style["legs"] == "dress":
        fabrics["lower"] = upper
    fabrics["seat"] = fabrics["lower"]._replace(pattern="plain")
    return Person(body, style, fabrics)


def pattern_weight(fabric: Fabric, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns the second material's weight, 0..1, at `u` across (-1..1), `v` down (0..1) a part."""
    scale, phase = fabric.scale, fabric.phase
    bands = np.floor(1.3 * v * scale + 2 * phase) % 2
    columns = np.floor((u + 1) / 2 * scale + 2 * phase) % 2
    du = ((u + 1) / 2 * scale + phase) % 1 - 0.5
    dv = (0.8 * v * scale + phase) % 1 - 0.5
    patterns = {
        "plain": lambda: np.zeros_like(u),
        "bands": lambda: bands,
        "columns": lambda: columns,
        "checks": lambda: (bands + columns) % 2,
        "split": lambda: v > 0.25 + 0.5 * phase,
        "half": lambda: u > 0.8 * phase - 0.4,
        "dots": lambda: du**2 + dv**2 < 0.1,
        "panel": lambda: np.maximum(np.abs(u) / (0.35 + 0.3 * phase), np.abs(v - 0.4) / 0.28) < 1,
        "chest": lambda: np.abs(v - 0.15 - 0.5 * phase) < 0.05 + 0.02 * scale,
        "diagonal": lambda: np.floor((u / 2 + v) * scale + 2 * phase) % 2,
        "argyle": lambda: np.abs(du) + np.abs(dv) < 0.36,
        "gradient": lambda: np.clip(1.3 * v - 0.4 * phase, 0, 1),
        "frame": lambda: (np.abs(u) > 0.55) | (v < 0.08 + 0.1 * phase),
    }
    return patterns[fabric.pattern]().astype(np.float32)


class Look(NamedTuple):
    """What a camera does to every image it takes; pairs are ranges to draw from."""

    infrared: bool
    tint: tuple[float, ...] = (1.0,)  # factor of each channel, or of all
    background: tuple[float, float] = (0.15, 0.85)
    floor: float = 0.0  # darkest tone of a body: thermal images show warmth
    horizon: tuple[float, float] = (0.5, 0.8)  # in image heights
    clutter: tuple[int, int] = (2, 6)
    gain: tuple[float, float] = (0.8, 1.15)
    blur: tuple[float, float] = (0.2, 0.8)  # pixels
    noise: tuple[float, float] = (0.005, 0.025)
    detail: tuple[float, float] = (1.0, 1.0)  # share of the largest size
    turns: bool = False  # people are seen from every side, not from their own alone

    def tones(self, material: Material) -> np.ndarray:
        """Returns what the camera sees of a material: (1,) or (3,) float32."""
        warm = [self.floor + (1 - self.floor) * material.infrared]
        return np.array(warm if self.infrared else material.visible, np.float32)


def camera_look(layout: str, camera: int, seed: int) -> Look:
    """Returns a camera's look: RegDB's 1 (visible) and 2 (thermal) are fixed, others are drawn."""
    if layout == "regdb":
        thermal = Look(True, background=(0.02, 0.4), floor=0.2, blur=(0.4, 1.0), noise=(0.01, 0.03))
        return thermal if camera == 2 else Look(False)
    rng = default_rng((seed, 0, camera))
    middle, far, tint = rng.uniform(0.3, 0.6), rng.uniform(0.45, 0.65), rng.uniform(0.85, 1.15, 3)
    infrared = camera in INFRARED_CAMERAS if layout == "sysu" else camera > LLCM_INFRARED
    return Look(
        infrared,
        tint=(1.0,) if infrared else tuple(tint.tolist()),
        background=(middle - 0.25, middle + 0.3),
        horizon=(far, far + 0.2),
        clutter=(int(rng.integers(1, 3)), int(rng.integers(4, 8))),
        gain=(rng.uniform(0.75, 0.9), rng.uniform(1.0, 1.15)),
        blur=(0.2, rng.uniform(0.5, 1.1)),
        detail=(rng.uniform(0.5, 0.7), rng.uniform(0.85, 1.0)),
        turns=True,
    )


class _Figure:
    """One person in a pose drawn at random, painted part by part from the far side to the near one.

    `picture` is (height, width, 1 or 3) uint8, as the camera sees person and background.
    """

    def __init__(self, person: Person, look: Look, rng: Generator, size: tuple[int, int]) -> None:
        self.body, self.style, self.fabrics = person.body, person.style, person.fabrics
        self.look = look
        if look.turns:
            yaw = math.pi * rng.choice((0.0, 0.5, 1.0, 1.5), p=(0.3, 0.2, 0.3, 0.2))
        else:
            yaw = 0.0 if person.style["view"] == "front" else math.pi
        yaw += rng.normal(0, 0.3)  # 0 towards the camera, pi / 2 walking to the right
        self.stride, self.phase = rng.uniform(0.04, 0.13), rng.uniform(0, 2 * math.pi)
        self.swing, self.lean = rng.uniform(0.02, 0.1), rng.normal(0, 0.02)
        height, width = size
        self.unit = height * rng.uniform(0.84, 0.97) * person.body["stature"]
        x = 0.5 * width + self.unit * (rng.normal(0, 0.025) - 0.5 * self.lean)
        self.origin = x, (height - self.unit) * rng.uniform(0.3, 0.9)
        self.picture = _background(rng, look, size)
        self.front, self.right = math.cos(yaw), math.sin(yaw)
        self.width = math.hypot(self.front, 0.66 * self.right)  # of the trunk
        self.neck = 1.02 * self.body["head"]
        self.shoulder = self.neck + 0.035
        self.crotch = 1 - self.body["leg"]
        self.waist = self.shoulder + 0.58 * (self.crotch - self.shoulder)
        far = -1 if self.right >= 0 else 1
        if self.front > -0.3:
            self.backpack()
        self.leg(far, 112)
        self.arm(far, 108)
        self.leg(-far, 128)
        self.skirt()
        self.trunk()
        self.head()
        if abs(self.right) < 0.75:  # else the trunk hides it
            self.arm(far, 138)
        self.arm(-far, 142)
        if self.front <= -0.3:
            self.backpack()
        self.carried()

    def limb(
        self, fabric: str, joints: list[Point], halves: list[float], light: int = 128, *span: float
    ) -> None:
        """Paints a chain of `joints` going down, of these half widths; `light` 128 is neutral.

        The fabric's pattern follows the chain, from top to bottom or between two heights, `span`.
        """
        (x, y), (x0, y0) = np.array(joints).T, self.origin
        axis = np.stack([x0 + (x + self.lean * (1 - y)) * self.unit, y0 + y * self.unit], axis=1)
        side = self.unit * np.array(halves)[:, None] * (1, 0)
        outline = np.concatenate([axis - side, (axis + side)[::-1]]).ravel().tolist()
        height, width, _ = self.picture.shape
        image = Image.new("L", (width, height))
        ImageDraw.Draw(image).polygon(outline, light, light - 45, SUPERSAMPLE)
        pixels = np.asarray(image)
        ys, xs = np.nonzero(pixels)
        shade = pixels[ys, xs, None] / np.float32(128)
        top, bottom = (y0 + end * self.unit for end in span or (y[0], y[-1]))
        u = (xs - np.interp(ys, axis[:, 1], axis[:, 0])) / (np.mean(halves) * self.unit)
        weight = pattern_weight(self.fabrics[fabric], u, (ys - top) / (bottom - top))[:, None]
        first, second = (self.look.tones(each) for each in self.fabrics[fabric][:2])
        tones = (first + weight * (second - first)) * shade
        self.picture[ys, xs] = 255 * np.clip(tones, 0, 1)

    def ball(self, fabric: str, x: float, y: float, rx: float, ry: float, cut: float = 1.0) -> None:
        """Draws an ellipse around (x, y) of which the upper share `cut` is kept."""
        heights = np.linspace(-1, 2 * cut - 1, 11).tolist()
        halves = [rx * math.sqrt(1 - min(h * h, 1)) for h in heights]
        self.limb(fabric, [(x, y + ry * h) for h in heights], halves, 134)

    def leg(self, side: int, light: int) -> None:
        body, limb, legs = self.body, self.limb, self.style["legs"]
        step = side * self.stride * math.sin(self.phase) * self.right
        x = side * 0.5 * body["hip"] * max(abs(self.front), 0.15)
        lift = 0.2 * self.stride * max(side * math.cos(self.phase), 0)
        hip, sole = (0.8 * x, self.crotch - 0.06), 1 - lift
        knee = (x + 0.45 * step + 0.025 * self.right, self.crotch + 0.48 * body["leg"])
        foot = (x + step, sole - 0.025)
        thigh, ankle, fit = body["thigh"], body["ankle"], body["trouser"]
        limb("skin", [hip, knee, foot], [thigh, 0.75 * thigh, ankle], light)
        height = SHOE_HEIGHT[self.style["shoes"]]
        top = foot[0] + (knee[0] - foot[0]) * height / (foot[1] - knee[1])
        joints = [(top, foot[1] - height), foot, (foot[0] + 0.02 * self.right, sole)]
        halves = [1.25 * ankle, 1.2 * ankle, 1.4 * ankle + 0.02 * abs(self.right)]
        limb("shoes", joints, halves, light)
        if legs == "trousers":
            halves = [1.1 * thigh, 0.75 * fit * thigh, 1.35 * fit * ankle]
            limb("lower", [hip, knee, (foot[0], sole - 0.03)], halves, light)
        elif legs == "shorts":
            share = body["shorts"] / 0.48
            end = (hip[0] + share * (knee[0] - hip[0]), self.crotch + body["shorts"] * body["leg"])
            limb("lower", [hip, end], [1.15 * thigh, 0.95 * fit * thigh], light)

    def skirt(self) -> None:
        """Draws skirt or dress; else the seat of the trousers."""
        hip, length = self.body["hip"] * self.width, SKIRT_LENGTH.get(self.style["legs"])
        if length is None:
            self.limb("seat", [(0, self.waist), (0, self.crotch + 0.01)], [hip, hip])
        else:
            wide = 1.05 * hip + self.body["flare"] + 0.3 * self.stride * abs(self.right)
            hem = self.crotch + length * self.body["leg"]
            self.limb("lower", [(0, self.waist), (0, hem)], [0.95 * hip, wide])

    def trunk(self) -> None:
        """Draws neck, upper garment, what an open one shows, belt."""
        body, limb, top = self.body, self.limb, self.neck + 0.005
        scale = self.width * body["fit"]
        shoulder, waist, hip = (scale * body[name] for name in ("shoulder", "waist", "hip"))
        neck = 0.42 * body["head"] * body["face"] + 0.012
        limb("skin", [(0, top - 0.04), (0, top + 0.03)], [neck, neck], 110)
        hem = self.crotch + COAT_HEM[self.style["coat"]] + body["hem"]
        heights = [top, top + 0.01, self.shoulder, self.waist, min(self.crotch, hem), hem]
        edge = hip * (1 + 1.2 * max(hem - self.crotch, 0))
        halves = [1.2 * neck, 0.75 * shoulder, shoulder, waist, hip, edge]
        limb("upper", [(0, y) for y in heights], halves, 132, self.shoulder, self.crotch)
        if self.style["open"] == "yes" and self.front > -0.2:
            x = 0.55 * shoulder * self.right
            limb("inner", [(x, top), (x, hem)], [0.25 * shoulder, 0.4 * shoulder], 124)
        if self.style["belt"] == "yes":
            limb("belt", [(0, self.waist + 0.02), (0, self.waist + 0.05)], [1.03 * waist] * 2)

    def arm(self, side: int, light: int) -> None:
        body, thick, reach = self.body, self.body["arm"], self.body["reach"]
        x = 0.95 * side * body["shoulder"] * body["fit"] * max(abs(self.front), 0.12)
        swing = -side * self.swing * math.sin(self.phase) * self.right
        out, loose = 0.028 * side * abs(self.front), thick * body["fit"]
        shoulder = (x, self.shoulder + 0.012)
        elbow = (x + out + 0.45 * swing, self.shoulder + 0.5 * reach)
        hand = (x + 1.3 * out + swing + 0.03 * self.right, self.shoulder + reach)
        joints = [shoulder, elbow, hand, (hand[0], hand[1] + 0.03)]
        self.limb("skin", joints, [thick, 0.85 * thick, 0.6 * thick, 0.7 * thick], light)
        if self.style["sleeves"] == "short":
            share = body["sleeve"] / (elbow[1] - shoulder[1])
            end = (x + share * (elbow[0] - x), shoulder[1] + body["sleeve"])
            self.limb("sleeve", [shoulder, end], [loose, 1.15 * loose], light)
        elif self.style["sleeves"] == "long":
            self.limb("sleeve", [shoulder, elbow, hand], [loose, loose, 0.9 * loose], light)

    def head(self) -> None:
        ball, kind, right, head = self.ball, self.style["hair"], self.right, self.body["head"]
        half, behind = head * self.body["face"], self.front < -0.35
        if kind in ("afro", "big"):
            ball("hair", -0.3 * half * right, 0.46 * head, 1.55 * half, 0.62 * head)
        ball("skin", 0.1 * half * right, 0.53 * head, half, 0.47 * head)
        if kind != "bald":
            cut = 0.95 if behind else 0.42
            ball("hair", -0.2 * half * right, 0.42 * head, 1.08 * half, 0.43 * head, cut)
            if abs(right) > 0.3:
                x = math.copysign(1.25 - 0.45 * abs(right), -right) * half
                ball("hair", x, 0.48 * head, 0.5 * half, 0.45 * head)
        if not behind and abs(right) < 0.6:
            for side in (-0.4, 0.4):
                ball("eye", (0.35 * right + side) * half, 0.54 * head, 0.009, 0.007)
        self.hair_down(kind, half, behind)
        for ahead, y, rx, ry, cut in HATS.get(self.style["hat"], ()):
            if not ahead or self.front > -0.3:  # a cap's peak is not seen from behind
                ball("hat", ahead * half * right, y * head, rx * half, ry * head, cut)
        if self.style["scarf"] == "yes":
            wide = 1.15 * half
            ball("scarf", 0, self.neck + 0.01, wide, 0.026)
            joints = [(0.5 * wide, self.neck), (0.6 * wide, self.neck + 0.15)]
            self.limb("scarf", joints, [0.02, 0.024])

    def hair_down(self, kind: str, half: float, behind: bool) -> None:
        """Draws what hair there is beside the head, below and above it."""
        limb, head, back = self.limb, self.body["head"], -0.8 * half * self.right
        end = self.neck + (0.14 if kind == "long" else 0.015)
        if kind in ("long", "bob") and behind:
            limb("hair", [(0, 0.5 * head), (0, end)], [1.1 * half, 1.2 * half], 124)
        elif kind in ("long", "bob"):
            for side in (-half, half):
                x = side + 0.6 * back
                limb("hair", [(x, 0.35 * head), (1.1 * x, end)], [0.2 * half, 0.3 * half], 124)
        elif kind == "tail":
            x = back if abs(self.right) > 0.3 else (0 if behind else 1.1 * half)
            joints = [(0.6 * x, 0.4 * head), (1.2 * x, 0.8 * head), (x, self.neck + 0.12)]
            limb("hair", joints, [0.2 * half, 0.35 * half, 0.12 * half], 116)
        elif kind == "bun":
            self.ball("hair", 0.5 * back, -0.04 * head, 0.5 * half, 0.17 * head)
        elif kind == "crest":
            limb("hair", [(0, -0.14 * head), (0, 0.3 * head)], [0.3 * half, 0.35 * half], 118)

    def backpack(self) -> None:
        """Draws a backpack's sack: all of it from behind, its edges from the front."""
        if self.style["bag"] == "backpack":
            size, shoulder, y = self.body["bag"], self.body["shoulder"], self.shoulder
            half = max(shoulder * size * self.width * (1.02 if self.front > -0.3 else 0.9), 0.05)
            x = -0.95 * shoulder * self.right
            joints = [(x, y + 0.005), (x, y + 0.035), (x, y + 0.05 + 0.2 * size)]
            self.limb("bag", joints, [0.75 * half, half, half])

    def carried(self) -> None:
        """Draws straps, and what hands and shoulders carry."""
        limb, body, kind, size = self.limb, self.body, self.style["bag"], self.body["bag"]
        side = (1 if self.style["side"] == "right" else -1) * (1 if self.front >= 0 else -1)
        x = side * (body["shoulder"] * max(abs(self.front), 0.2) + 0.04)
        hand, edge = self.shoulder + body["reach"], 0.75 * body["shoulder"] * self.width
        if kind == "backpack" and self.front > 0.3:
            for end in (-edge, edge):
                limb("strap", [(end, self.shoulder), (0.95 * end, self.waist)], [0.014] * 2, 120)
        elif kind == "satchel":
            x = side * edge
            limb("strap", [(-x, self.shoulder), (1.2 * x, self.crotch)], [0.016] * 2, 120)
            self.box(1.3 * x, self.crotch - 0.05, 0.06 * size, 0.13 * size)
        elif kind == "handbag":
            limb("strap", [(x, hand - 0.02), (x, hand + 0.05)], [0.01, 0.03], 110)
            self.box(x, hand + 0.03, 0.065 * size, 0.12 * size)
        elif kind == "case":
            top = 0.98 - 0.26 * size
            limb("strap", [(x, hand), (x + 0.06 * side, top)], [0.01] * 2, 110)
            self.box(x + 0.07 * side, top, 0.075 * size, 0.26 * size)
        elif kind == "box" and self.front > -0.4:  # the trunk hides it from behind
            self.box(0.12 * self.right, self.waist - 0.05, 0.1 * size, 0.15 * size)
        elif kind == "umbrella":
            limb("strap", [(0.8 * x, -0.02), (x, self.waist)], [0.007] * 2, 110)
            self.ball("bag", 0.6 * x, 0.03, 0.2 * size + 0.06, 0.11, 0.5)

    def box(self, x: float, top: float, half: float, height: float) -> None:
        self.limb("bag", [(x, top), (x, top + height)], [half, half], 134)


def _background(rng: Generator, look: Look, size: tuple[int, int]) -> np.ndarray:
    """Returns a wall, a ground and things standing about, (height, width, 1 or 3) uint8."""
    height, width = size

    def paint() -> tuple[int, ...]:
        tone = rng.uniform(*look.background)
        colour = _colour(rng, tone, rng.uniform(0, 0.3))
        return tuple(int(255 * c) for c in ([tone] if look.infrared else colour))

    image = Image.new("L" if look.infrared else "RGB", (width, height), paint())
    draw, horizon = ImageDraw.Draw(image), height * rng.uniform(*look.horizon)
    draw.rectangle((0, horizon, width, height), fill=paint())
    for _ in range(rng.integers(*look.clutter, endpoint=True)):
        x, w = width * rng.uniform(-0.1, 1.0), width * rng.uniform(0.03, 0.4)
        y, h = height * rng.uniform(-0.2, 0.7), height * rng.uniform(0.05, 0.5)
        kind = rng.integers(4)
        if kind == 0:  # pole
            draw.rectangle((x, 0, x + 0.3 * w, horizon + 0.1 * h), fill=paint())
        elif kind == 1:  # window, box
            draw.rectangle((x, y, x + w, y + h), fill=paint())
        elif kind == 2:  # bush
            draw.ellipse((x - w, y - 0.5 * w, x + w, y + 1.5 * w), fill=paint())
        else:  # cable, kerb
            draw.line((x, 0, x + width * rng.uniform(-1, 1), height), fill=paint(), width=3)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3.0)))
    return np.array(image).reshape(height, width, -1)


def render(person: Person, look: Look, rng: Generator, size: tuple[int, int]) -> Image.Image:
    """Returns one RGB image (infrared: three equal channels), of `size` (height, width) at most."""
    share = rng.uniform(*look.detail)
    height, width = (max(16, round(share * side)) for side in size)
    figure = _Figure(person, look, rng, (SUPERSAMPLE * height, SUPERSAMPLE * width))
    image = Image.fromarray(figure.picture.squeeze()).reduce(SUPERSAMPLE)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*look.blur)))
    pixels = np.asarray(image, np.float32).reshape(height, width, -1) / 255
    pixels = pixels ** rng.uniform(0.8, 1.25) * rng.uniform(*look.gain)  # gamma, gain
    pixels = pixels * np.array(look.tint, np.float32)
    pixels += rng.uniform(*look.noise) * rng.standard_normal(pixels.shape, np.float32)
    pixels = (255 * np.clip(pixels, 0, 1)).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(pixels, (height, width, 3)).copy())
