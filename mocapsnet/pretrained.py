"""A trained network as a folder, in the form of the Hugging Face Hub.

    FOLDER/config.json          format's version, network, class names, preprocessing
    FOLDER/model.safetensors    weights
    FOLDER/README.md            model card: what it is and how it came about, for people

Names and meaning of the methods are those of `huggingface_hub.ModelHubMixin`. That package is
needed for models that are fetched or published, not for folders, and imported only then. Nothing is
ever unpickled.

A change that makes older files mean something else, or a new field of a configuration, needs a new
FORMAT, and code here that reads the one before.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .model_card import ModelCard
from .prediction import Predictor
from .preprocessing import Preprocessing

if TYPE_CHECKING:
    from typing_extensions import Self

    from .model import CapsNet

# A new field of the network needs a new format: in files of an older one it has its default.
FORMAT = 2
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"


class Pretrained(Predictor):
    """Saves a network to a folder or the Hub, and reads it from there."""

    def save_pretrained(
        self, folder: str | os.PathLike[str], card: ModelCard | None = None
    ) -> Path:
        """Write the network, its class names and its preprocessing into a folder.

        Args:
            folder: made if it is missing; the three files in it are replaced.
            card: what the model card says about the training.
        Returns: the folder.
        Raises: ValueError if it could not be read again as it is: layers, options or preprocessing
            were changed since it was built.
        """
        from safetensors.torch import save

        kind = type(self.preprocessing)
        if kind is not Preprocessing:
            raise ValueError(
                f"preprocessing is a {kind.__name__}, which no file describes: a Preprocessing does"
            )
        refuse_what_config_does_not_say(self)  # type: ignore[arg-type]
        config = json.dumps(_config(self), indent=2, default=_number)
        weights = {n: w.detach().cpu().contiguous() for n, w in self.state_dict().items()}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (card or ModelCard()).write(folder / CARD, self)  # type: ignore[arg-type]
        _write(folder / WEIGHTS, save(weights, {"format": "pt"}))
        _write(folder / CONFIG, f"{config}\n".encode())
        return folder

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Read a network that `save_pretrained` wrote, on the CPU and in evaluation mode.

        Args:
            name_or_folder: a folder, also that of a run, or the name of a model on the Hub,
                "owner/name", which is fetched by `huggingface_hub`
                (`pip install "mocapsnet[hub]"`).
            revision, token, cache_dir, local_files_only: for the Hub, see
                `huggingface_hub.snapshot_download`.
        Returns: a network of the saved class, which must be this one or derived from it:
            `CapsNet.from_pretrained` reads all.
        Raises: ValueError if there is no such model, a file is missing, damaged, or written by a
            later version, or the network is of another class; ImportError without huggingface_hub.
        """
        folder = Path(name_or_folder)
        if not folder.is_dir():
            hub = {"revision": revision, "token": token, "cache_dir": cache_dir}
            folder = _fetch(os.fspath(name_or_folder), local_files_only=local_files_only, **hub)
        folder = _within_run(folder)
        model = _read(folder, cls)  # type: ignore[arg-type]
        return model  # type: ignore[return-value]

    def push_to_hub(
        self,
        name: str,
        card: ModelCard | None = None,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a network of mocapsnet",
    ) -> str:
        """Publish the network on the Hub as "owner/name"; returns its address.

        Raises: ImportError without huggingface_hub; what that raises.
        """
        api = _hub().HfApi(token=token)
        api.create_repo(name, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, card)
            done = api.upload_folder(
                repo_id=name, folder_path=folder, commit_message=commit_message
            )
        return str(done)

    def export_onnx(self, path: str | os.PathLike[str]) -> Path:
        """Write the network to an ONNX file; see `mocapsnet.onnx_export.export_onnx`."""
        from .onnx_export import export_onnx

        return export_onnx(self, path)  # type: ignore[arg-type]


