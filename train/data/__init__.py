"""Image data sets as uint8 tensors on the device, and their batched transforms.

    image_set.py    what a data set is once it is read, and every check on what was read
    builtin.py      the data sets with a name: the embedded digits, MNIST, SVHN, CIFAR, ...
    transforms.py   pixels, normalisation, crops, and the order of an epoch

Readers return whole data sets; nothing in a training step touches an image one at a time in Python.
"""

from mocapsnet.train.data.builtin import FILES, SHAPES, load
from mocapsnet.train.data.image_set import ImageSet, image_set
from mocapsnet.train.data.transforms import (
    epoch_order,
    normalise,
    random_crop,
    to_pixels,
    training_batch,
)

__all__ = [
    "FILES",
    "SHAPES",
    "ImageSet",
    "epoch_order",
    "image_set",
    "load",
    "normalise",
    "random_crop",
    "to_pixels",
    "training_batch",
]
