"""`mocapsnet import`: a checkpoint of the published code as a folder of this library."""

from __future__ import annotations

from pathlib import Path

from mocapsnet.published import load_published
from mocapsnet.train.errors import InputError
from mocapsnet.train.options import ImportOptions


def import_published(options: ImportOptions) -> Path:
    """Write the folder. Raises: InputError if the checkpoint or the folder cannot be used."""
    folder = Path(options.out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--out {folder} exists and is not an empty folder; choose another")
    try:
        model = load_published(
            options.checkpoint,
            residual=not options.plain,
            gamma=options.gamma,
            iterations=options.iterations,
        )
        if options.classes is not None:
            model.class_names = options.classes
        model.save_pretrained(folder)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    print(
        f"{folder}: {type(model).__name__}, {model.config.blocks} block(s), "
        f"{model.config.classes} classes; mocapsnet predict {folder} IMAGES"
    )
    return folder