def load(folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> CapsNet:
    """The trained network of a run, or of a folder that `save_pretrained` wrote, for inference.

    Args:
        folder: a run folder of `mocapsnet train`, or a model's folder. Nothing is ever fetched; for
            a model on the Hub see `CapsNet.from_pretrained`.
        device: where the network goes.
    Raises: ValueError as `CapsNet.from_pretrained`.
    """
    from .model import CapsNet

    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: give a run, or what save_pretrained wrote")
    return _read(_within_run(path), CapsNet).to(device)


def _within_run(folder: Path) -> Path:
    """Where the network of a run lies; another folder is the network's own."""
    if (folder / WEIGHTS).is_file():
        return folder
    if (folder / "model").is_dir():
        return folder / "model"
    if (folder / "checkpoints").is_dir():
        raise ValueError(
            f"{folder} is a run without a trained network yet: it is written to "
            f"{folder / 'model'} after the first epoch"
        )
    return folder


OPTIONS = (
    "iterations method routing_grad sda_mean sda_scale gamma velocity block_layers in_features "
    "kernel_size stride padding padding_mode dilation groups num_groups normalized_shape eps dim "
    "grouping p approximate negative_slope"
).split()
"""Attributes of layers and stacks that make outputs what they are."""


def refuse_what_config_does_not_say(model: CapsNet) -> None:
    """Raises: ValueError if a network built from `model.config` would not be like the model."""
    advice = "; build the network with the options that it is to have"
    options: Any = vars(model.config)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            built = type(model)(**options)
        except Exception:  # a class derived from one of ours, with arguments or doings of its own
            built = _saved_as(model)(**options)
    have, need = ({n: list(w.shape) for n, w in m.state_dict().items()} for m in (model, built))
    if have != need:
        name = next(n for n in {**need, **have} if have.get(n) != need.get(n))
        raise ValueError(
            f"{name} is {have.get(name, 'missing')} in the network, and "
            f"{need.get(name, 'missing')} by its config{advice}"
        )
    modules = dict(built.named_modules())
    found = dict(model.named_modules())
    for name, then in modules.items():
        if name not in found:
            raise ValueError(f"{name} is not in the network, and by its config it is{advice}")
        if isinstance(then, nn.Sequential) and isinstance(found[name], nn.Sequential):
            for more, _ in list(found[name].named_children())[len(then) :]:
                raise ValueError(f"{name}.{more} is in the network, and not by its config{advice}")
    for name, then in modules.items():
        ours = found[name]
        if name and not alike(ours, then):
            raise ValueError(
                f"{name} is a {type(ours).__name__}, and a {type(then).__name__} by its "
                f"config{advice}"
            )
        for option in OPTIONS:
            now, then = (getattr(m, option, None) for m in (ours, modules[name]))
            if now != then:
                raise ValueError(f"{name}.{option} is {now}, and {then} by its config{advice}")


def alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules are of one kind: one may be derived, or a batch norm over processes."""
    norms = isinstance(a, nn.modules.batchnorm._BatchNorm)
    return isinstance(a, type(b)) or (norms and isinstance(b, nn.modules.batchnorm._BatchNorm))


def _saved_as(model: Pretrained) -> type[CapsNet]:
    """A class derived from one of ours is saved as that."""
    from .model import networks

    return next(base for base in type(model).__mro__ if base in networks().values())


def _config(model: Pretrained) -> dict[str, Any]:
    from . import __version__
    from .model import networks

    names = {network: name for name, network in networks().items()}
    network = dataclasses.asdict(model.config)
    if "routing_backend" in network:  # a matter of the machine
        network["routing_backend"] = None
    return {
        "format": FORMAT,
        "library": f"mocapsnet {__version__}",
        "model": names[_saved_as(model)],
        "network": network,
        "class_names": list(model.class_names),
        "preprocessing": dataclasses.asdict(model.preprocessing),
    }


def _number(value: Any) -> Any:
    """One of NumPy's, or in a tensor, as a number that JSON has."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} cannot be written as JSON")


def _read(folder: Path, wanted: type[CapsNet]) -> CapsNet:
    from .model import networks

    known = networks()
    path = folder / CONFIG
    config = _json(path)
    try:
        name, network = config["model"], config["network"]
        if name not in known:
            raise ValueError(f"model must be one of {', '.join(known)}; got {name!r}")
        saved = known[name]
        missing = {f.name for f in dataclasses.fields(saved.Config)} - network.keys()
        if missing and config["format"] == FORMAT:
            raise KeyError(f"network.{min(missing)}")
        options: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in network.items()}
        names = config["class_names"]
        preprocessing = Preprocessing(**config["preprocessing"])
        if wanted not in known.values() and issubclass(wanted, saved):  # someone derived it
            saved = wanted
        elif not issubclass(saved, wanted):
            raise ValueError(
                f"it holds a {saved.__name__}, not a {wanted.__name__}: use "
                f"{saved.__name__}.from_pretrained"
            )
        with torch.random.fork_rng(devices=[]):  # the weights it draws are replaced
            model = saved(**options)
        model.class_names = names
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it has no {error.args[0]}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    model.preprocessing = preprocessing
    model.load_state_dict(_weights(folder / WEIGHTS, model), assign=True)
    return model.eval()


def _json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: give a folder that save_pretrained wrote, or a run that "
            "`mocapsnet train` wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("format"), int):
        raise ValueError(f"{path} has no format's version: it is not of a network of mocapsnet")
    if "options" in config and "network" not in config:
        raise ValueError(f"{path} is of a run, whose network is in its folder model")
    if config["format"] > FORMAT:
        raise ValueError(
            f"{path} is of format {config['format']}, written by {config.get('library')}; this "
            f"version reads formats up to {FORMAT}: pip install --upgrade mocapsnet"
        )
    return config


def _weights(path: Path, model: CapsNet) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    have = {name: list(w.shape) for name, w in weights.items()}
    need = {name: list(w.shape) for name, w in model.state_dict().items()}
    if have != need:
        name = next(n for n in {**need, **have} if have.get(n) != need.get(n))
        raise ValueError(
            f"{path} does not belong to its {CONFIG}: {name} is {have.get(name, 'missing')} there, "
            f"and {need.get(name, 'missing')} in the network described"
        )
    return weights


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(content)
    partial.replace(path)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            'models on the Hub need huggingface_hub: pip install "mocapsnet[hub]"'
        ) from error
    return huggingface_hub


def _fetch(name: str, **options: Any) -> Path:
    """The folder on this machine of a model on the Hub."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"{name} is not a folder here, nor the name of a model on the Hub, owner/name"
        )
    hub = _hub()
    try:
        return Path(hub.snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS], **options))
    except (OSError, ValueError) as error:  # what the Hub and the network raise is OSError
        raise ValueError(
            f"{name} is not a folder here, and could not be fetched from the Hub: {error}"
        ) from error
