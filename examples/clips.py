"""Generated clips of a moving digit, of two kinds: it goes straight on and is thrown back by the borders, or round a
circle. A single frame hardly tells which; the digits are scikit-learn's, so nothing is downloaded."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from examples.data import Dataset, Examples
from examples.images import digits

CLASSES = ("straight", "circle")
TRAIN, TEST = 2000, 1000
FRAMES, SIDE = 16, 24
DIGIT = 8  # pixels a side
SPEED = (1.0, 2.5)  # pixels a frame
RADIUS = (3.0, 7.0)
NOISE = 0.1
SEED = 0  # the clips are always the same

Floats = NDArray[np.float64]


def make_clips(train: int = TRAIN, test: int = TEST) -> Dataset:
    """Clips (N, T, 1, rows, columns) float32, as many of either kind; the test's digits are of other images."""
    random = np.random.default_rng(SEED)
    images = digits()
    parts = (clips(random, images.train, train), clips(random, images.test, test))
    return Dataset("clips", *parts, CLASSES)


def clips(random: np.random.Generator, images: Examples, count: int) -> Examples:
    """`count` clips with digits among the images."""
    labels = random.permutation(np.arange(count) % 2)
    speed = random.uniform(*SPEED, count)
    corners = np.where(labels[:, None, None] == 0, straight(random, speed), circle(random, speed)).round().astype(int)
    frames = np.abs(random.normal(0, NOISE, (count, FRAMES, 1, SIDE, SIDE))).astype(np.float32)
    chosen = images.inputs.numpy()[random.integers(len(images.labels), size=count)]
    for clip, path, digit in zip(frames, corners, chosen, strict=True):
        for frame, (row, column) in zip(clip[:, 0], path, strict=True):
            frame[row : row + DIGIT, column : column + DIGIT] += digit
    return Examples(torch.from_numpy(frames).clamp_(max=1), torch.from_numpy(labels))


def straight(random: np.random.Generator, speed: Floats) -> Floats:
    """The upper left corners (N, T, 2) of digits that the borders throw back."""
    room = SIDE - DIGIT
    start, angle = random.uniform(0, 2 * room, (len(speed), 1, 2)), random.uniform(0, 2 * np.pi, len(speed))
    step = speed[:, None] * np.stack([np.sin(angle), np.cos(angle)], 1)
    # unfolded, the way is a line: folding it back at the borders reflects it
    way = (start + np.arange(FRAMES)[:, None] * step[:, None]) % (2 * room)
    corners: Floats = room - np.abs(way - room)
    return corners


def circle(random: np.random.Generator, speed: Floats) -> Floats:
    """The same for digits that go round, in either direction."""
    radius = random.uniform(*RADIUS, len(speed))
    turn = random.choice([-1, 1], len(speed)) * speed / radius
    angle = random.uniform(0, 2 * np.pi, (len(speed), 1)) + np.arange(FRAMES) * turn[:, None]  # (N, T)
    margin = radius[:, None]
    centre = margin + random.uniform(0, 1, (len(speed), 2)) * (SIDE - DIGIT - 2 * margin)
    corners: Floats = centre[:, None] + margin[:, None] * np.stack([np.sin(angle), np.cos(angle)], 2)
    return corners
