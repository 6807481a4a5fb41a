"""Momentum capsule networks with fused routing."""

from .cnn import CNN, CNNLoss, ResNet18, ResNetConfig
from .conv_layers import ConvCapsuleLayer
from .conv_model import ConvMoCapsNet, ConvMoCapsNetConfig
from .inspection import LayerRecord, inspect_layers
from .layers import CapsuleLayer, PrimaryCapsules
from .loss import CapsuleLoss, LossParts, MarginLoss
from .model import (
    CapsNet,
    CapsNetConfig,
    CapsNetOutput,
    Decoder,
    MoCapsNet,
    ResCapsNet,
    build_model,
)
from .model_card import ModelCard
from .prediction import Predictions
from .preprocessing import Preprocessing
from .pretrained import load
from .reversible import MomentumStack, ResidualStack

__version__ = "0.1.0"

__all__ = [
    "CNN",
    "CNNLoss",
    "CapsNet",
    "CapsNetConfig",
    "CapsNetOutput",
    "CapsuleLayer",
    "CapsuleLoss",
    "ConvCapsuleLayer",
    "ConvMoCapsNet",
    "ConvMoCapsNetConfig",
    "Decoder",
    "LayerRecord",
    "LossParts",
    "MarginLoss",
    "MoCapsNet",
    "ModelCard",
    "MomentumStack",
    "Predictions",
    "Preprocessing",
    "PrimaryCapsules",
    "ResCapsNet",
    "ResNet18",
    "ResNetConfig",
    "ResidualStack",
    "build_model",
    "inspect_layers",
    "load",
]
