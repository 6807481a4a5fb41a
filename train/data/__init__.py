"""Image data sets as uint8 tensors on the device, and their batched transforms.

    image_set.py    what a data set is once it is read, and every check on what was read
    builtin.py      the data sets with a name: the embedded digits, MNIST, SVHN, CIFAR, ...
    folder.py       any folder of images, decoded by decode.py and kept by cache.py
    motion.py       images moved at random, and two in one, for tests
    validation.py   holds a part of the training images out
    transforms.py   crops, and the order of an epoch
    augment.py      the views of an epoch: crops, flips; mixtures of images

Pixels and their normalisation are those of prediction, `mocapsnet.preprocessing`.

Readers return whole data sets; nothing in a training step touches an image one at a time in Python.
"""

from mocapsnet.preprocessing import normalise, to_pixels
from mocapsnet.train.data import builtin, folder
from mocapsnet.train.data.augment import Views, epoch_views, mixed, view
from mocapsnet.train.data.builtin import FILES, SHAPES
from mocapsnet.train.data.image_set import UNKNOWN, ImageSet, Known, image_set
from mocapsnet.train.data.transforms import epoch_order, random_crop, test_offsets
from mocapsnet.train.data.validation import hold_out
from mocapsnet.train.options import DataOptions

__all__ = [
    "FILES",
    "SHAPES",
    "UNKNOWN",
    "ImageSet",
    "Known",
    "Views",
    "epoch_order",
    "epoch_views",
    "hold_out",
    "image_set",
    "load",
    "mixed",
    "normalise",
    "random_crop",
    "test_offsets",
    "to_pixels",
    "view",
]


def load(
    options: DataOptions, quiet: bool = False, tested: Known = UNKNOWN
) -> tuple[ImageSet, ImageSet]:
    """Read the training and the test images of a data set onto the CPU, and check them.

    Args:
        quiet: print nothing.
        tested: what a run that is to be tested knows; see `folder.load`.
    Raises: InputError if files are missing or cannot be right.
    """
    if options.dataset == "folder":
        return folder.load(
            options.data_dir,
            image_size=options.image_size,
            test_share=options.test_share,
            split_seed=options.split_seed,
            broken=options.broken_images,
            quiet=quiet,
            tested=tested,
        )
    return builtin.load(options.dataset, options.data_dir, options.download)
